"""The HTML report: prompts and runs as bounded, plain JSON for the page, with thumbnails and links."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from text2img.databases.documents import number_of
from text2img.databases.run_documents import state_of
from text2img.errors import ConfigurationError, ObjectUnreadable
from text2img.prompts.ids import quoted
from text2img.reports.gallery.page import page, quiet, thumbnail
from text2img.settings import expand_home
from text2img.storage import ENDINGS, identity
from text2img.telemetry.terminal import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from text2img.databases import CompletedPrompt, Failure, Run


_MAX_LENGTH: Final = 10_000
"""Characters of a text that are shown."""
_MAX_MEMBERS: Final = 100
"""Members of an object or list that are shown, images and tries as well."""
_MAX_DEPTH: Final = 4

ImageEntry = dict[str, Any]


def completed_item(prompt: CompletedPrompt, image_entry: Callable[[str], ImageEntry]) -> dict[str, Any]:
    """Return the item of a completed prompt; ``image_entry(url)`` returns the entry of one of its images."""
    item = {
        **_prompt_fields(prompt.id, prompt.text, prompt.dataset_id, prompt.run_id),
        "at": _moment(prompt.completed_at),
        "pictures": [image_entry(url) for url in prompt.image_urls[:_MAX_MEMBERS]],
        "used": plain(prompt.used),
    }
    if any(score is not None for score in prompt.scores):
        item["scores"] = plain(prompt.scores)
    if prompt.evaluation:
        item["evaluation"] = plain(prompt.evaluation)
    if prompt.iterations:
        item["iterations"] = prompt.iterations
    if prompt.tries:
        item["tries"] = [_try(entry, image_entry) for entry in prompt.tries[:_MAX_MEMBERS]]
    return item


def failure_item(failure: Failure) -> dict[str, Any]:
    """Return the item of a prompt that failed permanently; only these have a ``code``."""
    return {
        **_prompt_fields(failure.id, failure.text, failure.dataset_id, failure.run_id),
        "at": _moment(failure.failed_at),
        "code": plain(failure.code),
        "sentence": plain(failure.message),
        "attempts": failure.attempts,
    }


def run_item(run: Run) -> dict[str, Any]:
    """Return a run's figures; ``dollars`` is the cost of 1,000 images, None without a price."""
    return {
        "id": plain(run.id),
        "started": _moment(run.started_at),
        "finished": _moment(run.finished_at),
        "status": plain(state_of(run)),
        "model": plain(run.model) if run.model else None,
        "host": plain(run.host),
        "completed": run.completed,
        "failed": run.failed,
        "images": run.images,
        "pace": run.images_per_second,
        "steady": run.steady_images_per_second,
        "busy": run.device_busy,
        "memory": run.peak_memory,
        "dollars": run.dollars_per_1000_images,
        "seconds": {plain(str(name)): number_of(seconds) for name, seconds in _limited(run.seconds.items())},
    }


