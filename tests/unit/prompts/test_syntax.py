"""Other programs' syntax in a text is found, warned of once, or refused; prose is left alone."""

from __future__ import annotations

import pytest

from text2img.errors import PromptFailed
from text2img.prompts import PromptId
from text2img.prompts.parameters import check_prompt_text
from text2img.prompts.syntax import PromptSyntax, foreign_syntax, name_hint


@pytest.mark.parametrize(
    "part",
    [
        *(
            "(word:1.3)",
            "(a red fox : .5)",
            "((word))",
            "[[word]]",
            "{{word}}",
            "[word:0.5]",
            "[one:two:0.5]",
        ),
        *("[one|two]", "{a|b}", "__name__", "__animals/big-cats__", "<lora:ink:0.8>", "<lyco:ink>"),
        *("<LoRA:ink>", "<random:a,b>", "(model 3:1.5)"),
        *("(red ball)++", "word--", "embedding:ink", "::2", "--ar", "--negative_prompt"),
    ],
)
def test_syntax_is_found(part) -> None:
    """Each form is found within a text, and quoted."""
    assert foreign_syntax(None, f"a cat {part} and a dog") == repr(part)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a cat, sitting",
            "Photo: a house",
            "a photo (16:9)",
            "a clock (at 12:30)",
            "John (3:16)",
            "(seated)",
        ),
        *(
            "[sic] a cat",
            "C++ logo",
            "a -- b",
            "snake_case",
            "5--6",
            "a COFFEE BREAK",
            "{a, b}",
            "<b>bold</b>",
        ),
        *("fill in ____ here", "<https://example.com/a>", "a well-lit --- room", "key: [a: b]"),
    ],
)
def test_prose_is_no_syntax(text) -> None:
    """Ratios, times, asides, dashes and brackets are what people write."""
    assert foreign_syntax(text) is None


def test_a_warning_counts_prompts_and_names_three() -> None:
    """A prompt counts once, however often it is tried; without any there is no warning."""
    syntax = PromptSyntax()
    syntax.check(PromptId("int", "0"), "a cat", None)
    assert syntax.warning is None
    for number in (1, 2, 3, 4, 4, 1):
        syntax.check(PromptId("int", str(number)), "a cat", "(blurry:1.3)")
    assert syntax.warning == (
        "4 prompts have syntax of other programs, which is plain text here: '1' ('(blurry:1.3)'), '2'"
        " ('(blurry:1.3)'), '3' ('(blurry:1.3)'), …; --prompt-syntax refuse rejects it"
    )


def test_refusal_names_the_part() -> None:
    """It is the prompt's own failure."""
    with pytest.raises(PromptFailed, match=r"it contains '__name__', .*--prompt-syntax refuse") as refused:
        PromptSyntax(refuse=True).check(PromptId("int", "1"), "a __name__ cat")
    assert refused.value.code == "invalid_prompt"


@pytest.mark.parametrize(
    "text", ["\u200b", " \u200d\ufeff", "\u0301", "\x01\x7f", "\u3164\u2800", "\ufe0f \u20e3"]
)
def test_invisible_characters_are_an_empty_text(text) -> None:
    """Zero-width, control and combining characters and blank fillers show nothing, in texts and in tags."""
    for given in ((text, None), (None, [text, " "])):
        with pytest.raises(PromptFailed, match="is empty: it has only invisible characters") as refused:
            check_prompt_text(*given)
        assert refused.value.code == "invalid_prompt"
    assert check_prompt_text(f"{text}é\u0301") == f"{text}é\u0301"


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("tags", ("text", "prompt_tags"), "; it is called prompt_tags here"),
        ("Sampler Name", ("scheduler",), "; it is called scheduler here"),
        ("cfg-scale", ("guidance_scale",), "; it is called guidance_scale here"),
        ("steps", ("num_inference_steps",), "; it is called num_inference_steps here"),
        ("checkpoint", ("model_path",), "; it is called model_path here"),
        ("model", ("text",), "; the model is the run's (--model-id), not the prompt's"),
        ("widht", ("width",), "; did you mean width?"),
        ("colour", ("width",), ""),
        (7, ("width",), ""),
    ],
)
def test_names_of_other_programs_lead_to_ours(name, known, hint) -> None:
    """In any spelling, and only to a field that is known there."""
    assert name_hint(name, known) == hint
