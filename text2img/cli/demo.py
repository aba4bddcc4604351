"""``demo``: run with built-in parts: an embedded database, a small trained model, a folder."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import text2img.demo
from text2img.cli import run
from text2img.concurrency.signals import Stop
from text2img.databases import Selection
from text2img.demo.scenes import Scene, contact_sheet
from text2img.errors import ConfigurationError, StorageFailed
from text2img.intake import read_prompts
from text2img.worker import build

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from text2img.databases import NewPrompt
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress

_BUILT_IN = Path(text2img.demo.__file__).parent
MODEL = _BUILT_IN / "model"
PROMPTS = _BUILT_IN / "prompts.yaml"


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Generate the demo's images and a contact sheet of them; return the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is so small that more threads slow it down
    folder = Path(arguments.folder)
    if arguments.fresh:
        _remove(folder)
    settings = _settings(settings, folder)
    prompts = list(read_prompts(str(PROMPTS)))
    if not _enqueue(settings, prompts):
        print(f"nothing to do: the images are in {folder}; use --fresh to generate them again")
        return 0
    stop = Stop()
    status = run.work(settings, build.build(settings, stop.wait), progress, stop)
    if status == 0:
        _write_contact_sheet(prompts, folder)
    return status


def _settings(settings: Settings, folder: Path) -> Settings:
    return replace(
        settings,
        database=f"sqlite:///{folder.absolute()}/demo.db",
        output=str(folder / "images"),
        model_id=settings.model_id or str(MODEL),
        num_inference_steps=20,
        guidance_scale=3,  # as in the evaluation of its training
        batch_size="4",
    )


def _enqueue(settings: Settings, prompts: Sequence[NewPrompt]) -> int:
    """Add the demo's prompts unless they exist; return the number of pending prompts."""
    folder = Path(settings.output_url).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageFailed(f"{folder} cannot be created: {exc.strerror}; choose another --output") from exc
    with closing(build.database(settings)) as database:
        database.runs.enqueue(prompts)
        return database.queue.pending(Selection())


def _write_contact_sheet(prompts: Sequence[NewPrompt], folder: Path) -> None:
    """Write the contact sheet, and print how many images match their prompt, by their pixels."""
    from PIL import Image

    from text2img.demo.judge import judge

    images = []
    for prompt in prompts:
        with Image.open(folder / "images" / f"{prompt.id.name}.png") as file:
            images.append((prompt.text, file.convert("RGB")))
    matching = sum(judge(image).shows(Scene.parse(text)) for text, image in images)
    contact_sheet(images).save(folder / "contact-sheet.png")
    print(f"{matching} of {len(images)} images match their prompt")
    print(f"contact sheet: {folder / 'contact-sheet.png'}")


def _remove(folder: Path) -> None:
    """Remove a demo's files and nothing else: the folder may be a home directory."""
    files = [*folder.glob("demo.db*"), folder / "contact-sheet.png", *(folder / "images").glob("*.png")]
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"{exc.filename} cannot be removed: {exc.strerror}") from exc
