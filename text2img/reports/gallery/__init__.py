"""A report: one HTML file that shows what was made, what failed, and how the runs went.

Knows finished prompts and runs, and how to read a picture; not where they come from. Whatever it is given may
be hostile: texts stay texts, and a picture that cannot be read is a reason in its place.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ConfigurationError, Unreadable
from text2img.reports.gallery.items import item_of_failure, item_of_made, run_item
from text2img.reports.gallery.links import link_of
from text2img.reports.gallery.page import Page
from text2img.reports.gallery.thumbnails import quiet, thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from text2img.databases import Failure, Made, Run

log = logging.getLogger(__name__)

_TOLD_EVERY: Final = 1000
"""Prompts after which whoever waits hears that it goes on."""
_AT_ONCE: Final = 8
"""Prompts whose pictures are read at the same time: a bucket's answers are waited for, not computed."""
_AHEAD: Final = 3 * _AT_ONCE
"""Prompts that may be held in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a report is of: ``what`` in words, the newest of ``runs`` first, and how many prompts wait, None
    where that means nothing. ``made`` and ``failures`` are gone through once.
    """

    what: str
    made: Iterable[Made]
    failures: Iterable[Failure]
    runs: Sequence[Run]
    waiting: int | None = None


@dataclass(slots=True)
class Written:
    """What came to stand in it. ``unreadable`` pictures are in it with a reason; ``size`` in bytes."""

    prompts: int = 0
    pictures: int = 0
    unreadable: int = 0
    failures: int = 0
    size: int = field(default=0)


def write_report(name: str, contents: Contents, read: Callable[[str], bytes]) -> Written:
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


def _write(page: Page, contents: Contents, prepare: Callable[[Made], dict[str, Any]]) -> Written:
    written = Written()
    for item in _ahead(contents.made, prepare):
        for picture in _pictures(item):
            if isinstance(url := picture.get("thumbnail"), str):
                picture["thumbnail"] = page.thumbnail(url)
        written.prompts += 1
        written.pictures += len(item["pictures"])
        written.unreadable += sum("thumbnail" not in picture for picture in item["pictures"])
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


def _ahead(made: Iterable[Made], prepare: Callable[[Made], dict[str, Any]]) -> Iterator[dict[str, Any]]:
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


def _prepared(made: Made, folder: Path, read: Callable[[str], bytes]) -> dict[str, Any]:
    """The prompt's item, with its thumbnails in it still. A picture that it names twice is one."""
    seen: dict[str, dict[str, Any]] = {}

    def picture(url: str) -> dict[str, Any]:
        if url not in seen:
            seen[url] = _picture(url, link_of(url, folder), read)
        return seen[url]

    return item_of_made(made, picture)


def _picture(url: str, href: str | None, read: Callable[[str], bytes]) -> dict[str, Any]:
    shown: dict[str, Any] = {"url": url[:2000], "href": href}
    try:
        small = thumbnail(read(url))
    except Unreadable as exc:
        return {**shown, "reason": str(exc)}
    return {**shown, "thumbnail": small.url, "size": small.size}


def _pictures(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from item["pictures"]
    yield from (each["picture"] for each in item.get("tries", ()) if "picture" in each)


def _figures(written: Written, contents: Contents, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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
