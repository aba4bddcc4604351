"""Whatever a text, a table or standard input holds, it is read or refused in lines, and no key is drawn."""

from __future__ import annotations

import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from text2img.errors import ConfigurationError
from text2img.intake import read_prompts
from text2img.intake.files import guess_format

_PARTS = st.sampled_from(
    [
        *(
            "a cat",
            "text",
            "prompt",
            "prompts:",
            "- ",
            "id",
            ",",
            ";",
            "\t",
            '"',
            "'",
            "\n",
            "\n\n",
            "\r\n",
            ": ",
        ),
        *(
            "--prompt ",
            "--steps ",
            "--seed",
            "20",
            "-1",
            "7.0",
            "Negative prompt: ",
            "Steps: 20, Sampler: Euler",
        ),
        *(
            ", Seed: 1",
            ", Size: 64x",
            "{",
            "}",
            "[",
            "]",
            "#",
            "sep=;",
            "\\",
            "&a ",
            "*a",
            "\ufeff",
            "\u200b",
            "é",
        ),
    ]
)
_TEXTS = st.lists(_PARTS, max_size=25).map("".join) | st.text(max_size=60)


@given(text=_TEXTS, file_format=st.sampled_from(["txt", "csv", "yaml", None]))
@example(text="--prompt '", file_format="txt")
@example(text='sep="\ntext', file_format="csv")
@example(text="- *a", file_format=None)
def test_any_text_is_read_or_refused(tmp_path_factory, text, file_format) -> None:
    """Every error has the file's name and is short; of two readings the second returns the same prompts."""
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_text(text, "utf-8", errors="surrogatepass", newline="")
    kind = file_format or guess_format(io.StringIO(text)).removeprefix(".")
    try:
        prompts = read_prompts(str(file), file_format=kind)
    except ConfigurationError as exc:
        lines = f"\n{exc}".split(f"\n{file}")
        assert lines[0] == ""
        assert all(len(line) < 500 for line in lines)
    else:
        assert len(list(prompts)) == len(prompts) > 0


@given(
    lines=st.lists(
        st.sampled_from(["a cat", "a dog", "text: a", "id,text", "--prompt a", "Steps: 2, Seed: 1"])
    )
)
def test_lines_of_the_web_ui_are_never_a_text(tmp_path_factory, lines) -> None:
    """Tags and settings among prompts become parameters or errors."""
    file = tmp_path_factory.getbasetemp() / "lines.txt"
    file.write_text("\n".join(lines))
    try:
        texts = [prompt.text for prompt in read_prompts(str(file))]
    except ConfigurationError:
        return
    assert not any("--" in text or "Steps" in text for text in texts)


@pytest.mark.parametrize("header", ["id,text", "text;seed", "prompt\tid", '"text"', "seed,prompt_tags"])
@given(rows=st.lists(st.text(max_size=20), max_size=4))
def test_a_header_tells_csv_whatever_follows(header, rows) -> None:
    """The rows do not matter, nor empty lines above."""
    assert guess_format(io.StringIO("\n".join(["", header, *rows]))) == ".csv"
