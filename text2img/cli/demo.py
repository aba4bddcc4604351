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
from text2img.errors import ConfigurationError, DatabaseFailed, StorageFailed
from text2img.images import is_overview, overview_mark, read_parameters
from text2img.intake import read_prompts
from text2img.telemetry.terminal import print_lines
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
DATABASE, CONTACT_SHEET = "demo.db", "contact-sheet.png"


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Generate the demo's images and a contact sheet of them; return the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is so small that more threads slow it down
    folder = Path(arguments.folder)
    settings = _settings(settings, folder)
    prompts = list(read_prompts(str(PROMPTS)))
    images = _check_folder(settings, folder)
    if arguments.fresh:
        _remove([*images, *(folder / f"{DATABASE}{suffix}" for suffix in ("", "-wal", "-shm"))])
    if not _enqueue(settings, prompts):
        print_lines(f"nothing to do: the images are in {folder}; use --fresh to generate them again")
        return 0
    stop = Stop()
    status = run.work(settings, build.build(settings, stop.wait), progress, stop)
    if status == 0:
        _write_contact_sheet(prompts, folder)
    return status


def _settings(settings: Settings, folder: Path) -> Settings:
    return replace(
        settings,
        database=f"sqlite:///{folder.absolute()}/{DATABASE}",
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
    from text2img.demo.judge import judge
    from text2img.images import open_image

    images = []
    for prompt in prompts:
        with open_image((folder / "images" / f"{prompt.id.name}.png").read_bytes()) as file:
            images.append((prompt.text, file.convert("RGB")))
    matching = sum(judge(image).shows(Scene.parse(text)) for text, image in images)
    contact_sheet(images).save(folder / CONTACT_SHEET, pnginfo=overview_mark(shows_images=True))
    print_lines(f"{matching} of {len(images)} images match their prompt")
    print_lines(f"contact sheet: {folder / CONTACT_SHEET}")


def _check_folder(settings: Settings, folder: Path) -> list[Path]:
    """Return the images that the folder's demo database lists, as far as they are still there unchanged.

    Raises ConfigurationError if the folder has another program's database or contact sheet where the demo
    writes its own: it may be a home directory.
    """
    sheet, database = folder / CONTACT_SHEET, folder / DATABASE
    if os.path.lexists(sheet) and not (sheet.is_file() and is_overview(sheet.read_bytes())):
        raise _not_the_demos(sheet)
    if not os.path.lexists(database):
        return []
    try:
        with closing(build.database(settings, create=False)) as opened:
            counts = opened.runs.counts(Selection())
            prompts = counts.pending + counts.processing + counts.completed + counts.error
            if not prompts and not opened.runs.last_runs(1):
                raise _not_the_demos(database)
            return [
                path
                for prompt in opened.results.completed(Selection())
                for path in (folder / "images" / Path(url).name for url in prompt.image_urls)
                if _shows(path, prompt.text)
            ]
    except DatabaseFailed as exc:
        raise ConfigurationError(f"the demo's database: {exc}; choose another --output") from exc


def _shows(path: Path, text: object) -> bool:
    """Return whether the file is an image whose parameters name that text."""
    try:
        return not path.is_symlink() and read_parameters(path.read_bytes()).get("prompt") == text
    except Exception:  # noqa: BLE001 - whatever else lies there is no image of the demo
        return False


def _not_the_demos(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path} is not a file of the demo; move it, or choose another --output")


def _remove(files: Sequence[Path]) -> None:
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"{exc.filename} cannot be removed: {exc.strerror}") from exc
