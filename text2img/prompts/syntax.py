"""Names and syntax of other programs: of fields, and in texts, such as weights and wildcards.

Such syntax is plain text here. A run warns of it once, or refuses the prompt. Parentheses, brackets and
colons of ordinary text are no syntax.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.parameters import nearest
from text2img.prompts.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts.ids import PromptId

_OTHER_NAMES: Final = {
    other: name
    for name, others in {
        "id": "generation_id prompt_id image_id",
        "text": "prompt caption description prompt_text",
        "prompt_tags": "tags tag",
        "negative_prompt": "negative neg_prompt negativeprompt negative_text uc",
        "num_inference_steps": "steps num_steps sampling_steps inference_steps ddim_steps",
        "guidance_scale": "cfg cfg_scale cfgscale guidance scale",
        "scheduler": "sampler sampler_name sampler_index sampling_method",
        "num_images": "n n_iter batch_size batch_count num_images_per_prompt num_samples",
        "aspect_ratio": "ratio aspect aspectratio",
        "lora": "loras lora_path lora_model_url",
        "webhook_url": "webhook callback_url",
        "artist_name": "artist signature",
        "image_format": "format output_format",
        "image_quality": "quality jpeg_quality",
        "model_path": "model model_id model_name checkpoint sd_model",
    }.items()
    for other in others.split()
}


def our_name(name: object, known: Sequence[str]) -> str | None:
    """Return the known field that another program's name means; None if it means none."""
    if not isinstance(name, str):
        return None
    word = "_".join(name[:100].casefold().replace("-", " ").replace("_", " ").split())
    ours = _OTHER_NAMES.get(word, word)
    return ours if ours in known and ours != name else None


def name_hint(name: object, known: Sequence[str]) -> str:
    """Return the end of an error message: an unknown field's name here; empty if there is none."""
    if ours := our_name(name, known):
        return f"; it is called {ours} here"
    if our_name(name, ("model_path",)):
        return "; the model is the run's (--model-id), not the prompt's"
    return nearest(name, known) if isinstance(name, str) else ""


_NUMBER: Final = r"\s*+[-+]?(?:\d++(?:\.\d*+)?|\.\d++)\s*+"
_FOREIGN: Final = re.compile(
    "|".join(
        (
            rf"\((?:[^()\d\s]|[^()]*[^()\d\s])\s*:{_NUMBER}\)",  # (word:1.3), but not (16:9)
            r"\([^()]*\d\s*:\s*[-+]?\d*\.\d+\s*\)",  # (model 3:1.5)
            rf"\[[^\[\]:]*(?::[^\[\]:]*)?:{_NUMBER}\]",  # [word:0.5], [one:another:0.5]
            r"\[[^\[\]|]*\|[^\[\]]*\]",  # [one|another]
            r"\{[^{}|]*\|[^{}]*\}",  # {one|another}
            r"\(\([^()]+\)\)|\[\[[^\[\]]+\]\]|\{\{[^{}]+\}\}",  # ((word)), [[word]], {{word}}
            r"\([^()]+\)[-+]{1,9}(?![\w+-])|\b[^\W\d_]{3,}+(?:\+\+|--)(?![\w+-])",  # (a word)+, word++
            r"(?<!\w)__(?!_)[\w./*-]{1,60}?(?<!_)__(?!\w)",  # __name__
            r"<[A-Za-z]{2,12}\s?:(?!//)[^<>]*>",  # <lora:name:0.8>
            r"\bembedding:[\w.-]+",
            r"::[-+]?\d",  # word::2
            r"(?:^|[,\n])[ \t]*+BREAK[ \t]*+(?:[,\n]|$)",
            r"(?:^|\s)--(?:[a-z]+_[a-z_]+|prompt|seed|steps|width|height|styles|tiling)(?=\s|$)",
            r"(?:^|\s)--(?:ar|aspect|v|niji|no|s|stylize|c|chaos|q|quality|iw|sref|cref|weird|tile|style)(?=\s|$)",
        )
    )
)
_MAX_EXAMPLES: Final = 3
_MAX_KNOWN: Final = 100_000


def foreign_syntax(*texts: object) -> str | None:
    """Return the first part of the texts that another program would read as syntax; None if there is none.

    The part is quoted, in at most 60 characters.
    """
    for text in texts:
        if isinstance(text, str) and (found := _FOREIGN.search(text)):
            return quoted(found.group().strip(" ,\n") or found.group())
    return None


class PromptSyntax:
    """The prompts of one run, or of one file, whose texts have other programs' syntax.

    With ``refuse`` such a prompt fails, else it counts for the warning. Not safe for several threads.
    """

    def __init__(self, *, refuse: bool = False) -> None:
        self._refuse = refuse
        self._count = 0
        self._known: set[int] = set()
        self._examples: list[str] = []

    def check(self, prompt_id: PromptId | None, *texts: object) -> None:
        """Check the texts of a prompt. Raises PromptFailed (``invalid_prompt``) if they are refused."""
        part = foreign_syntax(*texts)
        if part is None:
            return
        if self._refuse:
            raise PromptFailed(
                ErrorCode.INVALID_PROMPT,
                f"it contains {part}, which is another program's syntax and plain text here;"
                " remove it (--prompt-syntax refuse)",
            )
        known = hash(prompt_id)
        if known in self._known:
            return  # another attempt or iteration
        if len(self._known) < _MAX_KNOWN:
            self._known.add(known)
        self._count += 1
        if len(self._examples) < _MAX_EXAMPLES:
            name = "the run's negative prompt" if prompt_id is None else quoted(prompt_id.text)
            self._examples.append(f"{name} ({part})")

    @property
    def warning(self) -> str | None:
        """The warning for what was checked so far; None if no prompt has such syntax."""
        if not self._count:
            return None
        subject = "1 prompt has" if self._count == 1 else f"{self._count:,} prompts have"
        more = ", …" if self._count > len(self._examples) else ""
        examples = f"{', '.join(self._examples)}{more}"
        return (
            f"{subject} syntax of other programs, which is plain text here: {examples};"
            " --prompt-syntax refuse rejects it"
        )
