"""Tables of the README and of docs/ against the code: a wrong option, code or status fails here."""

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
OPTIONS = ("<!-- options:", "<!-- end of options -->")


def page(name: str) -> str:
    """Return the text of a page, by its path from the root of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def table(name: str, begin: str, end: str) -> list[list[str]]:
    """Return the cells of the table rows between two marks of a page, without the header."""
    part = page(name).split(begin, 1)[1].split(end, 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"
    ]
    return [row for row in rows[1:] if not set("".join(row)) <= {"-"}]


def _plain(cell: str) -> str:
    return cell.replace("`", "")


def test_the_option_table_is_the_code() -> None:
    """Flag, variable, default and meaning of every option in docs/options.md are those of the code."""
    documented = [[_plain(cell) for cell in row] for row in table("docs/options.md", *OPTIONS)]
    declared = [[o.flag, o.variable, o.default_shown, _plain(o.meaning)] for o in options()]
    assert documented == [*declared, ["--dry-run", "–", "–", "prints the planned batches and writes nothing"]]


def test_the_readme_repeats_rows_of_the_option_table() -> None:
    """The README's table has some of the rows of docs/options.md, word for word, each once."""
    shown, rows = table("README.md", *OPTIONS), table("docs/options.md", *OPTIONS)
    assert 0 < len(shown) <= 15
    assert [row for row in rows if row in shown] == sorted(shown, key=rows.index)


def test_the_table_of_sizes_is_the_code() -> None:
    """Every aspect ratio is there, with the sizes that models of 512×512 and of 1024×1024 give it."""
    documented = {}
    for ratios, _, *sizes in table("docs/images.md", "| `aspect_ratio` | size |", "Each side is the nearest"):
        for place, ratio in enumerate(_plain(ratios).split(", ")):
            documented[ratio] = [size.split(", ")[place] for size in sizes]
    assert documented == {ratio: [_size(ratio, own) for own in (512, 1024)] for ratio in ASPECT_RATIOS}


def _size(ratio: str, own: int) -> str:
    wished = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=own, height=own)
    settled = resolve_parameters((RequestedParameters(aspect_ratio=ratio), wished), seed=0)
    return f"{settled.width}×{settled.height}"


@pytest.mark.parametrize("name", ["README.md", "docs/commands.md"])
def test_every_command_is_documented(name: str) -> None:
    """Each table of commands names the commands of the command line, and no others."""
    documented = {_plain(row[0]).split()[0] for row in table(name, "| command | what it does |\n", "## ")}
    assert documented == set(cli.COMMANDS)


def test_every_error_code_is_documented() -> None:
    """The error codes in docs/errors.md are those of the code, and so is which of them is tried again."""
    rows = table("docs/errors.md", "## Error codes", "A run waits for its own retries")
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
    """Each kind of failure has an exit status that README and docs/errors.md name, with the same advice."""
    assert error.exit_status == status
    full, short = (
        {row[0]: row[2] for row in table(name, "## Exit status", end)}
        for name, end in (("docs/errors.md", "Errors are one line"), ("README.md", "## How it works"))
    )
    assert full == short
    assert str(status) in {number for numbers in full for number in numbers.split(", ")}


def test_the_file_tree_is_the_tree() -> None:
    """The tree in docs/how-it-works.md has every entry of the package, and nothing that is not there."""
    tree = page("docs/how-it-works.md").split("text2img/\n", 1)[1].split("tests/ ", 1)[0]
    named = set(re.findall(r"(?:^  |  )([a-z_]+)(?:\.py|/) ", tree, re.MULTILINE))
    package = ROOT / "text2img"
    there = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert named == there - {"__init__", "__main__"}
