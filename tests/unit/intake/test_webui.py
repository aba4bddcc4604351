"""Text files of the common web UI are read as what they mean there, or refused by line."""

from __future__ import annotations

import pytest

from text2img.errors import ConfigurationError
from text2img.intake import read_prompts
from text2img.prompts.parameters import PARAMETER_NAMES, SCHEDULERS


def read(tmp_path, content):
    """Return the text and the requested parameters of each prompt, or the lines of the refusal."""
    file = tmp_path / "a.txt"
    file.write_text(content)
    try:
        prompts = list(read_prompts(str(file)))
    except ConfigurationError as exc:
        return [line.replace(f"{file}, ", "") for line in str(exc).splitlines()]
    values = [{name: getattr(prompt.requested, name) for name in PARAMETER_NAMES} for prompt in prompts]
    return [
        (prompt.text, {name: value for name, value in each.items() if value is not None})
        for prompt, each in zip(prompts, values, strict=True)
    ]


CASTLE = (
    "a castle (on a hill)",
    {
        "negative_prompt": "trees, people",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "seed": 4711,
        "width": 512,
        "height": 768,
        "scheduler": "euler-a",
    },
)
AMBIGUOUS = (
    "an infotext's prompt and its negative prompt must have one line each, and two infotexts need an"
    " empty line between them"
)
SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 4711, Size: 512x768"
TAGS = (
    '--prompt "a castle (on a hill)" --negative_prompt "trees, people" --steps 20 --cfg_scale 7.5'
    ' --width 512 --height 768 --seed 4711 --sampler_name "Euler a"'
)


@pytest.mark.parametrize(
    "content",
    [
        TAGS,
        f"a castle (on a hill)\nNegative prompt: trees, people\n{SETTINGS}, Model hash: abc, Version: v1.6.0",
        f"a castle (on a hill)\nNegative prompt: trees,\npeople\n{SETTINGS}, Schedule type: Automatic",
        TAGS.replace("negative_prompt", "negative-prompt").replace('"', "'"),
        f"a castle (on a hill) Negative prompt: trees, people {SETTINGS}, Model: v1-5",
        f"a castle (on a hill)\nnegative prompt: trees, people\n{SETTINGS}",
        f'a castle (on a hill)\nNegative prompt: trees, people\n{SETTINGS}, Hashes: {{"a": "b", "c": "d"}}',
    ],
)
def test_a_prompt_in_its_forms(tmp_path, content) -> None:
    """Tags, an infotext and an infotext in one line are the same prompt, between prompts of one line."""
    expected = [("a boat", {}), CASTLE, ("a dog", {})]
    assert read(tmp_path, f"a boat\n\n{content}\na dog\n") == expected


def test_any_seed_and_several_images(tmp_path) -> None:
    """The seed −1 is no seed, and batches of images are images."""
    assert read(tmp_path, "--prompt a cat --seed -1 --batch_size 2 --n_iter 3 --sampler_name PLMS") == [
        ("a cat", {"num_images": 6, "scheduler": "pndm"})
    ]


@pytest.mark.parametrize(
    ("content", "errors"),
    [
        ('--prompt "a', ["line 1: the tags cannot be read: No closing quotation"]),
        ("--prompt a --prompt b", ["line 1: --prompt occurs twice"]),
        ("--steps 20", ["line 1: text is missing; describe the image"]),
        ("--prompt a --tiling true", ["line 1: --tiling has no counterpart here; leave it out"]),
        ("--prompt a --steps", ["line 1: --steps lacks its value"]),
        ("--prompt a --width 1.5 --seed x", ["line 1: seed must be a whole number; it is 'x'",
                                             "line 1: width must be a whole number; it is 1.5"]),
        ("a cat --steps 20", ["line 1: --steps follows text; begin the line with --prompt"]),
        ("a\n\nb Steps: 20, Sampler: DPM++ 2M Karras, Seed: 1",
         [f"line 3: scheduler must be one of {', '.join(SCHEDULERS)}; it is 'DPM++ 2M Karras'"]),
        ("a\nSteps: 20, Sampler: DDIM, Hires upscale: 2",
         ["line 1: Hires upscale of an infotext has no counterpart here; leave it out"]),
        ("Negative prompt: x", ["line 1: belongs to an infotext, but there is no prompt before it"]),
        ("Steps: 20, Sampler: DDIM", ["line 1: belongs to an infotext, but there is no prompt before it"]),
        ("a\nb\nNegative prompt: x\nSteps: 20, Sampler: DDIM",
         [f"line 2: {AMBIGUOUS}"]),
        ("a\nNegative prompt: x\nb",
         [f"line 1: {AMBIGUOUS}"]),
        ('{"text": "a cat"}', ["line 1: is a line of JSON; name the file .jsonl, or give --format jsonl"]),
    ],
)  # fmt: skip
def test_what_has_no_meaning_here_is_refused(tmp_path, content, errors) -> None:
    """No tag, setting or key is drawn as a text."""
    assert read(tmp_path, content) == errors


@pytest.mark.parametrize("line", ["a dash -- here", "Steps: a staircase", "a cat; {text}", "note: Negative"])
def test_ordinary_text_stays_text(tmp_path, line) -> None:
    """Dashes, colons and brackets of prose mean nothing."""
    assert read(tmp_path, line) == [(line, {})]
