"""The domain: what a prompt is, what it becomes, and what may share a batch.

Knows nothing of databases, storage, models or pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.ids import PromptId
from text2img.prompts.outcomes import (
    Completed,
    Failed,
    NeedsRefinement,
    Outcome,
    RetryLater,
    StoredImage,
    failure,
)
from text2img.prompts.parameters import (
    MAX_SEED,
    SCHEDULERS,
    Lora,
    Parameters,
    RequestedParameters,
    resolve_parameters,
)
from text2img.prompts.validation import check_prompt_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "APPROXIMATIONS",
    "NOTES",
    "SCHEDULERS",
    "Claim",
    "Completed",
    "Failed",
    "Lora",
    "ModelConfiguration",
    "NeedsRefinement",
    "Outcome",
    "Parameters",
    "Prompt",
    "PromptId",
    "Request",
    "RequestedParameters",
    "RetryLater",
    "Status",
    "StoredImage",
    "failure",
    "request",
]


DEATHS_BEFORE_ALONE = 2
"""After so many workers died with it on the device, a prompt gets a batch of its own."""
DEATHS_BEFORE_ABANDONED = 5
"""After so many it is tried no more."""
SEEDS = MAX_SEED + 1
APPROXIMATIONS = ("feature_cache", "autoencoder")
"""What may be traded for speed, each only where somebody asks for it; recorded where it is on."""
PROVIDER_METADATA_FIELDS = ("request_id", "billed_units")
"""What a hosted generator tells of a picture: its name for the request, and the units of its price billed."""


class Status(StrEnum):
    """Where a prompt stands. Absent means pending."""

    PENDING = "pending"  # waits to be claimed, from its not_before on where it has one
    PROCESSING = "processing"  # a worker holds it until lease_expires_at; then anybody may claim it
    COMPLETED = "completed"  # its picture is stored and its result recorded
    ERROR = "error"  # failed for good; error_code says why


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on one prompt: void as soon as another claim has a higher ``number``."""

    id: PromptId
    worker: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A claimed prompt, as its owner wrote it; all that its owner writes is unchecked.

    ``prompt_tags`` count where there is no ``text``; ``webhook_url`` is told of this prompt alone.

    ``attempts`` counts its own failures so far, ``deaths`` the workers that died with it on the device.
    ``tries`` are the pictures of earlier iterations of its loop, ``next_prompt`` is what the next one draws.
    """

    claim: Claim
    text: object
    prompt_tags: object = None
    webhook_url: object = None
    requested: RequestedParameters = field(default_factory=RequestedParameters)
    priority: float = 0
    attempts: int = 0
    deaths: int = 0
    tries: tuple[StoredImage, ...] = ()
    next_prompt: str | None = None

    @property
    def id(self) -> PromptId:
        """The prompt's id."""
        return self.claim.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt whose text and parameters are settled: what an engine turns into one picture.

    ``number`` says which of the prompt's pictures, from 0; the seed is that picture's own. It gets so many
    ``pictures`` under this claim, of which this is the ``candidate`` (from 0); in a loop they are those of
    one ``iteration`` (from 1), which may draw another text than the ``original``.
    ``chunks`` is how many times the text encoder's window (77 tokens with CLIP) the text fills;
    ``lora_files`` is where the LoRAs of its parameters are on this machine, once they are fetched.
    """

    prompt: Prompt
    text: str
    parameters: Parameters
    chunks: int = 1
    number: int = 0
    pictures: int = 1
    candidate: int = 0
    iteration: int = 1
    original: str | None = None
    lora_files: tuple[str, ...] = ()

    @property
    def original_text(self) -> str:
        """What the prompt asks for, whatever is drawn of it."""
        return self.text if self.original is None else self.original

    @property
    def shape(self) -> tuple[object, ...]:
        """What must agree for requests to share a batch; seeds and negative prompts are each one's own."""
        wanted = self.parameters
        alone = self.prompt.id if self.prompt.deaths >= DEATHS_BEFORE_ALONE else None
        return (
            wanted.width,
            wanted.height,
            wanted.num_inference_steps,
            wanted.guidance_scale,
            wanted.scheduler,
            wanted.loras,
            self.lora_files,
            self.chunks,
            alone,
        )

    def each(self) -> list[Request]:
        """A request for each of the pictures; this is for the first, and has the seed of the picture 0."""
        wanted = self.parameters
        return [
            replace(self, candidate=place, number=number, parameters=replace(wanted, seed=seed % SEEDS))
            for place, number in enumerate(range(self.number, self.number + self.pictures))
            for seed in [wanted.seed + number]
        ]


def request(prompt: Prompt, requested: Sequence[RequestedParameters], multiple: int = 8) -> Request:
    """The request for the prompt's first picture under the run's wishes (the most specific first), its chunks
    not yet counted. ``multiple``: of what a size that follows from an aspect ratio shall be a multiple.

    Raises PromptFailed (``invalid_prompt``, ``invalid_parameters`` or ``abandoned``).
    """
    if prompt.deaths >= DEATHS_BEFORE_ABANDONED:
        raise PromptFailed(ErrorCode.ABANDONED, f"{prompt.deaths} workers died while they worked on it")
    text = check_prompt_text(prompt.text, prompt.prompt_tags)
    settled = resolve_parameters((prompt.requested, *requested), seed=prompt.id.seed, multiple=multiple)
    return Request(prompt=prompt, text=text, parameters=settled, pictures=settled.num_images)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfiguration:
    """Which model a team wants its prompts drawn by, and the parameters it wishes for all of them.

    ``safety_checker`` False switches the model's own checker off. ``feature_cache`` and ``autoencoder`` are
    approximations that the team has chosen for this model.
    """

    model_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    safety_checker: bool = True
    feature_cache: int | None = None
    autoencoder: str | None = None
    requested: RequestedParameters = field(default_factory=RequestedParameters)
    id: PromptId | None = None
