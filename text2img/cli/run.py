"""``run``: the one-shot job, from the settings to the exit status."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from text2img.concurrency.signals import graceful_shutdown
from text2img.errors import DatabaseFailed, DatabaseMissing, PromptFailed, StorageFailed
from text2img.intake import read_prompts
from text2img.prompts import Claim, Prompt, RequestedParameters, request
from text2img.prompts.batching import Batcher, FixedSize
from text2img.settings import DEFAULT_MODEL, DEFAULTS
from text2img.telemetry.publisher import check, look, publishing
from text2img.worker import build, platform_task
from text2img.worker.job import Job
from text2img.worker.local import LocalExecutor

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from text2img.concurrency.signals import Stop
    from text2img.databases import Database, NewPrompt, Run
    from text2img.intake import Prompts
    from text2img.prompts import ModelConfiguration, Request
    from text2img.settings import Settings
    from text2img.storage import ImageStorage
    from text2img.telemetry.progress import Progress
    from text2img.worker.local import Executor


_AT_ONCE: Final = 1000
log = logging.getLogger("text2img.run")


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Do the job; the exit status."""
    storage, prompts = prepare(settings)
    if arguments.dry_run:
        return show(settings, prompts)
    if settings.ray_address is None or settings.workers is None:
        build.check_device(settings)
    return work(settings, storage, progress, prompts)


def prepare(settings: Settings) -> tuple[ImageStorage, Prompts | None]:
    """What can be known of the settings without asking anybody: the storage, and the input file's prompts.

    Raises ConfigurationError for whatever is wrong with them.
    """
    _ = settings.database_url
    storage = build.storage(settings)
    build.receiver(settings)
    build.webhooks(settings)
    build.encoder(settings)
    build.loras(settings)
    build.evaluator(settings)
    _ = settings.object_names, settings.loop
    build.check_workers(settings)
    check(settings, platform_task.instance())
    return storage, read_prompts(settings.input_file) if settings.input_file else None


def work(
    settings: Settings, storage: ImageStorage, progress: Progress, prompts: Prompts | None = None
) -> int:
    """Run the job on these parts, with these prompts added first, and print its one line; the exit status."""
    with closing(build.database(settings)) as database, graceful_shutdown() as stop:
        add(database, prompts)
        job = Job(settings, database, executor(settings, database, storage, stop), stop)
        with publishing(
            settings, job, partial(look, database, build.selection(settings)), platform_task.instance()
        ):
            job.run(progress, overview(settings, database, storage, stop))
    return 3 if job.stats.failed else 0


def overview(
    settings: Settings, database: Database, storage: ImageStorage, stop: Stop
) -> Callable[[Run], None] | None:
    """What writes the things to look at, in a layout of folders."""
    if not settings.folders:
        return None

    def write(run: Run) -> None:
        from text2img.reports.run_files import RunSummary

        try:
            RunSummary(database, storage, stop.check).write(run, build.selection(settings), settings.loop)
        except (DatabaseFailed, StorageFailed, PromptFailed) as exc:  # the last: a file of its own is refused
            log.warning("the run's summary and contact sheet could not be written: %s", exc)

    return write


def executor(settings: Settings, database: Database, storage: ImageStorage, stop: Stop) -> Executor:
    """Who does the work: one worker in this process, or several in processes of their own."""
    if settings.workers is None:
        return LocalExecutor(settings, database, storage, stop)
    from text2img.worker.ray.pool import RayExecutor

    return RayExecutor(settings, database, stop)


def add(database: Database, prompts: Prompts | None) -> None:
    """The input file's prompts: those that are new, and those that were changed."""
    if not prompts:
        return
    added = revised = 0
    waiting = iter(prompts)
    while chunk := list(islice(waiting, _AT_ONCE)):
        added += database.enqueue(chunk)
        revised += database.requeue_changed(chunk)
    log.info("of %d prompts %d are new and %d have changed", len(prompts), added, revised)


_SHOWN = 1_000
_OWN_SIZE = RequestedParameters(width=2040, height=2040)
"""A stand-in: which size it is, only the model knows. On so large a one no signature is too long, and no
aspect ratio of it is too large. Nobody asks for this very size."""


