"""What a report is made of: hostile documents, pictures of any kind, in no more memory than it needs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from text2img.databases import CompletedPrompt, Failure, Run
from text2img.errors import ConfigurationError, ObjectUnreadable
from text2img.prompts import PromptId
from text2img.reports.gallery import ReportData, link_of, plain, run_item, write_report
from text2img.reports.gallery.page import SIDE, page, quiet, thumbnail

NOW = datetime(2026, 5, 4, tzinfo=UTC)
HERE = Path("/data/reports")


def _made(number, **fields):
    given = {"text": "a boat", "dataset_id": None, "run_id": "r", "completed_at": NOW, "used": {}}
    urls = (f"gs://b/{number}.png",)
    return CompletedPrompt(id=PromptId("int", str(number)), **{**given, "image_urls": urls, **fields})


def _failure(number):
    given = {"text": "a boat", "dataset_id": None, "run_id": "r", "attempts": 1, "failed_at": NOW}
    return Failure(id=PromptId("int", str(number)), code="safety", message="flagged", **given)


def _run(**fields):
    return Run(id="r", started_at=NOW, host="h", **fields)


def _file(size=(64, 48), kind="PNG", mode="RGB"):
    written = io.BytesIO()
    Image.new(mode, size, 90).save(written, kind)
    return written.getvalue()


def _write(path, made=(), failures=(), runs=(), read=lambda url: _file()):
    return write_report(str(path), ReportData(what="x", made=made, failures=failures, runs=runs), read)


def _scripts(text, kind):
    begin = f'<script type="application/json" {kind}>'
    return [json.loads(part.split("</script>")[0]) for part in text.split(begin)[1:]]


@pytest.mark.parametrize(
    ("url", "link"),
    [
        ("https://storage.googleapis.com/b/7%20x.png", "https://storage.googleapis.com/b/7%20x.png"),
        ("gs://pictures/a b/7#.png", "https://storage.cloud.google.com/pictures/a%20b/7%23.png"),
        ("s3://pictures/a/7.png", "s3://pictures/a/7.png"),
        ("/data/reports/p/7.png", "./p/7.png"),
        ("/data/p q/javascript:7.PNG", "../p%20q/javascript%3A7.PNG"),
        ("/data/reports/javascript:alert(1).png", "./javascript%3Aalert%281%29.png"),
        ("/etc/passwd", None),
        ("/data/\0.png", None),
        ("javascript:alert(1)", None),
        ("JavaScript:alert(1)//.png", None),
        (" https://example.com/7.png", None),
        ("java\nscript:alert(1)", None),
        ("https://", None),
        ("https:///7.png", None),
        ("https://[x/7.png", None),
        ("https://example.com\\@evil.example/7.png", None),
        ("https://example.com/\u202e7.png", None),
        ("http://example.com/7.png", None),
        ("data:text/html,<script>alert(1)</script>", None),
        ("file:///etc/passwd.png", None),
        ("gs://Bucket!/7.png", None),
        ("gs://pictures/\ud800.png", None),
        ("7.png", None),
        ("", None),
    ],
)
def test_only_harmless_places_are_linked(url, link):
    """https, gs, s3 and a picture's file, each encoded; every other URL is no link."""
    assert link_of(url, HERE) == link


@pytest.mark.parametrize(
    "text", ["</script><b>", "<!--<script>", "]]>", "{{ 7 * 7 }}", "\u2028\ud800 \U0001f305"]
)
def test_no_text_ends_its_script(text):
    """Data on the page is ASCII without <, gives back what went in, and is in the order in which it came."""
    written = "".join(page([("items", {"text": text, "a": 1})], lambda: {"what": text}))
    (data,) = _scripts(written, 'class="items"')
    assert [list(item.items()) for item in data] == [[("text", text), ("a", 1)]]
    assert _scripts(written, 'id="summary"') == [{"what": text}]
    for element in written.split('<script type="application/json" ')[1:]:
        content = element.partition(">")[2].partition("\n")[0].removesuffix("</script>")
        assert content.isascii()
        assert "<" not in content


