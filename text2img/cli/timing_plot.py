"""The plot of a run's time by stage, as lines for a terminal and as a file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.databases.documents import number_of
from text2img.telemetry.progress import BACKGROUND_STAGES, DEVICE_STAGES
from text2img.telemetry.terminal import escape, shorten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

    from text2img.databases import Run

ENDINGS: Final = (".png", ".svg", ".pdf", ".txt")
"""Endings of the files that the plot can be."""
_COLUMNS: Final = 40  # characters of the longest bar
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_WIDTH, _LEFT, _BAR, _ROW, _FONT_SIZE = 900, 150, 520, 30, 12  # pixels
_BLUE, _GREY, _GREEN, _INK = "#2b6cb0", "#a0aec0", "#2f855a", "#1a202c"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the plot; ``share`` in [0, 1] is relative to the longest bar, None for a heading."""

    label: str
    colour: str = _INK
    share: float | None = None
    figure: str = ""


def spent(run: Run) -> dict[str, float]:
    """Return the seconds of each stage; a value that is not a number counts as 0."""
    return {stage: number_of(run.seconds.get(stage)) for stage in (*DEVICE_STAGES, *BACKGROUND_STAGES)}


def in_terminal(run: Run) -> list[str]:
    """Return the plot as lines of text."""
    return [
        f"{row.label}"
        if row.share is None
        else f"  {row.label:<12}{_bar(row.share):<{_COLUMNS}}  {row.figure}".rstrip()
        for row in _rows(run)
    ]


def as_image(run: Run) -> Image:
    """Return the plot as an image, 900 pixels wide."""
    from PIL import Image, ImageDraw

    from text2img.images.contact_sheet import TextLayout, drawable

    rows = list(_rows(run))
    image = Image.new("RGB", (_WIDTH, _ROW * (len(rows) + 1)), "white")
    draw, layout = ImageDraw.Draw(image), TextLayout(_FONT_SIZE)

    def write(left: int, top: int, text: str) -> None:
        layout.draw(image, (left, top), layout.cut(drawable(text), _WIDTH - left - 10), _INK)

    for index, row in enumerate(rows):
        top = _ROW * index + _ROW // 2
        if row.share is None:
            write(20, top + 4, escape(row.label))
            continue
        write(40, top + 4, row.label)
        if width := round(_BAR * row.share):
            draw.rectangle((_LEFT, top + 4, _LEFT + width, top + _ROW - 6), row.colour)
        write(_LEFT + _BAR + 20, top + 4, row.figure)
    return image


def as_svg(run: Run) -> str:
    """Return the plot as an SVG document, with the same layout as the image."""
    from html import escape as quoted

    shapes = []
    rows = list(_rows(run))
    for index, row in enumerate(rows):
        top = _ROW * index + _ROW // 2
        texts = [(20 if row.share is None else 40, escape(row.label)), (_LEFT + _BAR + 20, row.figure)]
        if row.share is not None:
            width, height = round(_BAR * row.share, 2), _ROW - 10
            shapes.append(
                f'<rect x="{_LEFT}" y="{top + 4}" width="{width}" height="{height}" fill="{row.colour}"/>'
            )
        shapes += [f'<text x="{x}" y="{top + 18}">{quoted(text)}</text>' for x, text in texts if text]
    size = f'width="{_WIDTH}" height="{_ROW * (len(rows) + 1)}"'
    style = f'font-family="sans-serif" font-size="{_FONT_SIZE}" fill="{_INK}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def file_content(run: Run, ending: str) -> bytes:
    """Return the plot as a file of one of the ENDINGS."""
    if ending == ".txt":
        return "\n".join([*map(escape, in_terminal(run)), ""]).encode()
    if ending == ".svg":
        return as_svg(run).encode()
    file = io.BytesIO()
    as_image(run).save(file, "PNG" if ending == ".png" else "PDF")
    return file.getvalue()


def _rows(run: Run) -> Iterator[Row]:
    seconds = spent(run)
    total = (run.finished_at - run.started_at).total_seconds() if run.finished_at else 0.0
    total = max(total, sum(seconds[stage] for stage in DEVICE_STAGES))
    max_seconds = max(total, *seconds.values()) or 1.0
    name, status = shorten(run.id), shorten(run.status)
    yield Row(f"{name}, {run.started_at:%Y-%m-%d %H:%M}, {status}: {_speed(run, total)}")
    yield Row("device thread")
    for stage in DEVICE_STAGES:
        yield Row(stage, _BLUE, _clamp(seconds[stage] / max_seconds), _figure(seconds[stage], total))
    rest = total - sum(seconds[stage] for stage in DEVICE_STAGES)
    yield Row("other", _BLUE, _clamp(rest / max_seconds), _figure(rest, total))
    yield Row("background threads, summed")
    for stage in BACKGROUND_STAGES:
        yield Row(stage, _GREY, _clamp(seconds[stage] / max_seconds), _figure(seconds[stage], total))
    yield Row("the device had a batch")
    for label, share in (("of the run", run.device_busy_of_run), ("first–last", run.device_busy)):
        yield Row(label, _GREEN, _clamp(share), f"{100 * share:.1f} %")


def _speed(run: Run, total: float) -> str:
    steady = f" ({run.steady_images_per_second:.2f} in steady state)" if run.steady_images_per_second else ""
    return f"{run.completed:,} completed in {total:.1f} s, {run.images_per_second:.2f} images/s{steady}"


def _figure(seconds: float, total: float) -> str:
    return f"{seconds:,.1f} s" + (f"  {100 * seconds / total:.0f} %" if total else "")


def _clamp(share: float) -> float:
    return min(1.0, max(0.0, share))


def _bar(share: float) -> str:
    eighths = round(share * _COLUMNS * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