def show(settings: Settings, new: Prompts | None) -> int:
    """Print it; the exit status. ``new`` prompts of a file are planned as if none of them were there yet."""
    waiting, prompts, configuration = _found(settings, may_be_missing=bool(new))
    if new:
        waiting += _add(new, prompts)
        print(
            f"{len(new)} prompts of {settings.input_file} would be added, or made again, where they are new"
        )
    configured = configuration.requested if configuration else RequestedParameters()
    model = settings.model_id or (configuration and configuration.model_path) or DEFAULT_MODEL
    own = RequestedParameters()
    hosted = build.hosted(settings, configuration) if settings.hosted_model else None
    if hosted:  # of which all that can be known is known without asking
        model_info = hosted.inspect()
        model, own = model_info.name, model_info.requested
    total = min(waiting, settings.limit or waiting)
    prompts = prompts[: min(total, _SHOWN)]
    print(f"{total} prompts would be made by {model} → {settings.output_url}")
    batcher, encoder = Batcher(FixedSize(settings.batches.most)), build.encoder(settings)
    hosts, loras, loop = build.webhook_hosts(settings), build.loras(settings), settings.loop
    for prompt in prompts:
        try:
            if prompt.webhook_url is not None:
                hosts.check(prompt.webhook_url)
            asked = request(prompt, (settings.requested, configured, own, DEFAULTS, _OWN_SIZE))
            asked = loop.next(asked) if loop else asked
            encoder.check(asked.parameters)
            if hosted:
                hosted.prepare(asked)
            for lora in asked.parameters.loras:
                loras.check(lora)
            batcher.add(asked.each())
        except PromptFailed as exc:
            print(f"  {prompt.id} would fail: {exc} ({exc.code})")
    _print_batches(batcher)
    if total > len(prompts):
        print(f"  … and {total - len(prompts)} more")
    return 0


def _found(
    settings: Settings, *, may_be_missing: bool
) -> tuple[int, list[Prompt], ModelConfiguration | None]:
    """How many prompts wait, the first of them, and the model configuration."""
    try:
        with closing(build.database(settings, create=False)) as database:
            waiting = database.pending(build.selection(settings))
            prompts = database.peek(min(settings.limit or _SHOWN, _SHOWN), build.selection(settings))
            return waiting, prompts, database.model_configuration(settings.model_config_id)
    except DatabaseMissing:
        if may_be_missing:
            return 0, [], None
        raise


def _add(new: Prompts, prompts: list[Prompt]) -> int:
    """Add the first of the new ones to those that wait already; how many all of them are."""
    there = {prompt.id for prompt in prompts}
    added = 0
    for each in new:
        if each.id not in there:
            added += 1
            if len(prompts) < _SHOWN:
                prompts.append(_prompt(each))
    return added


def _prompt(new: NewPrompt) -> Prompt:
    """The prompt as it would be claimed."""
    claim = Claim(new.id, "", 0)
    return Prompt(claim=claim, text=new.text, requested=new.requested, webhook_url=new.webhook_url)


def _print_batches(batcher: Batcher) -> None:
    number = 0
    while batch := batcher.take():
        number += 1
        ids = ", ".join(_picture(request) for request in batch)
        print(f"  batch {number}: {len(batch)} × {_described(batch[0])}: {ids}")


def _picture(request: Request) -> str:
    """The prompt's id, and which picture of it, where it has several."""
    several = request.pictures > 1
    return f"{request.prompt.id} (picture {request.number + 1})" if several else str(request.prompt.id)


def _described(request: Request) -> str:
    wanted = request.parameters
    own = (wanted.width, wanted.height) == (_OWN_SIZE.width, _OWN_SIZE.height)
    size = "the model's own size" if own else f"{wanted.width}×{wanted.height}"
    size = f"{wanted.aspect_ratio} of the model's own size" if wanted.aspect_ratio else size
    scheduler = wanted.scheduler or "the model's own scheduler"
    loras = "".join(f", LoRA {lora.shown} × {lora.weight:g}" for lora in wanted.loras)
    steps = f"{wanted.num_inference_steps} steps, guidance {wanted.guidance_scale:g}"
    return f"{size}, {steps}, {scheduler}{loras}"