def plain(value: object, depth: int = 0) -> Any:
    """Return the value as JSON types; long values are cut, and deep ones and other types become text.

    Controls and changes of direction in a text are escaped, so that it cannot look like another; its line
    breaks stay.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) and abs(value) < 2**53 else str(value)
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        return {plain(str(name)): plain(member, depth + 1) for name, member in _limited(value.items())}
    if isinstance(value, list | tuple) and depth < _MAX_DEPTH:
        return [plain(member, depth + 1) for member in _limited(value)]
    text = value if isinstance(value, str) else _moment(value) if isinstance(value, datetime) else str(value)
    return None if text is None else _visible(text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…")


def _visible(text: str) -> str:
    return text if text.isprintable() else "\n".join(map(escape, text.replace("\r\n", "\n").split("\n")))


def _prompt_fields(prompt_id: object, text: str, dataset: str | None, run: str | None) -> dict[str, Any]:
    return {"id": plain(str(prompt_id)), "text": plain(text), "dataset": plain(dataset), "run": plain(run)}


def _try(entry: Mapping[str, object], image_entry: Callable[[str], ImageEntry]) -> dict[str, Any]:
    url = entry.get("image_url")
    fields = {name: plain(entry[name]) for name in ("iteration", "seed", "score", "prompt") if name in entry}
    image = {"picture": image_entry(url)} if isinstance(url, str) and url else {}
    return {**fields, **image, "best": entry.get("best") is True}


def _limited(members: Iterable[Any]) -> list[Any]:
    return [member for member, _ in zip(members, range(_MAX_MEMBERS), strict=False)]


def _moment(moment: datetime | None) -> str | None:
    try:
        return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError:  # a time of the year 1 or 9999 in another time zone
        return None


_PLAIN: Final = re.compile(r"[!-~]+")
"""Neither spaces nor control characters, which browsers drop before they read a URL's scheme."""
_BUCKET: Final = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220})/(.+)", re.DOTALL)
_AUTHENTICATED_GCS: Final = "https://storage.cloud.google.com/"
"""Cloud Storage's address for objects that need a login; browsers do not open gs:// URLs."""


def link_of(url: str, folder: Path) -> str | None:
    """Return the link to an image's URL for a page in ``folder`` (absolute), None if there is none.

    ``https://`` and ``s3://`` URLs are kept, ``gs://`` becomes Google's page for the object, and a local file
    its path relative to the page.
    """
    try:
        if url.startswith("https://"):
            return url if _PLAIN.fullmatch(url) and "\\" not in url and urlsplit(url).hostname else None
        if named := _BUCKET.fullmatch(url):
            scheme, bucket, path = named.groups()
            return f"{_AUTHENTICATED_GCS if scheme == 'gs' else 's3://'}{bucket}/{quoted(path)}"
        if url.startswith("/") and url.lower().endswith(ENDINGS) and "\0" not in url:
            path = quote(os.path.relpath(url, folder).encode("utf-8", "surrogateescape"))
            return path if path.startswith("../") else f"./{path}"
    except ValueError:  # a lone surrogate, or an invalid host
        return None
    return None


log = logging.getLogger(__name__)

_LOG_INTERVAL: Final = 1000
"""Prompts between log lines about progress."""
_MAX_CONCURRENCY: Final = 8
"""Prompts whose images are read in parallel: most of the time is spent waiting for the storage."""
_MAX_AHEAD: Final = 3 * _MAX_CONCURRENCY
"""Prompts that may be held in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """The content of a report: ``what`` it covers in words, prompts, failures, and runs, the newest first.

    ``made`` and ``failures`` are iterated once. ``waiting`` counts prompts, None if it does not apply.
    """

    what: str
    made: Iterable[CompletedPrompt]
    failures: Iterable[Failure]
    runs: Sequence[Run]
    waiting: int | None = None


@dataclass(slots=True)
class ReportStats:
    """Statistics of a written report. ``unreadable`` images have a reason instead; ``size`` is in bytes."""

    prompts: int = 0
    images: int = 0
    unreadable: int = 0
    failures: int = 0
    size: int = field(default=0)


def write_report(
    name: str,
    contents: ReportData,
    read: Callable[[str], bytes],
    locate: Callable[[str], str] = identity,
) -> ReportStats:
    """Write the report atomically; ``read(url)`` returns an image's bytes, or raises ObjectUnreadable.

    ``locate(url)`` returns the URL at which the image is now, for the links.

    Raises ConfigurationError if the file cannot be written, and what the iterables in ``contents`` raise.
    """
    target = expand_home(name, "--html").absolute()

    def link(url: str) -> str | None:
        return link_of(locate(url), target.parent)

    temporary, stats = target.with_name(f".text2img-{secrets.token_hex(8)}.html"), ReportStats()
    try:
        with temporary.open("x", encoding="utf-8") as file, quiet():
            data = _page_data(contents, stats, lambda prompt: _prepared(prompt, link, read))
            file.writelines(page(data, lambda: _summary(contents, stats)))
        stats.size = temporary.stat().st_size
        temporary.replace(target)
    except OSError as exc:
        raise ConfigurationError(f"--html {name} cannot be written: {exc.strerror}") from exc
    finally:
        with suppress(OSError):
            temporary.unlink()
    return stats


def _page_data(
    contents: ReportData, stats: ReportStats, prepare: Callable[[CompletedPrompt], dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Yield the page's items and thumbnails with their kind, and count them in ``stats``."""
    thumbnails = count()
    for item in _prepared_ahead(contents.made, prepare):
        for entry in _image_entries(item):
            if isinstance(url := entry.get("thumbnail"), str):
                entry["thumbnail"] = next(thumbnails)
                yield "thumbnails", url
        stats.prompts += 1
        stats.images += len(item["pictures"])
        stats.unreadable += sum("thumbnail" not in entry for entry in item["pictures"])
        yield "items", item
        if stats.prompts % _LOG_INTERVAL == 0:
            log.info("%s prompts are in the report so far", f"{stats.prompts:,}")
    for failure in contents.failures:
        stats.failures += 1
        yield "items", failure_item(failure)


