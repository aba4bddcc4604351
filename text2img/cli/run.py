"""``run``: the one-shot job and its dry run, from the settings to the exit status."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from functools import partial
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, Final

from text2img.concurrency.signals import Stop, graceful_shutdown
from text2img.databases.documents import parse_id_candidates
from text2img.engine.inspection import fit
from text2img.errors import DatabaseFailed, DatabaseMissing, ErrorCode, PromptFailed, StorageFailed
from text2img.intake import read_prompts
from text2img.prompts import SMALLEST_SIZE, Claim, Prompt, RequestedParameters, request
from text2img.prompts.batching import Batcher, FixedSize
from text2img.settings import DEFAULT_MODEL, DEFAULTS
from text2img.telemetry.publisher import metrics_sinks, publishing, query_backlog
from text2img.telemetry.terminal import print_lines, print_result, shorten
from text2img.worker import build
from text2img.worker.job import Job, LocalExecutor, steps_and_guidance, task_instance

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from text2img.databases import Database, NewPrompt, Run, Selection, StoredPrompt
    from text2img.engine import ModelInfo
    from text2img.intake import Prompts
    from text2img.prompts import ModelConfiguration, Parameters, PromptId, Request
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress
    from text2img.worker.build import Dependencies
    from text2img.worker.job import Executor


_ENQUEUE_CHUNK: Final = 1000  # prompts of an input file that are added at once
log = logging.getLogger("text2img.run")


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Run the job, or plan it with ``--dry-run``; return the exit status."""
    stop = Stop()
    deps, prompts = prepare(settings, stop)
    if arguments.dry_run:
        return print_plan(settings, deps, prompts)
    if settings.ray_address is None or settings.workers is None:
        build.check_device(settings)
    return work(settings, deps, progress, stop, prompts)


def prepare(settings: Settings, stop: Stop) -> tuple[Dependencies, Prompts | None]:
    """Build what the settings determine, and read the input file, without any connection.

    Raises ConfigurationError for invalid settings or files.
    """
    deps = build.build(settings, stop.wait)
    build.check_workers(settings)
    build.check_output_folder(settings)
    metrics_sinks(settings, task_instance())
    syntax = build.prompt_syntax(settings)
    return deps, read_prompts(settings.input_file, syntax=syntax) if settings.input_file else None


def work(
    settings: Settings, deps: Dependencies, progress: Progress, stop: Stop, prompts: Prompts | None = None
) -> int:
    """Add the prompts, run the job, and print its summary line; return the exit status."""
    build.require_database(settings)
    with closing(build.database(settings)) as database, graceful_shutdown(stop):
        job = Job(settings, deps, database, executor=executor(settings, deps, database, stop), stop=stop)
        add(database, prompts)
        if settings.folders and database.queue.has_claimable(deps.selection):
            build.check_output_bucket(settings, deps)
        backlog = partial(query_backlog, database, deps.selection)
        with publishing(settings, job, backlog, task_instance()):
            job.run(progress, summary_writer(settings, deps, database, stop))
            print_result(job.document())
    return 3 if job.stats.failed else 0


def summary_writer(
    settings: Settings, deps: Dependencies, database: Database, stop: Stop
) -> Callable[[Run], None] | None:
    """Return the function that writes the run's summary files; None unless the layout is ``folders``.

    For a run that was stopped, the stop does not end it again: its caller gives it a limit.
    """
    if not settings.folders:
        return None

    def write(run: Run) -> None:
        from text2img.reports.run_files import RunSummary

        check = stop.check if run.status == "completed" else _go_on
        try:
            RunSummary(database.results, deps.storage, check).write(run, deps.selection, deps.loop)
        except (DatabaseFailed, StorageFailed, PromptFailed) as exc:  # PromptFailed: the file was rejected
            log.warning("the run's summary and contact sheet could not be written: %s", exc)

    return write


def _go_on() -> None:
    """Let the summary be written."""