def test_the_policy_allows_the_pages_own_style_and_script_and_no_other():
    """The hashes in the policy are those of the style and of the script that the page has."""
    written = "".join(page([], dict))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', written)
    for name, begin in (("style", "<style>"), ("script", "<script>")):
        content = written.partition(begin)[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert re.findall(rf"{name}-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert policy.startswith("default-src 'none'; img-src data:; ")


def test_a_page_is_written_while_its_data_comes():
    """A group of thumbnails is on the page before the next value is asked for; the summary comes last."""
    seen = []

    def data():
        for number in range(70):
            seen.append(number)
            yield "thumbnails", f"data:{number}"

    pieces = page(data(), lambda: {"seen": len(seen)})
    first = next(piece for piece in pieces if "data:0" in piece)
    assert "data:31" in first
    assert len(seen) == 32
    assert '{"seen":70}' in "".join(pieces)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "nan"), (math.inf, "inf"), (2**60, str(2**60)), (True, True), (7, 7), (0.5, 0.5),
        (b"\xff", "b'\\xff'"),
        (NOW, "2026-05-04T00:00:00+00:00"), (datetime.max.replace(tzinfo=UTC), None), ("x" * 20_000, None),
        ({1: [[[[[1]]]]]}, None), (list(range(500)), None), ({"__proto__": 1}, {"__proto__": 1}),
    ],
)  # fmt: skip
def test_every_value_becomes_plain_json_of_bounded_size(value, said):
    """Numbers that JSON lacks, bytes, moments, deep and long ones: all can be written, none is endless."""
    found = plain(value)
    assert len(json.dumps(found, allow_nan=False)) < 12_000
    if said is not None:
        assert found == said