def _summary(contents: ReportData, stats: ReportStats) -> dict[str, Any]:
    about = {"what": contents.what, "written": datetime.now(UTC).isoformat(timespec="seconds")}
    runs = [run_item(run) for run in contents.runs]
    return {"about": about, "figures": _figures(stats, contents, runs), "runs": runs}


def _prepared_ahead(
    prompts: Iterable[CompletedPrompt], prepare: Callable[[CompletedPrompt], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield each prompt's item, in order, while threads prepare the next ones."""
    pool = ThreadPoolExecutor(_MAX_CONCURRENCY, thread_name_prefix="thumbnails")
    pending: deque[Any] = deque()
    try:
        for prompt in prompts:
            pending.append(pool.submit(prepare, prompt))
            if len(pending) >= _MAX_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepared(
    prompt: CompletedPrompt, link: Callable[[str], str | None], read: Callable[[str], bytes]
) -> dict[str, Any]:
    """Return the prompt's item, with thumbnails as URLs. An image that occurs twice has one entry."""
    entries: dict[str, dict[str, Any]] = {}

    def image_entry(url: str) -> dict[str, Any]:
        if url not in entries:
            entries[url] = _image_entry(url, link(url), read)
        return entries[url]

    return completed_item(prompt, image_entry)


def _image_entry(url: str, href: str | None, read: Callable[[str], bytes]) -> dict[str, Any]:
    entry: dict[str, Any] = {"url": plain(url[:2000]), "href": href}
    try:
        small = thumbnail(read(url))
    except ObjectUnreadable as exc:
        return {**entry, "reason": plain(str(exc))}
    return {**entry, "thumbnail": small.url, "size": small.size, "mark": small.mark}


def _image_entries(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from item["pictures"]
    yield from (entry["picture"] for entry in item.get("tries", ()) if "picture" in entry)


def _figures(
    stats: ReportStats, contents: ReportData, runs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the names and values of the headline figures."""
    figures = [("images", f"{stats.images:,}")]
    if stats.prompts != stats.images:
        figures.append(("prompts", f"{stats.prompts:,}"))
    figures.append(("failed", f"{stats.failures:,}"))
    if contents.waiting is not None:
        figures.append(("waiting", f"{contents.waiting:,}"))
    speeds = [run["pace"] for run in runs if run["pace"]]
    if speeds:
        figures.append(("images/s, latest run" if len(runs) > 1 else "images/s", f"{speeds[0]:,.2f}"))
    cost = next((run["dollars"] for run in runs if run["dollars"] is not None), None)
    if cost is not None:
        figures.append(("for 1,000 images", f"${cost:,.2f}"))
    return [
        {"name": name, "value": value, "bad": name == "failed" and value != "0"} for name, value in figures
    ]
