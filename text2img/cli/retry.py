"""``retry``: reset failed prompts to pending, and forget their attempts.

``--callbacks`` reopens the notifications that receivers rejected instead; ``--unscored`` scores images.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.cli.report import image_reader
from text2img.concurrency.signals import Stop, graceful_shutdown
from text2img.databases.sqlite import folder_of
from text2img.errors import ConfigurationError, ErrorCode, EvaluationFailed, ObjectUnreadable
from text2img.storage import find_moved
from text2img.telemetry.terminal import print_lines, print_result
from text2img.worker import build
from text2img.worker.scoring import Scorer, decode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from text2img.databases import CompletedPrompt, Database
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


log = logging.getLogger("text2img.retry")

_MAX_CONCURRENCY: Final = 8
"""Prompts whose images are scored at once: most of the time is spent waiting for a service."""


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Reset the failed prompts or reopen the rejected notifications, and return the exit status."""
    del progress
    code = _error_code(arguments.error_code)
    if arguments.unscored:
        if code is not None or arguments.callbacks:
            raise ConfigurationError(
                "--unscored scores stored images; leave out --error-code and --callbacks"
            )
        return _score(settings)
    if arguments.callbacks:
        return _reopen(settings, code)
    with closing(build.database(settings, create=False)) as database:  # a missing file is a typing error
        database.connection.open()
        count = database.runs.retry(code, build.selection(settings))
    print_lines(f"reset {count} failed prompts to pending")
    print_result({"status": 0, "reset": count})
    return 0


def _reopen(settings: Settings, code: ErrorCode | None) -> int:
    if code is not None or build.selection(settings).dataset_id is not None:
        raise ConfigurationError(
            "--callbacks reopens all rejected notifications; leave out --error-code and --dataset-id"
        )
    with closing(build.database(settings, create=False)) as database:
        database.connection.open()
        count = database.outbox.reopen_notifications()
    print_lines(f"reopened {count} rejected notifications; the next run sends them")
    print_result({"status": 0, "reopened": count})
    return 0


def _score(settings: Settings) -> int:
    """Score the stored images that have no score, and return the exit status."""
    evaluator, stop = build.evaluator(settings), Stop()
    if evaluator is None:
        raise ConfigurationError("--unscored needs an evaluator; choose one with --evaluator (EVALUATOR)")
    evaluator.check()
    locate = partial(find_moved, folder=folder_of(settings.database_url))
    scorer = Scorer(evaluator, settings.evaluator_timeout, stop)
    read = image_reader(settings, locate)
    with closing(build.database(settings, create=False)) as database, graceful_shutdown(stop):
        database.connection.open()
        completed = database.results.completed(build.selection(settings))
        waiting = [prompt for prompt in completed if None in _scores(prompt)]
        if waiting:
            evaluator.load()
        with ThreadPoolExecutor(_MAX_CONCURRENCY) as pool:
            futures = [pool.submit(_score_prompt, database, prompt, read, scorer, stop) for prompt in waiting]
            try:
                scored = [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    images, missing = (sum(counts) for counts in zip(*scored, strict=True)) if scored else (0, 0)
    left = f"; {missing} still have no score" if missing else ""
    print_lines(f"scored {images} images of {len(waiting)} prompts{left}")
    print_result({"status": 0, "scored": images, "unscored": missing})
    return 0


def _scores(prompt: CompletedPrompt) -> list[float | None]:
    """Return a score for each of the prompt's images, None without one."""
    return [*prompt.scores, *[None] * len(prompt.image_urls)][: len(prompt.image_urls)]


def _score_prompt(
    database: Database, prompt: CompletedPrompt, read: Callable[[str], bytes], scorer: Scorer, stop: Stop
) -> tuple[int, int]:
    """Score a prompt's images that have no score; return how many were scored, and how many were not."""
    stop.check()
    scores, evaluation, scored = _scores(prompt), prompt.evaluation, 0
    for number, url in enumerate(prompt.image_urls):
        if scores[number] is not None:
            continue
        try:
            found = scorer.score(decode(read(url)), prompt.text)
        except (EvaluationFailed, ObjectUnreadable) as exc:
            log.warning("%s has no score: %s", prompt.id, exc)
            continue
        except TimeoutError:
            stop.check()
            continue
        scores[number] = found.score
        evaluation = found.document if number == 0 else evaluation
        scored += found.score is not None
    if not scored:
        return 0, scores.count(None)
    kept = database.runs.save_scores(prompt, scores, evaluation)
    return (scored, scores.count(None)) if kept else (0, 0)


def _error_code(text: str | None) -> ErrorCode | None:
    try:
        return None if text is None else ErrorCode(text)
    except ValueError:
        known = ", ".join(ErrorCode)
        raise ConfigurationError(f"--error-code must be one of {known}; it is {text!r}") from None
