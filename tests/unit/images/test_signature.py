"""The signature: where it stands, how large, whether it can be read, and which names are refused."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, features

from text2img.errors import ErrorCode, PromptFailed
from text2img.images.signature import BUNDLED, INVISIBLE_CHARS, Font, Signer
from text2img.prompts.parameters import check_name

NAME = "Ana Díaz"
SIGNER, PLAIN = Signer(), Signer(shaping=False)
MISSING = "\U0010fffe"
shaped = pytest.mark.skipif(
    not features.check("raqm"), reason="needs libfribidi (Debian: libfribidi0), as right to left and marks do"
)


def _uniform(level: int, size: tuple[int, int] = (256, 256)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def _noise(size: tuple[int, int] = (256, 256), seed: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _box(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what has changed (right and bottom are one further)."""
    rows, columns = np.nonzero((np.asarray(before) != np.asarray(after)).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _ink(name: str, signer: Signer = SIGNER) -> np.ndarray:
    """The letters of the name, as a mask of what is at least half covered."""
    letters = signer._fit(name, 512, 512).ink
    return np.asarray(letters.crop(letters.getbbox())) >= 128


SIZES = [(64, 64), (64, 1024), (1024, 64), (128, 128), (512, 768), (2048, 2048)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("position", ["bottom-right", "bottom-left"])
def test_a_signature_stands_in_its_corner(size: tuple[int, int], position: str) -> None:
    """It changes its corner and no pixel elsewhere, and keeps a margin to the edges."""
    image = _noise(size)
    left, top, right, bottom = _box(image, SIGNER.sign(image, NAME, position, 128))
    width, height = size
    em = SIGNER._fit(NAME, *size).em
    assert left >= 2
    assert top >= 2
    assert 2 <= height - bottom <= em
    assert 2 <= (width - right if position == "bottom-right" else left) <= em
    assert bottom - top <= max(0.12 * height, 24)


def test_a_signature_grows_with_the_picture() -> None:
    """On pictures two and four times as large it is two and four times as large."""
    widths = []
    for side in (512, 1024, 2048):
        left, _, right, _ = _box(
            _uniform(0, (side, side)), SIGNER.sign(_uniform(0, (side, side)), NAME, "bottom-left", 255)
        )
        widths.append((right - left) / side)
    assert max(widths) / min(widths) < 1.05
    assert 0.15 < widths[0] < 0.5


@pytest.mark.parametrize("image", [_noise(), _uniform(255), _uniform(0)], ids=["noise", "white", "black"])
def test_opacity_0_leaves_every_pixel(image: Image.Image) -> None:
    """The picture is bit-equal."""
    assert SIGNER.sign(image, NAME, "bottom-right", 0).tobytes() == image.tobytes()


def test_opacity_255_hides_what_is_below() -> None:
    """Letters and outline are the same black and white on two pictures of noise, which differ below them."""
    letters = SIGNER._fit(NAME, 256, 256)
    signed = [np.asarray(SIGNER.sign(_noise(seed=seed), NAME, "bottom-right", 255)) for seed in (1, 2)]
    top, left = (256 - letters.margin - side for side in (letters.outlined.height, letters.outlined.width))
    parts = [one[top : 256 - letters.margin, left : 256 - letters.margin] for one in signed]
    full = np.asarray(letters.outlined) == 255
    assert (parts[0][full] == parts[1][full]).all()
    assert {tuple(pixel) for pixel in parts[0][full][[0, -1]]} <= {(0, 0, 0), (255, 255, 255)}
    assert full.mean() > 0.4


def _contrast(image: Image.Image, opacity: int) -> float:
    """The contrast ratio (WCAG 2.2) between the letters and what surrounds them, by mean luminance."""
    letters = SIGNER._fit(NAME, *image.size)
    signed = SIGNER.sign(image, NAME, "bottom-right", opacity)
    right, bottom = (side - letters.margin for side in image.size)
    part = signed.crop((right - letters.outlined.width, bottom - letters.outlined.height, right, bottom))
    levels = np.asarray(part, float) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    ink, whole = np.asarray(letters.ink), np.asarray(letters.outlined)
    inside, around = luminance[ink > 250].mean(), luminance[(whole > 250) & (ink < 5)].mean()
    return (max(inside, around) + 0.05) / (min(inside, around) + 0.05)


def _halves(size: tuple[int, int] = (256, 256)) -> Image.Image:
    """White above, black below, with the edge in the middle of where the signature stands."""
    image, letters = _uniform(255, size), SIGNER._fit(NAME, *size)
    middle = size[1] - letters.margin - letters.outlined.height // 2
    image.paste((0, 0, 0), (0, middle, *size))
    return image


PICTURES = {
    "white": _uniform(255),
    "black": _uniform(0),
    "mid-grey": _uniform(128),
    "the grey between": _uniform(117),
    "noise": _noise(),
    "half white, half black": _halves(),
    "red": Image.new("RGB", (256, 256), (220, 30, 30)),
    "64 pixels of white": _uniform(255, (64, 64)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_signature_can_be_read_on_any_picture(name: str) -> None:
    """At the usual opacity letters and their outline differ by a contrast ratio of 3, as for large text."""
    assert _contrast(PICTURES[name], 128) >= 3
    assert _contrast(PICTURES[name], 255) > 10


@pytest.mark.parametrize(("level", "darker"), [(255, True), (160, True), (90, False), (0, False)])
def test_letters_are_dark_on_light_and_light_on_dark(level: int, *, darker: bool) -> None:
    """What is drawn stands out from a plain picture, without regard to its outline."""
    letters = SIGNER._fit(NAME, 256, 256)
    right, bottom = 256 - letters.margin, 256 - letters.margin
    corner = (right - letters.outlined.width, bottom - letters.outlined.height, right, bottom)
    signed = np.asarray(SIGNER.sign(_uniform(level), NAME, "bottom-right", 128).crop(corner), int)[..., 0]
    inside = signed[np.asarray(letters.ink) > 250]
    assert (inside < level - 30).all() if darker else (inside > level + 30).all()


@shaped
@pytest.mark.parametrize(
    "name",
    [
        "Ελένη Παπαδοπούλου", "Дмитрий Жук", "Nguyễn Văn", "שלום עולם", "محمد علي", "ნინო", "Հայկ", "ⵉⴷⵉⵔ",
        "ສົມຈິດ", "A\u030a\u0323 Zo\u0308e", "☃ 😀", "O’Neil & “Co.” №1", "علی‌رضا",
    ],
)  # fmt: skip
def test_names_of_many_scripts_are_drawn(name: str) -> None:
    """What the bundled font holds is drawn: Greek to Lao, marks, joiners, symbols."""
    image = _uniform(200)
    assert _box(image, SIGNER.sign(image, name, "bottom-right", 128))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("北斎", r"北 \(U\+5317\)"),
        ("Ana 👨‍👩‍👧", r"U\+1F468"),
        ("🇪🇸", r"U\+1F1EA"),
        ("राधा", r"U\+0930"),
        ("\U000e0041", r"has U\+E0041,"),
        ("\u0378", r"has U\+0378,"),
        ("\uf8f0", r"U\+F8F0"),
        ("\u0301Ana", "begins with a combining mark"),
        ("\u2800\u3000" if Font(BUNDLED, shaping=False).holds("\u3000") else "\u2800", "no visible"),
        ("\u200d\u200e", "(no visible characters|libfribidi)"),
        ("\u00a0", "no visible characters"),
    ],
    ids=ascii,
)
def test_a_name_that_the_font_cannot_draw_is_refused(name: str, why: str) -> None:
    """Not boxes but a sentence, for the prompt's owner, that names the character."""
    for signer in (SIGNER, PLAIN):
        with pytest.raises(PromptFailed, match=f"^artist_name .*{why}") as refused:
            signer.check(name, 512, 512)
        assert refused.value.code is ErrorCode.INVALID_PARAMETERS


@shaped
def test_hebrew_is_drawn_from_right_to_left() -> None:
    """It looks as its letters laid out backwards, one after the other, do."""
    assert (_ink("שדו") == _ink("ודש", _Unchecked())).all()


class _Unchecked(Signer):
    """Letters one after the other, whatever the script."""

    def __init__(self) -> None:
        super().__init__(shaping=False)

    def _check_drawable(self, text: str) -> None:
        pass


@shaped
def test_arabic_letters_join() -> None:
    """The word is narrower than its letters apart, as they stand without shaping."""
    assert _ink("محمد").shape[1] < _ink("دمحم", _Unchecked()).shape[1]


@shaped
def test_marks_stand_where_they_belong() -> None:
    """A letter with its mark is as wide as without, also where Unicode has no letter for the two."""
    assert (_ink("é") == _ink("e\u0301")).all()
    assert _ink("q\u0301").shape[1] == _ink("q").shape[1]
    assert _ink("q\u0301").shape[0] > _ink("q").shape[0]


@pytest.mark.parametrize("name", ["שלום", "محمد", "q\u0301", "علی‌رضا", "ສົມຈິດ", "ߒߞߏ"])
def test_without_shaping_what_would_be_drawn_wrongly_is_refused(name: str) -> None:
    """Where Pillow lacks libfribidi, right to left, joined and marked names fail with the reason."""
    with pytest.raises(PromptFailed, match="libfribidi"):
        PLAIN.check(name, 512, 512)


@pytest.mark.parametrize("name", [NAME, "Ελένη", "Дмитрий", "Nguyễn Văn", "ნინო", "Zoe\u0308", "Հայկ"])
def test_without_shaping_other_names_are_drawn(name: str) -> None:
    """Letters that stand one after the other need no library; marks that Unicode has put together neither."""
    PLAIN.check(name, 512, 512)


def test_a_long_name_is_drawn_smaller_but_never_too_small() -> None:
    """It shrinks until it fits; where nobody could read it any more, it is refused and told what to do."""
    short, long = (
        SIGNER._fit("Ana", 256, 256),
        SIGNER._fit("Bartholomeus de Witt van der Helst", 256, 256),
    )
    assert 8 <= long.em < short.em
    assert long.outlined.width <= 256
    with pytest.raises(PromptFailed, match=r"too long for an image of 64×64: .* shorten it or"):
        SIGNER.check("Bartholomeus de Witt van der Helst", 64, 64)
    with pytest.raises(PromptFailed, match="under 8 pixels high"):
        SIGNER.check("Bartholomew", 64, 64)
    SIGNER.check("Bartholomeus de Witt van der Helst", 1024, 64)
    SIGNER.check("x" * 200, 2048, 2048)
    with pytest.raises(PromptFailed, match="too long"):
        SIGNER.check("W" * 200, 512, 512)


@shaped
def test_a_tower_of_marks_is_no_crash() -> None:
    """A letter under a hundred marks either fits into the picture or is refused."""
    for size in ((64, 64), (512, 512)):
        try:
            letters = SIGNER._fit("a" + "\u0301\u0323" * 90, *size)
        except PromptFailed:
            continue
        assert letters.fits(*size)


_FONT = Font(BUNDLED, shaping=False)


def _is_box(char: str) -> bool:
    """Whether Pillow draws for the character what it draws for a missing one; asks no table of ours."""
    pictures = []
    for each in (char, MISSING):
        image = Image.new("L", (60, 60))
        ImageDraw.Draw(image).text((20, 40), each, 255, _FONT.sized(24), "ls")
        pictures.append(image.tobytes())
    return pictures[0] == pictures[1]


KINDS = st.one_of(
    st.characters(),
    st.characters(max_codepoint=0x24F),
    st.characters(min_codepoint=0x300, max_codepoint=0x36F),
    st.characters(min_codepoint=0x590, max_codepoint=0x7FF),
    st.characters(min_codepoint=0x1F000, max_codepoint=0x1FAFF),
    st.sampled_from("\u200d\u200c\ufe0f\u202e\ud800\0\n\t\u2028\u00ad\ufeff\u0020"),
)

NAMES = st.text(KINDS, max_size=40) | st.text(
    st.characters(categories=["L", "Mn", "Zs"], max_codepoint=0x7FF), max_size=30
)


@pytest.mark.parametrize("signer", [pytest.param(SIGNER, marks=shaped), PLAIN], ids=["shaped", "plain"])
@pytest.mark.parametrize("size", [(64, 64), (256, 128)], ids=str)
@given(name=NAMES)
def test_any_name_is_drawn_or_refused(signer: Signer, size: tuple[int, int], name: str) -> None:
    """Whatever the name, there is a signature without a box that fits, or a sentence; never a crash."""
    image = _uniform(90, size)
    try:
        checked = check_name("artist_name", name)
        if not checked:
            return
        signer.check(checked, *size)
    except PromptFailed as refused:
        message = str(refused).encode().decode()
        assert message.startswith("artist_name ")
        return
    left, top, right, bottom = _box(image, signer.sign(image, checked, "bottom-right", 200))
    assert min(left, top, size[0] - right, size[1] - bottom) >= 2
    drawn = unicodedata.normalize("NFC", checked)
    parts = [
        part
        for char in drawn
        for part in ([char] if _FONT.holds(char) else unicodedata.normalize("NFD", char))
    ]
    assert not [part for part in parts if part not in INVISIBLE_CHARS and _is_box(part)]
