"""``demo``: the same job on built-in parts: an embedded database, a small trained model, a folder."""

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
    """Make the demo's pictures and a contact sheet of them; the exit status."""
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the model is so small that more threads only get in its way
    folder = Path(arguments.folder)
    if arguments.fresh:
        _remove(folder)
    settings = _settings(settings, folder)
    prompts = list(read_prompts(str(PROMPTS)))
    if not _enqueue(settings, prompts):
        print(f"nothing to do: the pictures are in {folder}; text2img demo --fresh starts afresh")
        return 0
    stop = Stop()
    status = run.work(settings, build.build(settings, stop.wait), progress, stop)
    if status == 0:
        _show(prompts, folder)
    return status


def _settings(settings: Settings, folder: Path) -> Settings:
    return replace(
        settings,
        database=f"sqlite:///{folder.absolute()}/demo.db",
        output=str(folder / "images"),
        model_id=settings.model_id or str(MODEL),
        num_inference_steps=20,
        guidance_scale=3,  # as its training was judged
        batch_size="4",
    )


def _enqueue(settings: Settings, prompts: Sequence[NewPrompt]) -> int:
    """Add the demo's prompts unless they are there already; how many wait."""
    folder = Path(settings.output_url).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageFailed(f"{folder} cannot be made: {exc.strerror}; choose another --output") from exc
    with closing(build.database(settings)) as database:
        database.enqueue(prompts)
        return database.pending(Selection())


def _show(prompts: Sequence[NewPrompt], folder: Path) -> None:
    """Write the contact sheet, and say how many pictures show what was asked for, by their pixels."""
    from PIL import Image

    from text2img.demo.judge import judge

    pictures = []
    for prompt in prompts:
        with Image.open(folder / "images" / f"{prompt.id.name}.png") as file:
            pictures.append((prompt.text, file.convert("RGB")))
    right = sum(judge(image).shows(Scene.parse(text)) for text, image in pictures)
    contact_sheet(pictures).save(folder / "contact-sheet.png")
    print(f"{right} of {len(pictures)} pictures show what their prompt says")
    print(f"look at {folder / 'contact-sheet.png'}")


def _remove(folder: Path) -> None:
    """Remove what a demo wrote, and nothing else: the folder may be somebody's home."""
    written = [*folder.glob("demo.db*"), folder / "contact-sheet.png", *(folder / "images").glob("*.png")]
    try:
        for file in written:
            file.unlink(missing_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"{exc.filename} cannot be removed: {exc.strerror}") from exc
