"""What a run asks of every picture where its prompt asks for nothing else, and whether that can be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from text2img.engine.inspection import check_fits
from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts import Wishes
from text2img.prompts.parameters import settle
from text2img.settings import DEFAULTS
from text2img.worker import build

if TYPE_CHECKING:
    from text2img.engine import ModelCard
    from text2img.prompts import ModelConfiguration, Parameters
    from text2img.settings import Settings


def for_all(
    settings: Settings, card: ModelCard, configuration: ModelConfiguration | None
) -> tuple[Wishes, ...]:
    """What the run wishes for every picture, the most specific first."""
    configured = configuration.wishes if configuration else Wishes()
    own_size = Wishes(width=card.width, height=card.height)
    return (settings.wishes, configured, card.wishes, DEFAULTS, own_size)


def checked(settings: Settings, card: ModelCard, wishes: tuple[Wishes, ...]) -> Parameters:
    """What they come to; its seed means nothing.

    Raises ConfigurationError for what cannot be done: no picture would succeed.
    """
    encoder, loras = build.encoder(settings), build.loras(settings)
    try:
        wanted = settle(wishes, seed=0, multiple=card.multiple)
        check_fits(card, wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own parameters do not fit the model: {exc}") from None
    if settings.loop and wanted.num_images > 1:
        raise ConfigurationError(
            f"the model configuration's num_images is {wanted.num_images}, and the loop (--iterations,"
            " --candidates, --min-score) keeps one picture of a prompt; give --num-images 1"
        )
    try:
        encoder.check(wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own signature cannot be drawn: {exc}") from None
    try:
        for lora in wanted.loras:
            loras.check(lora)
    except PromptFailed as exc:
        raise ConfigurationError(f"the model configuration's LoRA cannot be used: {exc}") from None
    return wanted
