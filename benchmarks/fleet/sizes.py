"""How many bytes a prompt comes to in MongoDB: waiting, completed, its result, its part of a notice."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.prompts import Completed, PromptId, RequestedParameters, StoredImage, request
from text2img.webhooks.delivery import collect

if TYPE_CHECKING:
    from text2img.prompts import Prompt

_PROMPTS = 200
_TEXT = "A beautiful sunset over mountains, painted in oil, wide angle, golden hour light"
_USED = RequestedParameters(num_inference_steps=30, guidance_scale=7.5, width=512, height=512)
_WORKER, _RUN = "gpu-worker-17-4711-a1b2c3", "run-20260101-120000-a1b2c3"


def document_sizes(url: str, prompts: int = _PROMPTS) -> dict[str, float]:
    """The mean size in bytes of usual documents (ObjectIds, a text of 80 letters), made in an empty database.

    A notice's is for each outcome in it.
    """
    import bson
    from pymongo import MongoClient

    with closing(open_database(url, Collections())) as database, MongoClient[dict[str, Any]](url) as client:
        documents = client.get_default_database()

        def mean(collection: str) -> float:
            return sum(len(bson.encode(each)) for each in documents[collection].find()) / prompts

        database.runs.enqueue(
            NewPrompt(
                id=PromptId("objectid", str(bson.ObjectId())),
                text=_TEXT,
                requested=RequestedParameters(seed=number),
            )
            for number in range(prompts)
        )
        waiting = mean("datasets")
        while claimed := database.queue.claim(_WORKER, 10, 60.0, Selection()):
            database.queue.record([_completed(prompt) for prompt in claimed], _RUN, notify=True)
        collect(database.outbox, _RUN, "completed", final=True)
        return {
            "waiting": waiting,
            "completed": mean("datasets"),
            "result": mean("dataset_records"),
            "outcome in a notice": mean("callbacks"),
        }


def _completed(prompt: Prompt) -> Completed:
    asked = request(prompt, [_USED])
    made = {
        "scheduler": "DPMSolverMultistepScheduler",
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    }
    image = StoredImage(
        image_url=f"gs://my-pictures/generated/{prompt.id.name}.png",
        sha256="ab" * 32,
        text=asked.text,
        used={**asked.parameters.recorded, **made},
    )
    return Completed(prompt=prompt, text=asked.text, images=(image,))
