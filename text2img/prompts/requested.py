"""Parameters as a prompt, the flags or a model configuration ask for them: by name, and unchecked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Parameters as somebody asked for them, unchecked; ``None`` asks for nothing.

    A prompt's own fields, the flags, the model configuration and the defaults are each such a set.
    """

    negative_prompt: object = None
    seed: object = None
    num_inference_steps: object = None
    guidance_scale: object = None
    width: object = None
    height: object = None
    aspect_ratio: object = None
    num_images: object = None
    lora: object = None
    scheduler: object = None
    artist_name: object = None
    signature_position: object = None
    signature_opacity: object = None
    image_format: object = None
    image_quality: object = None

    @classmethod
    def of(cls, document: Mapping[str, object]) -> Wishes:
        """The wishes among a document's fields; other fields are left alone."""
        return cls(**{name: document.get(name) for name in PARAMETER_NAMES})


PARAMETER_NAMES: Final = tuple(field.name for field in fields(Wishes))
