"""Whether a model can draw what is asked for, as far as its card tells: before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from text2img.engine import ModelCard
    from text2img.prompts import Parameters


def check_fits(model: ModelCard, wanted: Parameters) -> None:
    """Raise PromptFailed (``invalid_parameters``) for a size, scheduler or number of steps it cannot do."""
    for name, pixels in (("width", wanted.width), ("height", wanted.height)):
        _check_side(name, pixels, model)
    if wanted.scheduler is not None and wanted.scheduler not in model.schedulers:
        known = f"it takes {', '.join(model.schedulers)}" if model.schedulers else "it takes only its own"
        raise _refused(f"scheduler {wanted.scheduler} does not fit this model; {known}")
    longest = model.longest.get(wanted.scheduler or model.scheduler, 1000)
    if wanted.num_inference_steps > longest:
        raise _refused(
            f"num_inference_steps must be at most {longest} with this scheduler; it is"
            f" {wanted.num_inference_steps}"
        )


def _check_side(name: str, pixels: int, model: ModelCard) -> None:
    multiple = model.multiple
    if pixels % multiple:
        near = pixels // multiple * multiple
        raise _refused(
            f"{name} must be a multiple of {multiple} with this model; it is {pixels}, and {near} or"
            f" {near + multiple} would do"
        )
    if model.largest is not None and pixels > model.largest:
        raise _refused(f"{name} must be at most {model.largest} with this model; it is {pixels}")


def _refused(sentence: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, sentence)
