"""Three ways to make the same pictures on the same device: nothing but the engine, the job, a plain script.

Each runs in a process of its own (``benchmarks.job.apart``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from benchmarks.job import run_job
from benchmarks.stub import StubEngine
from text2img.prompts import Claim, Parameters, Prompt, PromptId, Request
from text2img.telemetry.progress import NullProgress

if TYPE_CHECKING:
    from benchmarks.places import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """So many pictures of ``side``² pixels, ``batch`` at a time, ``seconds`` of the device's time each."""

    pictures: int
    batch: int
    side: int
    seconds: float

    def engine(self) -> StubEngine:
        """The device, the same for all."""
        return StubEngine(self.side, self.seconds)

    def request(self, number: int) -> Request:
        """What the engine gets for one of the pictures."""
        wanted = Parameters(
            negative_prompt="",
            seed=number,
            num_inference_steps=20,
            guidance_scale=7.5,
            width=self.side,
            height=self.side,
            scheduler=None,
        )
        claim = Claim(PromptId("int", str(number)), "nobody", 1)
        text = f"picture {number}"
        return Request(prompt=Prompt(claim=claim, text=text), text=text, parameters=wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Pictures a second from the first batch's start: ``device`` until the last batch's end, ``done`` until
    nothing was left to do. ``start`` is the seconds before the first batch.
    """

    device: float
    done: float
    start: float


def bare_loop(task: Task) -> Pace:
    """The engine in a loop over the batches. Nothing is claimed, kept or told."""
    engine, begun = task.engine(), monotonic()
    for first in range(0, task.pictures, task.batch):
        numbers = range(first, min(first + task.batch, task.pictures))
        engine.generate([task.request(number) for number in numbers], NullProgress().step)
    return _pace(task, engine, begun, monotonic())


def job(task: Task, place: Place, *more: str) -> Pace:
    """The whole job; ``more`` are further arguments of its command line."""
    engine = task.engine()
    arguments = [*place.arguments, "--batch-size", str(task.batch), "--log-format", "json", *more]
    span = run_job(engine, arguments, place.variables, place.folder)
    return _pace(task, engine, span.begun, span.ended)


def serial_script(task: Task, place: Place) -> Pace:
    """What is usually written first: for each prompt generate, save, upload, insert, then the next.

    The device takes as long for each picture as in a batch, so that only the waiting differs.
    """
    os.environ.update(place.variables)
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from PIL import Image
    from pymongo import MongoClient

    client = storage.Client(project="script", credentials=AnonymousCredentials())
    bucket_name, _, prefix = place.output.removeprefix("gs://").partition("/")
    bucket = client.bucket(bucket_name)
    engine, begun = task.engine(), monotonic()
    with MongoClient[dict[str, object]](place.database) as mongodb:
        database = mongodb.get_default_database()
        for number, document in enumerate(database.datasets.find(limit=task.pictures)):
            (image,) = engine.generate([task.request(number)], NullProgress().step)
            file = place.folder / f"{number}.png"
            Image.fromarray(image.pixels).save(file)  # type: ignore[union-attr]
            bucket.blob(f"{prefix}/{file.name}").upload_from_filename(file)
            result = {"dataset_id": document["_id"], "image_url": f"{place.output}/{file.name}"}
            database.dataset_records.insert_one(result)
            database.datasets.update_one({"_id": document["_id"]}, {"$set": {"status": "completed"}})
    return _pace(task, engine, begun, monotonic())


def _pace(task: Task, engine: StubEngine, begun: float, ended: float) -> Pace:
    first, last = engine.batches[0][0], engine.batches[-1][1]
    return Pace(
        device=task.pictures / (last - first), done=task.pictures / (ended - first), start=first - begun
    )
