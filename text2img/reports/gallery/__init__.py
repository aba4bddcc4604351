"""Finished prompts and runs as the page's script reads them: plain JSON, nothing trusted, nothing endless."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from text2img.databases.documents import number_of, state_of
from text2img.errors import ConfigurationError, ObjectUnreadable
from text2img.prompts.ids import quoted
from text2img.reports.gallery.page import Page, quiet, thumbnail
from text2img.storage import ENDINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Failure, Run


_LONGEST: Final = 10_000
"""Characters of a text that are shown."""
_MANY: Final = 100
"""Members of an object or list that are shown, pictures and tries as well."""
_DEEPEST: Final = 4

Picture = dict[str, Any]


def item_of_made(made: CompletedPrompt, image: Callable[[str], Picture]) -> dict[str, Any]:
    """A completed prompt. ``picture(url)`` says what is to be shown of one of its pictures."""
    item = {
        **_of(made.id, made.text, made.dataset_id, made.run_id),
        "at": _moment(made.completed_at),
        "pictures": [image(url) for url in made.image_urls[:_MANY]],
        "used": plain(made.used),
    }
    if any(score is not None for score in made.scores):
        item["scores"] = plain(made.scores)
    if made.evaluation:
        item["evaluation"] = plain(made.evaluation)
    if made.iterations:
        item["iterations"] = made.iterations
    if made.tries:
        item["tries"] = [_try(each, image) for each in made.tries[:_MANY]]
    return item


def item_of_failure(failure: Failure) -> dict[str, Any]:
    """A prompt that failed for good; whatever has a ``code`` is one."""
    return {
        **_of(failure.id, failure.text, failure.dataset_id, failure.run_id),
        "at": _moment(failure.failed_at),
        "code": plain(failure.code),
        "sentence": plain(failure.message),
        "attempts": failure.attempts,
    }


def run_item(run: Run) -> dict[str, Any]:
    """A run's figures; ``dollars`` are those of a thousand images, None where nobody said a price."""
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
        "seconds": {plain(str(name)): number_of(seconds) for name, seconds in _first(run.seconds.items())},
    }


def plain(value: object, depth: int = 0) -> Any:
    """The value as JSON can say it: what is longer, deeper or of another kind than it should be is cut, or
    becomes text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) and abs(value) < 2**53 else str(value)
    if isinstance(value, dict) and depth < _DEEPEST:
        return {plain(str(name)): plain(each, depth + 1) for name, each in _first(value.items())}
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return [plain(each, depth + 1) for each in _first(value)]
    text = value if isinstance(value, str) else _moment(value) if isinstance(value, datetime) else str(value)
    return text if text is None or len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _of(prompt_id: object, text: str, dataset: str | None, run: str | None) -> dict[str, Any]:
    return {"id": plain(str(prompt_id)), "text": plain(text), "dataset": plain(dataset), "run": plain(run)}


def _try(each: Mapping[str, object], image: Callable[[str], Picture]) -> dict[str, Any]:
    url = each.get("image_url")
    shown = {name: plain(each[name]) for name in ("iteration", "seed", "score", "prompt") if name in each}
    pictured = {"picture": image(url)} if isinstance(url, str) and url else {}
    return {**shown, **pictured, "best": each.get("best") is True}


def _first(members: Iterable[Any]) -> list[Any]:
    return [each for each, _ in zip(members, range(_MANY), strict=False)]


def _moment(moment: datetime | None) -> str | None:
    try:
        return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError:  # a moment of the year 1 or 9999, in another zone's time
        return None


_PLAIN: Final = re.compile(r"[!-~]+")
"""Neither spaces nor control characters, which browsers drop before they read a URL's scheme."""
_BUCKET: Final = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,220})/(.+)", re.DOTALL)
_LOGGED_IN: Final = "https://storage.cloud.google.com/"
"""Where Cloud Storage gives an object to whoever is logged in and may read it; a browser knows no gs://."""


def link_of(url: str, folder: Path) -> str | None:
    """What the page in ``folder`` (absolute) links a picture's URL to, or None where it links it to nothing.

    ``https://`` as it stands, ``gs://`` by way of Google's own page for it, ``s3://``, and a picture's file
    by its path from the page.
    """
    try:
        if url.startswith("https://"):
            return url if _PLAIN.fullmatch(url) and "\\" not in url and urlsplit(url).hostname else None
        if named := _BUCKET.fullmatch(url):
            scheme, bucket, path = named.groups()
            return f"{_LOGGED_IN if scheme == 'gs' else 's3://'}{bucket}/{quoted(path)}"
        if url.startswith("/") and url.lower().endswith(ENDINGS) and "\0" not in url:
            path = quote(os.path.relpath(url, folder).encode("utf-8", "surrogateescape"))
            return path if path.startswith("../") else f"./{path}"
    except ValueError:  # half a surrogate pair, a host that is none
        return None
    return None


log = logging.getLogger(__name__)

