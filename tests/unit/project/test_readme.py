"""The README's tables against the code: an option, code or status that is documented wrongly fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from text2img import cli, errors
from text2img.errors import ErrorCode
from text2img.prompts import RequestedParameters
from text2img.prompts.parameters import ASPECT_RATIOS, resolve_parameters
from text2img.settings import options

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _rows(begin: str, end: str) -> list[list[str]]:
    """The cells of the table rows between two marks, without the header."""
    part = README.split(begin, 1)[1].split(end, 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"
    ]
    return [row for row in rows[1:] if not set("".join(row)) <= {"-"}]


def _plain(cell: str) -> str:
    return cell.replace("`", "")


def test_the_option_table_is_the_code() -> None:
    """Flag, variable, default and meaning of every option stand in the README as the code has them."""
    documented = [[_plain(cell) for cell in row] for row in _rows("<!-- options:", "<!-- end of options -->")]
    declared = [[o.flag, o.variable, o.default_shown, _plain(o.meaning)] for o in options()]
    assert documented == [*declared, ["--dry-run", "–", "–", "prints the planned batches and writes nothing"]]


def test_the_table_of_sizes_is_the_code() -> None:
    """Every aspect ratio stands there, with the sizes that models of 512×512 and of 1024×1024 give it."""
    documented = {}
    for ratios, _, *sizes in _rows("| `aspect_ratio` | size |", "Each side is the nearest"):
        for place, ratio in enumerate(_plain(ratios).split(", ")):
            documented[ratio] = [size.split(", ")[place] for size in sizes]
    assert documented == {ratio: [_size(ratio, own) for own in (512, 1024)] for ratio in ASPECT_RATIOS}


def _size(ratio: str, own: int) -> str:
    wished = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=own, height=own)
    settled = resolve_parameters((RequestedParameters(aspect_ratio=ratio), wished), seed=0)
    return f"{settled.width}×{settled.height}"


def test_every_command_is_documented() -> None:
    """The README's first table of commands names each command of the command line."""
    documented = {_plain(row[0]).split()[0] for row in _rows("| command |", "### Docker")}
    assert documented | {"command"} >= set(cli.COMMANDS)


def test_every_error_code_is_documented() -> None:
    """The error codes in the README are those of the code, and so is which of them is tried again."""
    rows = _rows("### Error codes", "A run waits for its own retries")
    assert {_plain(row[0]) for row in rows} == {str(code) for code in ErrorCode}
    assert {_plain(row[0]) for row in rows if row[2].startswith("yes")} == {
        str(code) for code in ErrorCode if code.retryable
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConfigurationError("x"), 2),
        (errors.DatabaseFailed("x"), 1),
        (errors.StorageFailed("x"), 1),
        (errors.ModelFailed("x"), 1),
        (errors.DeviceFailed("x"), 1),
        (errors.Stopped(15), 143),
        (errors.Stopped(2), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exit_statuses_are_the_documented_ones(error: errors.Text2ImgError, status: int) -> None:
    """Each kind of failure has the exit status that the README gives it."""
    assert error.exit_status == status
    documented = {
        number for row in _rows("### Exit status", "Errors are one line") for number in row[0].split(", ")
    }
    assert str(status) in documented


def test_the_file_tree_is_the_tree() -> None:
    """Every module at the package's top is named in the README's tree, and nothing that is not there."""
    tree = README.split("text2img/\n", 1)[1].split("tests/ ", 1)[0]
    named = set(re.findall(r"(?:^  |  )([a-z_]+)(?:\.py|/) ", tree, re.MULTILINE))
    package = ROOT / "text2img"
    there = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert named == there - {"__init__"}
