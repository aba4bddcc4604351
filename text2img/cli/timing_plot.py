"""Where a run's seconds went, as bars: in a terminal or in a picture. Knows what is kept of it, no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.databases.documents import number_of
from text2img.telemetry.stats import BACKGROUND_STAGES, DEVICE_STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

    from text2img.databases import Run

_COLUMNS: Final = 40  # characters that the longest bar takes
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_WIDTH, _LEFT, _BAR, _ROW = 900, 150, 520, 30  # pixels
_BLUE, _GREY, _GREEN, _INK = "#2b6cb0", "#a0aec0", "#2f855a", "#1a202c"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the plot; one without a ``share`` (in [0, 1], of the longest bar) is a heading."""

    label: str
    colour: str = _INK
    share: float | None = None
    figure: str = ""


def spent(run: Run) -> dict[str, float]:
    """Seconds of each stage; what is no number counts as none."""
    return {stage: number_of(run.seconds.get(stage)) for stage in (*DEVICE_STAGES, *BACKGROUND_STAGES)}


def in_terminal(run: Run) -> str:
    """The plot as lines of text."""
    return "\n".join(
        f"{row.label}"
        if row.share is None
        else f"  {row.label:<12}{_bar(row.share):<{_COLUMNS}}  {row.figure}".rstrip()
        for row in _rows(run)
    )


def as_picture(run: Run) -> Image:
    """The plot as a picture, 900 pixels wide."""
    from PIL import Image, ImageDraw, ImageFont

    rows = list(_rows(run))
    picture = Image.new("RGB", (_WIDTH, _ROW * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=16)
    for place, row in enumerate(rows):
        top = _ROW * place + _ROW // 2
        if row.share is None:
            draw.text((20, top + 4), row.label, _INK, font)
            continue
        draw.text((40, top + 4), row.label, _INK, font)
        if length := round(_BAR * row.share):
            draw.rectangle((_LEFT, top + 4, _LEFT + length, top + _ROW - 6), row.colour)
        draw.text((_LEFT + _BAR + 20, top + 4), row.figure, _INK, font)
    return picture


def _rows(run: Run) -> Iterator[Row]:
    seconds = spent(run)
    whole = (run.finished_at - run.started_at).total_seconds() if run.finished_at else 0.0
    whole = max(whole, sum(seconds[stage] for stage in DEVICE_STAGES))
    longest = max(whole, *seconds.values()) or 1.0
    yield Row(f"{run.id}, {run.started_at:%Y-%m-%d %H:%M}, {run.status}: {_pace(run, whole)}")
    yield Row("the device's thread")
    for stage in DEVICE_STAGES:
        yield Row(stage, _BLUE, _within(seconds[stage] / longest), _figure(seconds[stage], whole))
    rest = whole - sum(seconds[stage] for stage in DEVICE_STAGES)
    yield Row("other", _BLUE, _within(rest / longest), _figure(rest, whole))
    yield Row("beside it, all threads together")
    for stage in BACKGROUND_STAGES:
        yield Row(stage, _GREY, _within(seconds[stage] / longest), _figure(seconds[stage], whole))
    yield Row("the device had a batch")
    for label, share in (("of the run", run.device_busy_of_run), ("first–last", run.device_busy)):
        yield Row(label, _GREEN, _within(share), f"{100 * share:.1f} %")


def _pace(run: Run, whole: float) -> str:
    steady = f" ({run.steady_images_per_second:.2f} in steady state)" if run.steady_images_per_second else ""
    return f"{run.completed:,} completed in {whole:.1f} s, {run.images_per_second:.2f} images/s{steady}"


def _figure(seconds: float, whole: float) -> str:
    return f"{seconds:,.1f} s" + (f"  {100 * seconds / whole:.0f} %" if whole else "")


def _within(share: float) -> float:
    return min(1.0, max(0.0, share))


def _bar(share: float) -> str:
    eighths = round(share * _COLUMNS * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
