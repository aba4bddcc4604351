"""``run``: the one-shot job, from the settings to the exit status."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from text2img.concurrency.signals import Stop, graceful_shutdown
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

    from text2img.databases import Database, NewPrompt, Run
    from text2img.intake import Prompts
    from text2img.prompts import ModelConfiguration, Request
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress
    from text2img.worker.build import Dependencies
    from text2img.worker.local import Executor


_AT_ONCE: Final = 1000
log = logging.getLogger("text2img.run")


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Do the job; return the exit status."""
    stop = Stop()
    deps, prompts = prepare(settings, stop)
    if arguments.dry_run:
        return show(settings, deps, prompts)
    if settings.ray_address is None or settings.workers is None:
        build.check_device(settings)
    return work(settings, deps, progress, stop, prompts)


def prepare(settings: Settings, stop: Stop) -> tuple[Dependencies, Prompts | None]:
    """Build what the settings determine, and read the input file, before the database is opened.

    Raises ConfigurationError for what is wrong with either.
    """
    deps = build.build(settings, stop.wait)
    build.check_workers(settings)
    check(settings, platform_task.instance())
    return deps, read_prompts(settings.input_file) if settings.input_file else None


def work(
    settings: Settings, deps: Dependencies, progress: Progress, stop: Stop, prompts: Prompts | None = None
) -> int:
    """Add the prompts, run the job, and print its summary line; return the exit status."""
    with closing(build.database(settings)) as database, graceful_shutdown(stop):
        add(database, prompts)
        job = Job(settings, deps, database, executor=executor(settings, deps, database, stop), stop=stop)
        backlog = partial(look, database, deps.selection)
        with publishing(settings, job, backlog, platform_task.instance()):
            job.run(progress, overview(settings, deps, database, stop))
    return 3 if job.stats.failed else 0


def overview(
    settings: Settings, deps: Dependencies, database: Database, stop: Stop
) -> Callable[[Run], None] | None:
    """Return what writes the run's summary files, in a layout of folders; None in a flat one."""
    if not settings.folders:
        return None

    def write(run: Run) -> None:
        from text2img.reports.run_files import RunSummary

        try:
            RunSummary(database, deps.storage, stop.check).write(run, deps.selection, deps.loop)
        except (DatabaseFailed, StorageFailed, PromptFailed) as exc:  # the last: one of its files is rejected
            log.warning("the run's summary and contact sheet could not be written: %s", exc)

    return write


def executor(settings: Settings, deps: Dependencies, database: Database, stop: Stop) -> Executor:
    """Return what does the work: one worker in this process, or several in processes of their own."""
    if settings.workers is None:
        return LocalExecutor(settings, deps)
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


def show(settings: Settings, deps: Dependencies, new: Prompts | None) -> int:
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
    batcher = Batcher(FixedSize(deps.batch_size))
    for prompt in prompts:
        try:
            if prompt.webhook_url is not None:
                deps.webhook_hosts.check(prompt.webhook_url)
            asked = request(prompt, (settings.requested, configured, own, DEFAULTS, _OWN_SIZE))
            asked = deps.loop.next(asked) if deps.loop else asked
            deps.encoder.check(asked.parameters)
            if hosted:
                hosted.prepare(asked)
            for lora in asked.parameters.loras:
                deps.loras.check(lora)
            batcher.add(asked.per_image())
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
    several = request.num_images > 1
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
