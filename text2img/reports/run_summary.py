"""What a run leaves to look at in a layout of folders: its summary, a contact sheet, a histogram of scores.

They are of everything that was made in the selection, by whatever run. Knows the archive and the storage.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.databases.documents import run_fields
from text2img.images.contact_sheet import Row, Try, contact_sheets
from text2img.images.histogram import histogram
from text2img.reports.sidecars import JSON, as_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.databases import Archive, Made, Run, Selection
    from text2img.prompts.refinement import Loop
    from text2img.storage import ImageStorage

log = logging.getLogger(__name__)

MOST: Final = 600
"""Pictures on contact sheets, or a few more: each is read for them, at the end of every run."""
_PRIVATE: Final = ("host", "worker", "execution", "gpu_hour_price")
"""What a run's document says of whoever ran it; the summary may be as public as the pictures."""


class Overview:
    """Writes it, as often as there is something new; what is there from the time before is replaced.

    ``check`` is called before each picture is read, and raises what ends the run.
    """

    def __init__(self, archive: Archive, storage: ImageStorage, check: Callable[[], None]) -> None:
        self._archive, self._storage, self._check = archive, storage, check

    def write(self, run: Run, selection: Selection, loop: Loop | None) -> None:
        """Write all of it. Raises StorageFailed and DatabaseFailed."""
        self._put("summary.json", as_json(_summary(run, loop)), JSON)
        self._sheets(selection)
        self._scores(selection, loop)

    def _sheets(self, selection: Selection) -> None:
        made: list[Made] = []
        pictures = 0
        for each in self._archive.made(selection):
            if pictures >= MOST:
                log.info("the contact sheets show %d prompts; a report shows all", len(made))
                break
            made.append(each)
            pictures += len(each.tries or each.image_urls)
        rows = (self._row(each) for each in sorted(made, key=lambda each: each.id.name))
        for number, page in enumerate(contact_sheets(rows), 1):
            self._put(f"contact-sheet{f'-{number}' if number > 1 else ''}.png", page, "image/png")

    def _scores(self, selection: Selection, loop: Loop | None) -> None:
        """The best score of each prompt; nothing where no evaluator has said anything."""
        scores = [each.scores[0] if each.scores else None for each in self._archive.made(selection)]
        if any(score is not None for score in scores):
            page = histogram(scores, min_score=None if loop is None else loop.min_score)
            self._put("scores.png", page, "image/png")

    def _row(self, made: Made) -> Row:
        if made.tries:
            return Row(made.text, tuple(self._try(each) for each in made.tries))
        seed, scores = made.used.get("seed"), made.scores or (None,) * len(made.image_urls)
        return Row(
            made.text,
            tuple(
                Try(1, seed + number if isinstance(seed, int) else 0, score, False, partial(self._read, url))
                for number, (url, score) in enumerate(zip(made.image_urls, scores, strict=False))
            ),
        )

    def _try(self, said: Mapping[str, object]) -> Try:
        iteration, seed, score = (said.get(name) for name in ("iteration", "seed", "score"))
        return Try(
            iteration if isinstance(iteration, int) else 1,
            seed if isinstance(seed, int) else 0,
            float(score) if isinstance(score, int | float) else None,
            said.get("best") is True,
            partial(self._read, str(said.get("image_url"))),
        )

    def _read(self, url: str) -> bytes:
        self._check()
        return self._storage.read(url)

    def _put(self, name: str, data: bytes, kind: str) -> None:
        self._storage.put(name, data, kind, lambda: True)


def _summary(run: Run, loop: Loop | None) -> Mapping[str, object]:
    """The run as its document says it, and its loop."""
    fields = {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in run_fields(run, 0).items()
        if name not in _PRIVATE
    }
    asked = {name: getattr(loop, name) for name in ("iterations", "candidates", "min_score")} if loop else {}
    return {"run_id": run.id, **fields, **({"loop": asked} if asked else {})}
