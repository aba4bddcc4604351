"""A report of 2,000 pictures, in a real browser: what opening, scrolling and searching make the page do.

The page's work is counted, in layouts and in images held, which is the same on every machine. How long it
takes is printed, and asserted nowhere: docs/report.md keeps figures.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from tests.acceptance import nights, product

PICTURES = 2000
STEP = 300  # pixels a frame: at 60 frames a second all of it passes in five seconds
SCROLL = """
const [step, done] = arguments;
const frames = [];
let last = performance.now();
requestAnimationFrame(function next(now) {
  frames.push(now - last);
  last = now;
  const before = scrollY;
  scrollBy(0, step);
  if (scrollY > before) requestAnimationFrame(next);
  else done(frames.sort((a, b) => a - b));
});
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The file, made by the command of 2,000 prompts that share forty pictures."""
    folder = tmp_path_factory.mktemp("large")
    made = nights.Nights(folder)
    urls = [made.image(f"p{n}", (n * 6, 200 - n * 5, n * 3)) for n in range(40)]
    rows = [
        (n, f"picture {n} of a boat", "completed", urls[n % 40], json.dumps({**nights.USED, "seed": n}))
        for n in range(PICTURES)
    ]
    insert = "INSERT INTO datasets (_id, text, status, image_url, used) VALUES (?, ?, ?, ?, ?)"
    with closing(sqlite3.connect(folder / "prompts.db")) as connection, connection:
        connection.executemany(insert, rows)
    finished = product.run("report", "--database", "sqlite:///prompts.db", folder=folder)
    assert finished.stdout.startswith("report.html: 2,000 images of 2,000 prompts, 0 failed"), finished.stderr
    return folder / "report.html"


def _metrics(browser):
    """What Chromium counts of the page: by name, since it was opened; times are the page's thread's."""
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return {each["name"]: each["value"] for each in metrics}


def _held(browser):
    return browser.run("return document.querySelectorAll('.card img[src]').length")


def _laid_out(browser):
    """How many cards the page lays out; the others, far from the window, cost it nothing."""
    return browser.run(
        "return [...document.querySelectorAll('.card')]"
        ".filter((card) => card.checkVisibility({contentVisibilityAuto: true})).length"
    )


def _layouts(before, after):
    return after["LayoutCount"] - before["LayoutCount"]


def test_two_thousand_pictures_open_and_scroll_smoothly(report, browser, capsys):
    """Opening lays the page out a few times and not once a card, fast scrolling about once a frame; only
    cards near the window are laid out, only their pictures are held, and the last one is drawn.
    """
    driver = browser.driver
    driver.set_script_timeout(product.HANG)
    metrics = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.visit(report.as_uri())
    opened = _metrics(browser)
    assert opened["LayoutCount"] < 50
    assert browser.run("return document.querySelectorAll('.card').length") == PICTURES
    assert 0 < _held(browser) < 150
    assert 0 < _laid_out(browser) < 150
    begun = _metrics(browser)
    frames = driver.execute_async_script(SCROLL, STEP)
    scrolled = _metrics(browser)
    assert _layouts(begun, scrolled) < 3 * len(frames)
    browser.until(
        "const last = [...document.querySelectorAll('.card img')].at(-1); return last.naturalWidth > 0"
    )
    assert _held(browser) < 250
    assert _laid_out(browser) < 250
    assert browser.complaints() == []
    worked = (scrolled["TaskDuration"] - begun["TaskDuration"]) / len(frames)
    with capsys.disabled():
        print(  # noqa: T201 - the figures are what it is for
            f"\n2,000 pictures, {report.stat().st_size / 1e6:.1f} MB:"
            f" busy {opened['TaskDuration']:.2f} s to open,"
            f" {1000 * worked:.1f} ms a frame over {len(frames)} frames of {STEP} pixels;"
            f" a frame came every {frames[len(frames) // 2]:.0f} ms (median), {frames[-1]:.0f} at worst"
        )


def test_search_among_two_thousand_is_one_change_of_the_page(report, browser):
    """Twelve of two thousand are found by a few layouts, not one for each card, and no more are left."""
    browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.visit(report.as_uri())
    before = _metrics(browser)
    browser.run(
        "const find = document.getElementById('find'); find.value = 'picture 199';"
        "find.dispatchEvent(new Event('input'))"
    )
    browser.until("return document.getElementById('count').textContent.startsWith('12 of 2,000')")
    assert _layouts(before, _metrics(browser)) < 50
    assert browser.run("return document.querySelectorAll('.card').length") == 12
