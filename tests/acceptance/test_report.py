"""``report``, opened and used in a real browser, as whoever comes in the morning does."""

from __future__ import annotations

from urllib.parse import unquote, urljoin

import pytest
from PIL import Image

from tests.acceptance import nights, product
from tests.acceptance.product import sleeping

DATABASE = ("--database", "sqlite:///prompts.db")
CARDS = "return [...document.querySelectorAll('.card .text')].map((text) => text.textContent)"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the usual nights are reported of, by the command."""
    folder = tmp_path_factory.mktemp("nights")
    nights.usual(folder)
    finished = product.run("report", *DATABASE, folder=folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("report.html: 11 images (3 unreadable) of 9 prompts, 4")
    return folder


@pytest.fixture
def page(made, browser):
    """The page, opened anew, on a desk."""
    _window(browser, 1280, 900)
    browser.visit((made / "report.html").as_uri())
    return browser


def _window(browser, width, height, *, mobile=False):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _set(browser, field, value):
    browser.run(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))",
        field,
        value,
    )


def _choose(browser, field, label):
    value = browser.run(
        "return [...document.getElementById(arguments[0]).options]"
        ".find((option) => option.text.startsWith(arguments[1])).value",
        field,
        label,
    )
    _set(browser, field, value)


def _open(browser, text):
    browser.run(
        "[...document.querySelectorAll('.card .text')].find((text) => text.textContent === arguments[0])"
        ".closest('button').click()",
        text,
    )
    return browser.run("return document.getElementById('details').innerText")


def test_it_opens_without_a_complaint_or_a_request(page, made):
    """The console stays silent, nothing but the file is asked for, and the pictures in view are drawn."""
    page.until(
        "const image = document.querySelector('.card img'); return image.complete && image.naturalWidth"
    )
    assert page.requests() == [(made / "report.html").as_uri()]
    assert page.complaints() == []
    assert len(page.run(CARDS)) == 13
    assert "11" in page.run("return document.getElementById('figures').innerText")


def test_the_policy_lets_nothing_in(page):
    """A script, a style, a picture and a request that were not in the file are refused by the page itself."""
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.hit = 9';"
        "document.body.append(script); const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';"
        "document.body.append(image); document.body.setAttribute('onclick', 'window.hit = 8');"
        "document.body.click(); fetch('http://127.0.0.1:9/').catch(() => {})"
    )
    page.until("return true")
    assert page.run("return window.hit") is None
    refused = [each for each in page.complaints() if "Content Security Policy" in each]
    assert len(refused) >= 4


def test_search_and_filters_narrow_it(page):
    """By words anywhere, status, error code, data set, run, model and score; and back again."""
    _set(page, "find", "BOAT blue")
    page.until("return document.getElementById('count').textContent.startsWith('1 of 13')")
    assert page.run(CARDS) == ["a blue boat"]
    page.run("document.getElementById('clear').click()")
    assert len(page.run(CARDS)) == 13
    for field, label, expected in [
        ("status", "failed", 4), ("status", "completed", 9), ("status", "safety", 2),
        ("dataset", "autumn", 2), ("run", "tuesday", 2), ("model", "other", 1),
    ]:  # fmt: skip
        _choose(page, field, label)
        assert len(page.run(CARDS)) == expected, (field, label)
        page.run("document.getElementById('clear').click()")
    _set(page, "score", "0.7")
    assert sorted(page.run(CARDS)) == ["a blue boat", "a star"]
    _set(page, "order", "worst")
    assert page.run(CARDS) == ["a blue boat", "a star"]


def test_failures_stand_by_code_with_their_reason(page):
    """Each code once with how many, its sentence to be read once it is opened, and its prompts below."""
    codes = page.run("return [...document.querySelectorAll('.code summary')].map((code) => code.innerText)")
    assert codes[0].split()[:2] == ["2", "safety"]
    assert {code.split()[1] for code in codes} == {"safety", "invalid_prompt", "invalid_parameters"}
    page.run("document.querySelector('.code').open = true")
    shown = page.run("return document.querySelector('.code').innerText")
    assert nights.SAFETY in shown
    assert "a darker cellar" in shown
    page.run("document.querySelector('.code > button').click()")
    assert sorted(page.run(CARDS)) == ["a dark cellar", "a darker cellar"]
    # A card that was not drawn yet has no inner text.
    page.until("return document.querySelector('.card').innerText.includes(arguments[0])", nights.SAFETY)


def test_hostile_texts_are_texts(page):
    """Scripts in a prompt, a parameter, a run's name and a sentence are shown as they were written, run
    nothing and become no element; a javascript: URL is shown and not linked.
    """
    assert nights.HOSTILE in page.run(CARDS)
    shown = _open(page, nights.HOSTILE)
    assert shown.count(nights.HOSTILE) == 3
    assert nights.NEGATIVE.replace("\u2028", "\\u2028") in shown.replace("\n", "")
    assert page.run("return document.querySelectorAll('main script, dialog script, [onerror]').length") == 0
    assert "javascript:window.hit=3" in _open(page, "a picture that is none")
    assert page.run("return document.querySelectorAll('#details a').length") == 0
    assert page.run("return window.hit") is None
    assert page.complaints() == []


def test_details_show_parameters_and_the_original(page, made):
    """Seed, steps, size and model; several pictures each with its own link, which leads to its file."""
    shown = _open(page, "four hills")
    for each in ("seed\n7", "steps\n20", "guidance\n3", "128 × 128", "model\nshapes", "data set\nautumn"):
        assert each in shown
    links = page.run("return [...document.querySelectorAll('#details a')].map((a) => a.getAttribute('href'))")
    assert links == [f"./pictures/4~{place}.png" for place in range(3)]
    for link in links:
        path = unquote(urljoin((made / "report.html").as_uri(), link).removeprefix("file://"))
        with Image.open(path) as image:
            assert image.size == (128, 128)
    assert page.run("return document.querySelectorAll('#details .large img').length") == 3


def test_a_prompts_tries_are_shown_with_their_scores(page):
    """Each try's picture, score and prompt, and which was the best."""
    shown = _open(page, "a star")
    for each in ("iterations\n2", "iteration 1, 0.50", "★ iteration 2, 1.00", "a yellow star"):
        assert each in shown
    assert page.run("return document.querySelectorAll('.tries img').length") == 2
    assert page.run("return document.querySelectorAll('.tries .best').length") == 1


