"""Where a run's time went, drawn from what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree as ET

import pytest

from text2img.cli.timing_plot import _rows, as_image, file_content, in_terminal
from text2img.databases import Run
from text2img.images.contact_sheet import drawable

BEGAN = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
RUN = Run(
    id="night",
    started_at=BEGAN,
    finished_at=BEGAN + timedelta(seconds=80),
    host="h",
    status="completed",
    completed=1200,
    images_per_second=15.0,
    steady_images_per_second=16.0,
    device_busy=1.0,
    device_busy_of_run=0.5,
    seconds={"load": 10.0, "denoise": 30.0, "decode": 10.0, "wait": 20.0, "claim": 1.0, "upload": 160.0},
)

SVG = "{http://www.w3.org/2000/svg}"


def _bars(run):
    """The length in characters of each row's bar, a part of one as that part."""
    rows = [line for line in in_terminal(run) if line.startswith("  ")]
    eighths = {"█": 8} | {char: number for number, char in enumerate(" ▏▎▍▌▋▊▉")}
    return {row[2:14].strip(): sum(eighths[char] for char in row[14:54]) / 8 for row in rows}


def test_bars_are_as_long_as_the_time():
    """160 s of uploads on many threads are the longest bar, 40 characters; all others in proportion."""
    bars = _bars(RUN)
    assert (bars["upload"], bars["denoise"], bars["wait"], bars["load"]) == (40, 7.5, 5, 2.5)
    assert (bars["compile"], bars["claim"], bars["other"]) == (0, 0.25, 2.5)
    assert (bars["of the run"], bars["first–last"]) == (20, 40)


def test_figures_stand_beside_the_bars():
    """Seconds, their share of the run, the pace."""
    text = "\n".join(in_terminal(RUN))
    assert "night, 2026-11-21 09:00, completed: 1,200 completed in 80.0 s, 15.00 images/s" in text
    assert "(16.00 in steady state)" in text
    assert "30.0 s  38 %" in text


@pytest.mark.parametrize(
    "run",
    [
        Run(id="r", started_at=BEGAN, host="h"),
        Run(id="r", started_at=BEGAN, host="h", finished_at=BEGAN, seconds={"load": "long", "claim": None}),
        Run(id="r", started_at=BEGAN, host="h", device_busy=7.0, seconds={"wait": -3.0, "upload": 1.0}),
    ],
)
def test_a_run_of_any_kind_is_drawn(run):
    """One that made nothing, is not over, or whose document another program has changed."""
    assert in_terminal(run)
    assert as_image(run).size[0] == 900


def test_the_picture_shows_the_same_bars():
    """In the picture, too, a bar is as long as its time: denoising takes three times as long as loading."""
    image = as_image(RUN)
    blue = (0x2B, 0x6C, 0xB0)
    rows = range(27, image.height, 30)
    lengths = [sum(image.getpixel((x, y)) == blue for x in range(150, 671)) for y in rows]
    bars = [length for length in lengths if length]
    assert len(bars) == 5  # load, denoise, decode, wait, other: nothing was compiled
    assert bars[1] == pytest.approx(3 * bars[0], abs=3)


def test_a_file_has_the_format_of_its_ending():
    """PNG, PDF and SVG begin as such, text is what the terminal shows."""
    assert file_content(RUN, ".png").startswith(b"\x89PNG")
    assert file_content(RUN, ".pdf").startswith(b"%PDF")
    assert file_content(RUN, ".txt").decode().splitlines() == in_terminal(RUN)
    assert file_content(RUN, ".svg").startswith(b"<svg")


def test_an_svg_has_the_same_bars_and_texts():
    """The widths are in proportion to the times, and whatever the run is called, it is valid XML."""
    evil = replace(RUN, id='<night> & \x1b[31m\u202e"')
    root = ET.fromstring(file_content(evil, ".svg"))  # noqa: S314 - it is our own
    widths = [float(bar.get("width")) for bar in root.iter(f"{SVG}rect") if bar.get("fill") == "#2b6cb0"]
    load, _, denoise, *_ = widths
    assert denoise == pytest.approx(3 * load, abs=0.02)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0].startswith(r"<night> & \x1b[31m\u202e")
    assert "30.0 s  38 %" in texts


def test_every_character_of_the_image_has_a_glyph():
    """The font draws all labels and figures: none is replaced by a box."""
    texts = [text for row in _rows(RUN) for text in (row.label, row.figure)]
    assert [drawable(text) for text in texts] == [" ".join(text.split()) for text in texts]