def executor(settings: Settings, deps: Dependencies, database: Database, stop: Stop) -> Executor:
    """Return the executor: one worker in this process, or several in processes of their own."""
    if settings.workers is None:
        return LocalExecutor(settings, deps)
    from text2img.worker.ray.pool import RayExecutor

    return RayExecutor(settings, database, stop)


def add(database: Database, prompts: Prompts | None) -> None:
    """Add the input file's new prompts, requeue the changed ones, and remove pending ones that left it."""
    if not prompts:
        return
    added = changed = 0
    remaining = iter(prompts)
    while chunk := list(islice(remaining, _ENQUEUE_CHUNK)):
        added += database.runs.enqueue(chunk, prompts.path)
        changed += database.runs.requeue_changed(chunk)
    removed = 0
    if prompts.path is not None and (left := database.runs.left_file(prompts.path, prompts)):
        removed = database.runs.remove(left, prompts.path)
    log.info(
        "of %d prompts %d are new and %d have changed; %d that left the file are removed",
        *(len(prompts), added, changed, removed),
    )


_MAX_PLANNED, _MAX_PEEKED = 1_000, 10_000
_MODEL_SIZE = RequestedParameters(width=2040, height=2040)
"""Placeholder for the model's own size, which is unknown before the model is loaded.

It is large enough for every signature and every aspect ratio, and an unlikely size for a request.
"""


def print_plan(settings: Settings, deps: Dependencies, new: Prompts | None) -> int:
    """Print the planned batches, and return the exit status; ``new`` prompts are planned as if added."""
    waiting, prompts, configuration, changes = _waiting_prompts(settings, new)
    if new and changes:
        print_lines(f"{len(new)} prompts of {settings.input_file}: {changes.summary}")
    model = settings.model_id or (configuration and configuration.model_path) or DEFAULT_MODEL
    total = min(waiting, settings.limit or waiting)
    if settings.hosted_model:  # it can be inspected without a connection
        info: ModelInfo | None = build.hosted(settings, configuration).inspect()
    else:
        info = build.model_at_hand(settings, configuration) if total else None
    sets = _requested_sets(settings, configuration, info)
    if info:
        model = info.name
        build.validate_defaults(deps, info, build.run_defaults(settings, info, configuration))
    prompts = prompts[: min(total, _MAX_PLANNED)]
    print_lines(f"{total} prompts would be generated by {model} → {settings.output_url}")
    batcher, failures = Batcher(FixedSize(deps.batch_size)), list[dict[str, object]]()
    for prompt in prompts:
        try:
            if prompt.webhook_url is not None:
                deps.webhook_hosts.check(prompt.webhook_url)
            checked = request(prompt, (*sets, SMALLEST_SIZE), limits=deps.limits)
            deps.syntax.check(prompt.id, checked.text, prompt.requested.negative_prompt)
            planned = _fitted(request(prompt, (*sets, _MODEL_SIZE)), sets, info)
            planned = deps.loop.next(planned) if deps.loop else planned
            deps.encoder.check(planned.parameters)
            for lora in planned.parameters.loras:
                deps.loras.check(lora)
            batcher.add(planned.per_image())
        except PromptFailed as exc:
            print_lines(f"  {shorten(str(prompt.id))} would fail: {exc} ({exc.code})")
            failures.append({"prompt_id": _id(prompt), "error_code": str(exc.code), "error": str(exc)})
    batches = _print_batches(batcher)
    if deps.syntax.warning:
        log.warning("%s", deps.syntax.warning)
    if total > len(prompts):
        print_lines(f"  … and {total - len(prompts)} more")
    plan = {"prompts": total, "planned": len(prompts), "model": model, "output": settings.output_url}
    added = {"input_file": changes.document} if new and changes else {}
    print_result({"status": 0, **plan, **added, "batches": batches, "errors": failures})
    return 0