def test_pictures_that_cannot_be_read_say_why(page):
    """One that is gone, one whose address is no place, one that is broken: a reason in its place."""
    assert "No such file" in _open(page, "a picture that is gone")
    assert "is not in a folder or bucket" in _open(page, "a picture that is none")
    assert "broken" in _open(page, "a torn picture")
    assert "some images could not be read" in page.run("return document.getElementById('count').textContent")


def test_the_keyboard_alone_will_do(page):
    """/ searches; Tab reaches one card, arrows move, Enter opens, arrows go on, Escape comes back to it."""
    from selenium.webdriver.common.keys import Keys

    page.press("/")
    page.press("boat")
    page.until("return document.getElementById('count').textContent.startsWith('2 of 13')")
    for _ in range(20):
        page.press(Keys.TAB)
        if page.run("return document.activeElement.className") == "card":
            break
    page.press(Keys.ARROW_RIGHT)
    assert page.run("return document.activeElement.textContent") == "0.25no marka red boat"
    page.press(Keys.ENTER)
    assert page.run("return document.getElementById('details').open")
    assert page.run("return document.getElementById('details-title').textContent") == "a red boat"
    page.press(Keys.ARROW_LEFT)
    assert page.run("return document.getElementById('details-title').textContent") == "a blue boat"
    page.press(Keys.ESCAPE)
    page.until("return !document.getElementById('details').open")
    page.until("return document.activeElement.textContent.includes('a blue boat')")


def test_light_and_dark_by_the_system_and_by_choice(page):
    """The paper is light or dark as the system says, and the button says otherwise."""
    paper = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    found = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        found.append(page.run(paper))
    assert found[0] > 200
    assert found[1] < 50
    page.run("document.getElementById('theme').click()")
    assert page.run(paper) > 200
    page.run("document.getElementById('theme').click(); document.getElementById('theme').click()")


def test_it_fits_a_phone(page, made):
    """390 pixels wide: nothing sticks out, two pictures in a row, filters behind a button, details whole."""
    _window(page, 390, 844, mobile=True)
    page.visit((made / "report.html").as_uri())
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    assert page.run(wide) == [390, 390]
    grid = "return getComputedStyle(document.querySelector('.block')).gridTemplateColumns.split(' ').length"
    assert page.run(grid) == 2
    assert not page.run("return document.getElementById('narrow').checkVisibility()")
    page.run("document.getElementById('more').click()")
    assert page.run("return document.getElementById('narrow').checkVisibility()")
    _open(page, "four hills")
    assert page.run("return document.getElementById('details').getBoundingClientRect().width") == 390
    assert page.run(wide) == [390, 390]


def test_runs_are_plotted_and_choose_their_pictures(page):
    """A bar for each run, as high as its pace; the stages' seconds, what a run cost; a bar shows the run's
    pictures alone.
    """
    heights = page.run("return [...document.querySelectorAll('#pace i')].map((bar) => bar.offsetHeight)")
    assert len(heights) == 2  # and none for the run that found nothing to do
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)
    assert "3.00" in page.run("return document.getElementById('figures').innerText")
    assert "denoise" in page.run("return document.getElementById('stages').innerText")
    assert "400" in page.run("return document.getElementById('stages').innerText")
    page.run("document.querySelectorAll('#pace button')[1].click()")
    assert sorted(page.run(CARDS)) == ["a green hill", "a star"]
    assert "200" in page.run("return document.getElementById('stages').innerText")
    assert "25.00" in page.run("return document.getElementById('table').textContent")
    assert "$25.00" in page.run("return document.getElementById('figures').innerText")
    assert "run tuesday" in page.run("return document.getElementById('stages-of').textContent")


def test_a_runs_own_tries_and_cost_are_shown(browser, tmp_path):
    """What ``run`` itself writes of its tries, scores and price is what the report shows, from one folder."""
    (tmp_path / "p.txt").write_text("a large black square on a cyan background")
    place, model = ("--output-dir", "made"), ("--model-id", str(product.MODEL), "--evaluator", "demo")
    loop = ("--iterations", "2", "--candidates", "2", "--min-score", "1", "--num-inference-steps", "1")
    requested = (*loop, "--seed", "3", "--gpu-hour-price", "1.5")
    job = ("run", *place, *model, *requested, "--input-file", "p.txt")
    ran = sleeping.run(*job, folder=tmp_path, PAINT_GREY="1")
    assert ran.returncode == 0, ran.stderr
    assert product.run("report", *place, folder=tmp_path).returncode == 0
    _window(browser, 1280, 900)
    browser.visit((tmp_path / "report.html").as_uri())
    shown = _open(browser, "a large black square on a cyan background")
    tries = browser.run("return [...document.querySelectorAll('.tries li')].map((each) => each.innerText)")
    assert len(tries) == 4, shown
    assert sum("★" in each for each in tries) == 1
    assert browser.run("return document.querySelectorAll('.tries img').length") == len(tries)
    assert "$" in browser.run("return document.getElementById('figures').innerText")
    assert browser.complaints() == []
