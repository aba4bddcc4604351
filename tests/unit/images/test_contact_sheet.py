"""Contact sheets, read back from their pixels: where pictures stand, which is marked, what is missing."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.examples import examples
from text2img.errors import Stopped, StorageFailed
from text2img.images.contact_sheet import (
    COLUMNS,
    ELLIPSIS,
    IMAGE_SIDE,
    MARGIN,
    TEXT_WIDTH,
    Candidate,
    Row,
    TextLayout,
    contact_sheets,
)

GREEN = (0x1C, 0x6B, 0x41)


def _file(colour="red", size=(64, 64), mode="RGB", kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


def _try(file=None, *, best=False, score: float | None = 0.5, seed=7):
    return Candidate(iteration=1, seed=seed, score=score, best=best, image=lambda: file or _file())


def _pages(*rows, page=20):
    return [np.asarray(Image.open(io.BytesIO(each))) for each in contact_sheets(rows, page=page)]


def _cell(page, row, column, rows):
    """The pixels of a try's picture."""
    top = row * (page.shape[0] // rows) + MARGIN
    left = TEXT_WIDTH + 2 * MARGIN + column * (IMAGE_SIDE + MARGIN)
    return page[top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]


def _middle(cell):
    return tuple(int(level) for level in cell[IMAGE_SIDE // 2, IMAGE_SIDE // 2])


def test_tries_stand_in_order_in_their_prompts_row():
    """Pictures of known colours are found where their row and number say, large and small ones alike."""
    first = [_file("red"), _file("blue", (640, 640)), _file("lime", (300, 300), kind="PNG")]
    (page,) = _pages(Row("one", tuple(map(_try, first))), Row("two", (_try(_file("yellow")),)))
    seen = [_middle(_cell(page, 0, column, 2)) for column in range(3)]
    assert seen == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert _middle(_cell(page, 1, 0, 2)) == (255, 255, 0)
    assert _middle(_cell(page, 1, 1, 2)) == (255, 255, 255)


def test_the_best_is_marked_by_a_frame_and_a_word():
    """The best one, and no other, has a thick frame and a label with light letters in its corner."""
    (page,) = _pages(Row("one", (_try(), _try(best=True))))
    green = (page == GREEN).all(axis=2)
    middle = TEXT_WIDTH + 2 * MARGIN + IMAGE_SIDE + MARGIN // 2
    assert green[:, middle:].sum() > 4 * 5 * IMAGE_SIDE
    assert not green[:, :middle].any()
    label = _cell(page, 0, 1, 1)[:15, :40]
    assert (label > 240).all(axis=2).any()
    assert (label == GREEN).all(axis=2).mean() > 0.3


def test_scores_seeds_and_their_absence_change_the_caption():
    """What stands below a picture tells a score from another and from none, and a seed from another."""
    one = [_try(score=0.5), _try(score=0.25), _try(score=None), _try(score=0.5, seed=2**63 - 1)]
    (page,) = _pages(Row("one", tuple(one)))
    captions = [
        page[MARGIN + IMAGE_SIDE + 1 :, left : left + IMAGE_SIDE]
        for left in (TEXT_WIDTH + 2 * MARGIN + column * (IMAGE_SIDE + MARGIN) for column in range(4))
    ]
    assert all(caption.min() < 128 for caption in captions)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert all((captions[a] != captions[b]).any() for a, b in pairs)


def _gone():
    raise StorageFailed("pictures/7.png cannot be read: No such file or directory")


@pytest.mark.parametrize(
    "image",
    [_gone, lambda: b"", lambda: b"\x89PNG\r\n\x1a\n" + b"?" * 50, lambda: _file(size=(500, 500))[:-300]],
    ids=["missing", "empty", "no picture", "cut short"],
)
def test_a_picture_that_cannot_be_read_leaves_a_frame_with_the_reason(image):
    """An empty frame with words in it stands in its place, and the pictures beside it as always."""
    broken = Candidate(iteration=1, seed=1, score=None, best=False, image=image)
    (page,) = _pages(Row("one", (broken, _try())))
    cell = _cell(page, 0, 0, 1)
    assert (cell.min(axis=2) < 160).any()
    assert (cell == 255).all(axis=2).mean() > 0.7
    assert _middle(_cell(page, 0, 1, 1)) == (255, 0, 0)


def test_a_picture_that_claims_to_be_enormous_is_not_opened():
    """A small file of 10,000 × 8,000 pixels is refused by what its head says."""
    file = _file(0, (10_000, 8_000), mode="1")
    assert len(file) < 50_000
    (page,) = _pages(Row("one", (_try(file),)))
    assert (_cell(page, 0, 0, 1) == 255).all(axis=2).mean() > 0.7  # white; the picture itself is black


def test_a_run_that_is_to_end_is_not_held_up():
    """Stopped is no reason that a picture cannot be shown: it goes on its way."""

    def stop():
        raise Stopped(15)

    row = Row("one", (Candidate(iteration=1, seed=1, score=None, best=False, image=stop),))
    with pytest.raises(Stopped):
        list(contact_sheets([row]))


def test_many_tries_go_on_in_the_next_row_and_page():
    """With 8 tries and one row to a page, there are two pages: six tries, then two."""
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black", "gray"]
    pages = _pages(Row("one", tuple(_try(_file(colour)) for colour in colours)), page=1)
    assert len(pages) == 2
    assert _middle(_cell(pages[0], 0, COLUMNS - 1, 1)) == (255, 0, 255)
    assert [_middle(_cell(pages[1], 0, column, 1)) for column in (0, 1)] == [(0, 0, 0), (128, 128, 128)]


def test_rows_and_pictures_are_read_as_pages_are_asked_for():
    """Of 10,000 rows the first page reads 20 and no picture of another."""
    read, file = [], _file()

    def rows():
        for number in range(10_000):
            read.append(number)
            yield Row(f"prompt {number}", (_try(file),))

    next(contact_sheets(rows()))
    assert len(read) == 20
    assert list(contact_sheets([])) == []


@given(st.text(st.characters(), max_size=60), st.integers(0, 3))
@settings(max_examples=examples(20))
def test_no_text_breaks_a_sheet(text, tries):
    """Whatever characters a prompt holds, a page comes out, and nothing is drawn beyond the text's column."""
    (page,) = _pages(Row(text, (_try(),) * tries))
    gap = page[MARGIN : MARGIN + IMAGE_SIDE, TEXT_WIDTH + MARGIN + 3 : TEXT_WIDTH + 2 * MARGIN - 6]
    assert (gap == 255).all()


@pytest.mark.parametrize(
    "text",
    [
        "word " * 400,
        "x" * 5000,
        "שלום " * 300,
        "\u202eabc" * 900,
        "e" + "\u0301" * 5000,
        "\n\n" * 3000 + "end",
    ],
    ids=["words", "one word", "right to left", "turned around", "marks", "late"],
)
def test_a_long_text_is_cut_with_an_ellipsis(text):
    """Lines keep to their width and their number, and the last one says that there is more."""
    lettering = TextLayout(14)
    lines = lettering.lines(text, 200, 5)
    assert 1 <= len(lines) <= 5
    assert all(lettering.width(line) <= 200 for line in lines)
    assert lines[-1].endswith(ELLIPSIS)


def test_a_text_that_fits_is_whole():
    """Nothing of a text that has room is lost; what the font lacks shows as such; no control is drawn."""
    lettering = TextLayout(14)
    assert lettering.lines("a red\n circle\x00 on\u2028white", 90, 9) == ["a red circle", "on white"]
    assert lettering.lines("日本 \ud800", 90, 3) == ["\ufffd\ufffd \ufffd"]
    assert lettering.lines(" \t ", 90, 3) == []


def _grid(*rows):
    (page,) = contact_sheets(rows, grid=True)
    return np.asarray(Image.open(io.BytesIO(page)))


def _grid_cell(page, place, count):
    """The pixels of the image in that place of a grid, and those of the caption below it."""
    row, column = divmod(place, COLUMNS)
    height = (page.shape[0] - MARGIN) // -(-count // COLUMNS)
    top, left = MARGIN + row * height, MARGIN + column * (IMAGE_SIDE + MARGIN)
    image = page[top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]
    return image, page[top + IMAGE_SIDE + 2 : top + height, left : left + IMAGE_SIDE]


def test_prompts_with_one_image_each_are_a_grid():
    """Eight prompts: six side by side, two below, each image above its own text; none is marked as best."""
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black", "gray"]
    rows = [Row(f"the {colour} one", (_try(_file(colour), best=True),)) for colour in colours]
    page = _grid(*rows)
    cells = [_grid_cell(page, place, len(rows)) for place in range(len(rows))]
    assert [_middle(cells[place][0]) for place in (0, 5, 6, 7)] == [
        *((255, 0, 0), (255, 0, 255)),
        *((0, 0, 0), (128, 128, 128)),
    ]
    assert page.shape[1] < 1300
    assert not (page == GREEN).all(axis=2).any()
    captions = [caption.tobytes() for _, caption in cells]
    assert len(set(captions)) == len(captions)


def test_a_prompt_without_an_image_has_its_place_in_the_grid():
    """Its text is there, and the next image stands beside it."""
    page = _grid(Row("one", ()), Row("two", (_try(_file("red")),)))
    empty, full = (_grid_cell(page, place, 2)[0] for place in range(2))
    assert (empty.min(axis=2) < 160).any()
    assert _middle(full) == (255, 0, 0)


@pytest.mark.parametrize("grid", [True, False])
def test_without_scores_there_is_neither_a_best_one_nor_a_word_for_their_lack(grid):
    """The caption ends with the seed, and nothing is marked."""
    scored, plain = (Row("a boat", (_try(score=score, best=True),)) for score in (0.5, None))
    with_score, without = (
        np.asarray(Image.open(io.BytesIO(next(contact_sheets([row], grid=grid))))) for row in (scored, plain)
    )
    assert not (without == GREEN).all(axis=2).any()
    assert (without[MARGIN + IMAGE_SIDE :] < 128).sum() < (with_score[MARGIN + IMAGE_SIDE :] < 128).sum()


def test_the_iteration_is_named_where_there_are_several():
    """Images of one iteration have no line for it; those of two have."""
    first, second = _try(), Candidate(iteration=2, seed=7, score=0.5, best=False, image=_file)
    one, two = (_pages(Row("a boat", row))[0] for row in ((first, first), (first, second)))
    assert (one[MARGIN + IMAGE_SIDE :] < 128).sum() < (two[MARGIN + IMAGE_SIDE :] < 128).sum()