def _requested_sets(
    settings: Settings, configuration: ModelConfiguration | None, info: ModelInfo | None
) -> tuple[RequestedParameters, ...]:
    """Return the run's own parameters without the model's size, the most specific first."""
    configured = configuration.requested if configuration else RequestedParameters()
    model_defaults = info.requested if info else RequestedParameters()
    return (settings.requested, configured, model_defaults, DEFAULTS)


def _fitted(planned: Request, sets: tuple[RequestedParameters, ...], info: ModelInfo | None) -> Request:
    """Return the request with the guidance of the model's call; raise PromptFailed if it does not fit it."""
    if info is None:
        return planned
    if info.family == "hosted" and planned.parameters.loras:
        raise PromptFailed(ErrorCode.LORA_FAILED, "a hosted model takes no LoRAs; leave lora out")
    own_size = RequestedParameters(width=info.width, height=info.height)
    fitted = fit(info, request(planned.prompt, (*sets, own_size), info.multiple))
    wanted, real = planned.parameters, fitted.parameters
    if not _has_own_size(wanted):
        wanted = replace(wanted, width=real.width, height=real.height)
    return replace(planned, parameters=replace(wanted, guidance_scale=real.guidance_scale))


def _waiting_prompts(
    settings: Settings, new: Prompts | None
) -> tuple[int, list[Prompt], ModelConfiguration | None, _FileChanges | None]:
    """Return the number of prompts that would wait, the first of them, and the model configuration.

    ``new`` are the input file's prompts; also return what adding them would change.
    """
    selection = build.selection(settings)
    changes = _FileChanges(selection) if new else None
    try:
        with closing(build.database(settings, create=False)) as database:
            if new and changes:
                changes.read(database, new)
            more = min(len(changes.excluded), _MAX_PEEKED) if changes else 0
            prompts = database.queue.peek(_MAX_PLANNED + more, selection)
            waiting = database.queue.pending(selection) + (changes.more if changes else 0)
            configuration = database.runs.model_configuration(settings.model_config_id)
    except DatabaseMissing:
        if not new and not settings.folder:  # a run would create the folder's database
            raise
        if new and changes:
            changes.read(None, new)
        waiting, prompts, configuration = changes.more if changes else 0, [], None
    return waiting, changes.merged(prompts) if changes else prompts, configuration, changes