def test_a_run_is_shown_with_whatever_it_has():
    """A run without figures, and one whose stages hold no numbers, are items all the same."""
    assert run_item(_run())["dollars"] is None
    odd = run_item(_run(seconds={"denoise": "long", "load": 2, 3: math.inf}))
    assert odd["seconds"] == {"denoise": 0, "load": 2, "3": 0}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("PNG", "I;16"), ("PNG", "1"),
     ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")],
)  # fmt: skip
def test_pictures_of_all_kinds_have_thumbnails(kind, mode):
    """Whatever its mode, a PNG, JPEG or WebP has a small WebP of its proportions, and its size is known."""
    small = thumbnail(_file((800, 400), kind, mode))
    assert small.size == (800, 400)
    with Image.open(io.BytesIO(base64.b64decode(small.url.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("WEBP", (SIDE, SIDE // 2))


def test_what_is_no_picture_says_so():
    """Nothing, text, a torn picture, another format, and one of too many pixels: each has its reason."""
    whole = _file((300, 300), "JPEG")
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    vast = bytearray(_file((8, 8)))
    vast[16:24] = (30_000).to_bytes(4, "big") * 2  # what its header claims
    for data in (b"", b"text", whole[: len(whole) // 2], gif.getvalue(), bytes(vast)):
        with quiet(), pytest.raises(ObjectUnreadable, match=r"not a readable image|too many"):
            thumbnail(data)


def test_the_page_holds_each_thing_once(tmp_path):
    """Items in order with their thumbnails' numbers, failures, and what is said of all of it; a picture that
    a prompt names twice is read once.
    """
    read = []

    def reading(url):
        read.append(url)
        if url.endswith("3.png"):
            raise ObjectUnreadable("it is gone")
        return _file()

    tries = ({"iteration": 1, "image_url": "gs://b/1.png", "score": 1.0, "best": True}, {"image_url": 7})
    made = [_made(1, tries=tries, iterations=1, scores=(1.0,)), _made(2, scores=(None,)), _made(3)]
    written = _write(tmp_path / "r.html", made, [_failure(4)], [_run()], reading)
    assert (written.prompts, written.images, written.unreadable, written.failures) == (3, 3, 1, 1)
    text = (tmp_path / "r.html").read_text("utf-8")
    (items,) = _scripts(text, 'class="items"')
    (thumbnails,) = _scripts(text, 'class="thumbnails"')
    (summary,) = _scripts(text, 'id="summary"')
    assert sorted(read) == ["gs://b/1.png", "gs://b/2.png", "gs://b/3.png"]
    assert len(thumbnails) == 2
    shown = [(item["id"], [each.get("thumbnail") for each in item.get("pictures", ())]) for item in items]
    assert shown == [("1", [0]), ("2", [1]), ("3", [None]), ("4", [])]
    assert items[0]["tries"][0]["picture"]["thumbnail"] == 0
    assert "picture" not in items[0]["tries"][1]
    assert items[2]["pictures"][0]["reason"] == "it is gone"
    assert "scores" not in items[1]
    assert items[1]["pictures"][0]["mark"] is None
    assert (items[3]["code"], items[3]["sentence"]) == ("safety", "flagged")
    assert [figure["value"] for figure in summary["figures"][:2]] == ["3", "1"]
    assert len(summary["runs"]) == 1


def test_nothing_but_the_report_stays_and_nothing_when_it_fails(tmp_path):
    """A report replaces the one before; one that breaks in the midst leaves that, and no other file."""
    _write(tmp_path / "r.html", [_made(1)])
    first = (tmp_path / "r.html").read_bytes()

    def breaking():
        yield _made(1)
        raise RuntimeError("the database went away")

    with pytest.raises(RuntimeError):
        _write(tmp_path / "r.html", breaking())
    assert (tmp_path / "r.html").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(ConfigurationError, match=r"--html .*cannot be written"):
        _write(tmp_path / "no" / "r.html")


def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """Three times as many pictures are written within the same memory, give or take a quarter."""
    data = io.BytesIO()
    Image.effect_noise((128, 128), 90).save(data, "PNG")
    peaks = []
    _write(tmp_path / "r.html", (_made(n) for n in range(50)), read=lambda url: data.getvalue())
    for count in (60, 180):
        tracemalloc.start()
        try:
            _write(tmp_path / "r.html", (_made(n) for n in range(count)), read=lambda url: data.getvalue())
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0], peaks


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("a\u2066b\u2069 \u200f", r"a\u2066b\u2069 \u200f"),
        ("\x1b[31mred\x07\x00", r"\x1b[31mred\x07\x00"),
        ("two\r\nlines\nand\u2028a third", "two\nlines\nand\\u2028a third"),
        ("half \ud83d of a pair", r"half \ud83d of a pair"),
        ("👩\u200d🎨 می\u200cخواهم", "👩\u200d🎨 می\u200cخواهم"),
    ],
)
def test_no_text_of_a_document_turns_what_stands_beside_it(tmp_path, text, shown) -> None:
    """Controls and changes of direction are shown escaped, in every field; line breaks and the joiners that
    emoji and Persian need stay.
    """
    page_file = tmp_path / "report.html"
    made = _made(1, text=text, dataset_id=text, used={text: [text]}, image_urls=(text,))
    _write(page_file, [made], [replace(_failure(2), code=text, message=text)], [replace(_run(), model=text)])
    written = page_file.read_text("utf-8")
    (items,) = _scripts(written, 'class="items"')
    good, bad = sorted(items, key=lambda item: "code" in item)
    assert {good["text"], good["dataset"], *good["used"], good["pictures"][0]["url"]} == {shown}
    assert good["used"][shown] == [shown]
    assert {bad["code"], bad["sentence"]} == {shown}
    (summary,) = _scripts(written, 'id="summary"')
    assert summary["runs"][0]["model"] == shown