_TOLD_EVERY: Final = 1000
"""Prompts after which whoever waits hears that it goes on."""
_AT_ONCE: Final = 8
"""Prompts whose pictures are read at the same time: a bucket's answers are waited for, not computed."""
_AHEAD: Final = 3 * _AT_ONCE
"""Prompts that may be held in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """What a report is of: ``what`` in words, the newest of ``runs`` first, and how many prompts wait, None
    where that means nothing. ``made`` and ``failures`` are gone through once.
    """

    what: str
    made: Iterable[CompletedPrompt]
    failures: Iterable[Failure]
    runs: Sequence[Run]
    waiting: int | None = None


@dataclass(slots=True)
class ReportStats:
    """What came to stand in it. ``unreadable`` pictures are in it with a reason; ``size`` in bytes."""

    prompts: int = 0
    pictures: int = 0
    unreadable: int = 0
    failures: int = 0
    size: int = field(default=0)


def write_report(name: str, contents: ReportData, read: Callable[[str], bytes]) -> ReportStats:
    """Write the report's file, whole or not at all. ``read(url)`` gets a picture, or raises Unreadable.

    Raises ConfigurationError where the file cannot be written, and whatever ``contents`` raise.
    """
    target = Path(name).expanduser().absolute()
    temporary = target.with_name(f".text2img-{secrets.token_hex(8)}.html")
    try:
        with temporary.open("x", encoding="utf-8") as file, quiet():
            written = _write(Page(file), contents, lambda made: _prepared(made, target.parent, read))
        written.size = temporary.stat().st_size
        temporary.replace(target)
    except OSError as exc:
        raise ConfigurationError(f"--html {name} cannot be written: {exc.strerror}") from exc
    finally:
        with suppress(OSError):
            temporary.unlink()
    return written


def _write(
    page: Page, contents: ReportData, prepare: Callable[[CompletedPrompt], dict[str, Any]]
) -> ReportStats:
    written = ReportStats()
    for item in _ahead(contents.made, prepare):
        for image in _pictures(item):
            if isinstance(url := image.get("thumbnail"), str):
                image["thumbnail"] = page.thumbnail(url)
        written.prompts += 1
        written.pictures += len(item["pictures"])
        written.unreadable += sum("thumbnail" not in image for image in item["pictures"])
        page.add(item)
        if written.prompts % _TOLD_EVERY == 0:
            log.info("%s prompts are in the report so far", f"{written.prompts:,}")
    for failure in contents.failures:
        written.failures += 1
        page.add(item_of_failure(failure))
    about = {"what": contents.what, "written": datetime.now(UTC).isoformat(timespec="seconds")}
    runs = [run_item(run) for run in contents.runs]
    page.finish({"about": about, "figures": _figures(written, contents, runs), "runs": runs})
    return written


def _ahead(
    made: Iterable[CompletedPrompt], prepare: Callable[[CompletedPrompt], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each prompt's item, in order, while those of the next few are prepared."""
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="thumbnails")
    waiting: deque[Any] = deque()
    try:
        for each in made:
            waiting.append(pool.submit(prepare, each))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepared(made: CompletedPrompt, folder: Path, read: Callable[[str], bytes]) -> dict[str, Any]:
    """The prompt's item, with its thumbnails in it still. A picture that it names twice is one."""
    seen: dict[str, dict[str, Any]] = {}

    def image(url: str) -> dict[str, Any]:
        if url not in seen:
            seen[url] = _picture(url, link_of(url, folder), read)
        return seen[url]

    return item_of_made(made, image)


def _picture(url: str, href: str | None, read: Callable[[str], bytes]) -> dict[str, Any]:
    shown: dict[str, Any] = {"url": url[:2000], "href": href}
    try:
        small = thumbnail(read(url))
    except ObjectUnreadable as exc:
        return {**shown, "reason": str(exc)}
    return {**shown, "thumbnail": small.url, "size": small.size}


def _pictures(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from item["pictures"]
    yield from (each["picture"] for each in item.get("tries", ()) if "picture" in each)


def _figures(
    written: ReportStats, contents: ReportData, runs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What stands large at the top: names and values, as they are to be read."""
    figures = [("pictures", f"{written.pictures:,}")]
    if written.prompts != written.pictures:
        figures.append(("prompts", f"{written.prompts:,}"))
    figures.append(("failed", f"{written.failures:,}"))
    if contents.waiting is not None:
        figures.append(("waiting", f"{contents.waiting:,}"))
    paces = [run["pace"] for run in runs if run["pace"]]
    if paces:
        figures.append(("images/s, latest run" if len(runs) > 1 else "images/s", f"{paces[0]:,.2f}"))
    priced = next((run["dollars"] for run in runs if run["dollars"] is not None), None)
    if priced is not None:
        figures.append(("for 1,000 images", f"${priced:,.2f}"))
    return [
        {"name": name, "value": value, "bad": name == "failed" and value != "0"} for name, value in figures
    ]