class _FileChanges:
    """The changes that adding an input file would make, as far as the plan needs them; see ``add``.

    ``excluded`` are prompts that would not be claimed as they are stored, ``more`` is by how many the number
    of waiting prompts in the selection would grow; ``planned`` are the first of the new or changed ones.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._new = self._changed = self._removed = 0
        self.excluded: set[PromptId] = set()
        self.more = 0
        self.planned: list[Prompt] = []

    @property
    def document(self) -> dict[str, int]:
        """The numbers of prompts that would change, in the form of ``--json``."""
        return {"added": self._new, "changed": self._changed, "removed": self._removed}

    @property
    def summary(self) -> str:
        """The numbers of prompts that would change, in words."""
        counts = f"{self._new} would be added, {self._changed} generated again"
        return f"{counts}; {self._removed} that left the file would be removed"

    def read(self, database: Database | None, new: Prompts) -> None:
        """Compare the file with the database, which may not exist yet."""
        remaining = iter(new)
        while chunk := list(islice(remaining, _ENQUEUE_CHUNK)):
            stored = database.runs.compare(chunk, self._selection) if database else [None] * len(chunk)
            for prompt, found in zip(chunk, stored, strict=True):
                self._add(prompt, found)
        if database and new.path is not None:
            left = database.runs.left_file(new.path, new)
            self._removed = len(left)
            self.excluded.update(left)
            self.more -= len(database.runs.left_file(new.path, new, self._selection))

    def merged(self, prompts: list[Prompt]) -> list[Prompt]:
        """Return the prompts with those planned, in the order of their claims."""
        stored = (prompt for prompt in prompts if prompt.id not in self.excluded)
        return list(merge(stored, sorted(self.planned, key=_order), key=_order))

    def _add(self, prompt: NewPrompt, stored: StoredPrompt | None) -> None:
        if stored is None or stored.removed:
            self._new += 1
        elif stored.differs and not stored.held:
            self._changed += 1
            self.excluded.add(prompt.id)
        else:
            return
        self.more -= stored is not None and stored.waiting
        wanted = self._selection.dataset_id
        if wanted is not None and prompt.dataset_id not in parse_id_candidates(wanted):
            return
        self.more += 1
        self.planned.append(_as_claimed(prompt))
        if len(self.planned) > 2 * _MAX_PLANNED:
            self.planned = sorted(self.planned, key=_order)[:_MAX_PLANNED]


def _order(prompt: Prompt) -> tuple[float, int, int | str]:
    """Return what the databases sort by: the priority, then the id by its type."""
    number = prompt.id.kind == "int"
    rank = {"int": 0, "double": 0, "str": 1, "uuid": 2, "objectid": 3}.get(prompt.id.kind, 4)
    return -prompt.priority, rank, int(prompt.id.text) if number else prompt.id.text


def _as_claimed(new: NewPrompt) -> Prompt:
    """Return the prompt as it would be claimed."""
    claim = Claim(new.id, "", 0)
    return Prompt(
        claim=claim,
        text=new.text,
        requested=new.requested,
        webhook_url=new.webhook_url,
        priority=new.priority or 0,
    )


def _print_batches(batcher: Batcher) -> list[dict[str, object]]:
    """Print a line for each planned batch; return them in the form of ``--json``."""
    batches: list[dict[str, object]] = []
    while batch := batcher.take():
        batches.append(_batch_document(batch))
        number = len(batches)
        names = ", ".join(_name(request) for request in batch)
        print_lines(f"  batch {number}: {len(batch)} × {_description(batch[0])}: {names}")
    return batches


def _batch_document(batch: Sequence[Request]) -> dict[str, object]:
    """Return what the images of a batch have in common (null: the model's own), and their prompts."""
    parameters = batch[0].parameters
    known = parameters.aspect_ratio is None  # otherwise the size depends on the model's own
    return {
        "width": parameters.width if known and parameters.width != _MODEL_SIZE.width else None,
        "height": parameters.height if known and parameters.height != _MODEL_SIZE.height else None,
        "aspect_ratio": parameters.aspect_ratio,
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "scheduler": parameters.scheduler,
        "loras": [{"path": lora.shown, "weight": lora.weight} for lora in parameters.loras],
        "images": [{"prompt_id": _id(request.prompt), "number": request.number} for request in batch],
    }


def _id(prompt: Prompt) -> int | str:
    """Return the prompt's id in a type of JSON: an integer as a number, all others as text."""
    return int(prompt.id.text) if prompt.id.kind == "int" else str(prompt.id)


def _name(request: Request) -> str:
    """Return the prompt's id, and the image's number if the prompt has several images."""
    name = shorten(str(request.prompt.id))
    return f"{name} (image {request.number + 1})" if request.num_images > 1 else name


def _has_own_size(parameters: Parameters) -> bool:
    return (parameters.width, parameters.height) == (_MODEL_SIZE.width, _MODEL_SIZE.height)


def _description(request: Request) -> str:
    parameters = request.parameters
    size = "the model's own size" if _has_own_size(parameters) else f"{parameters.width}×{parameters.height}"
    size = f"{parameters.aspect_ratio} of the model's own size" if parameters.aspect_ratio else size
    scheduler = parameters.scheduler or "the model's own scheduler"
    loras = "".join(f", LoRA {lora.shown} × {lora.weight:g}" for lora in parameters.loras)
    return f"{size}, {steps_and_guidance(parameters)}, {scheduler}{loras}"
