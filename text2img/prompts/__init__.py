"""The domain model: prompts, their claims, the requests made from them, and their outcomes.

Independent of databases, storage, models and pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.ids import PromptId
from text2img.prompts.parameters import (
    MAX_SEED,
    SCHEDULERS,
    Lora,
    Parameters,
    RequestedParameters,
    check_prompt_text,
    resolve_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


__all__ = [
    "APPROXIMATIONS",
    "PROVIDER_METADATA_FIELDS",
    "SCHEDULERS",
    "AwaitsScore",
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
"""A prompt on which this many workers died gets a batch of its own."""
DEATHS_BEFORE_ABANDONED = 5
"""A prompt on which this many workers died is not attempted again."""
SEEDS = MAX_SEED + 1
APPROXIMATIONS = ("feature_cache", "autoencoder")
"""Options that trade quality for speed; off by default, and recorded where they are on."""
PROVIDER_METADATA_FIELDS = ("request_id", "billed_units")
"""The fields that a hosted generator reports about an image: the id of the request, and the units billed."""


class Status(StrEnum):
    """A prompt's status. A missing status means pending."""

    PENDING = "pending"  # to be claimed, but not before its not_before, if it has one
    PROCESSING = "processing"  # claimed by a worker until lease_expires_at; then any worker may claim it
    COMPLETED = "completed"  # its images are stored and its result is recorded
    ERROR = "error"  # failed permanently; error_code is the reason
    REMOVED = "removed"  # it was pending when it left its input file; it comes back with the file


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to process one prompt: void as soon as another claim has a higher ``number``."""

    id: PromptId
    worker: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A claimed prompt, as its owner wrote it; the owner's fields are not validated.

    ``prompt_tags`` are used if there is no ``text``. ``webhook_url`` receives this prompt's outcome only.

    ``attempts`` counts the prompt's own failures so far, ``deaths`` the workers that died while it was on the
    device. ``tries`` are the images of earlier iterations of its loop, ``next_prompt`` is the text of the
    next one. ``fault`` is the reason if the document cannot be read: the prompt is ``invalid_document``.
    ``recorded_hashes`` are the SHA-256 of all images that the database has recorded for it, also in earlier
    attempts: these alone may be replaced. ``unscored`` are stored images that only wait for a score.
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
    fault: str | None = None
    recorded_hashes: tuple[str, ...] = ()
    unscored: tuple[StoredImage, ...] = ()

    @property
    def id(self) -> PromptId:
        """The prompt's id."""
        return self.claim.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt with its text and parameters resolved: the input of an engine for one image.

    ``number`` is the image's number within the prompt, from 0; the seed is that image's own. The prompt gets
    ``num_images`` images under this claim, of which this is number ``candidate`` (from 0). In a loop they are
    the images of one ``iteration`` (from 1), whose text may differ from the ``original``.
    ``chunks`` is the number of text encoder windows (77 tokens with CLIP) that the text fills.
    ``lora_files`` are the local paths of the LoRAs in its parameters, once they are fetched.
    ``negative_left_out``: the run asked for a negative prompt that would have no effect. ``stored`` is the
    image if it was generated before and only waits for a score.
    """

    prompt: Prompt
    text: str
    parameters: Parameters
    chunks: int = 1
    number: int = 0
    num_images: int = 1
    candidate: int = 0
    iteration: int = 1
    original: str | None = None
    lora_files: tuple[str, ...] = ()
    negative_left_out: bool = False
    stored: StoredImage | None = None

    @property
    def original_text(self) -> str:
        """The prompt's own text, even if this iteration uses another one."""
        return self.text if self.original is None else self.original

    @property
    def alone(self) -> bool:
        """True if the prompt runs in a batch of its own, since workers died or stalled while it ran."""
        return self.prompt.deaths >= DEATHS_BEFORE_ALONE

    @property
    def shape(self) -> tuple[object, ...]:
        """The values that requests of one batch have in common; seeds and negative prompts may differ."""
        parameters = self.parameters
        alone = self.prompt.id if self.alone else None
        return (
            parameters.width,
            parameters.height,
            parameters.num_inference_steps,
            parameters.guidance_scale,
            parameters.true_cfg_scale,
            parameters.scheduler,
            parameters.loras,
            self.lora_files,
            self.chunks,
            alone,
        )

    def per_image(self) -> list[Request]:
        """Return one request per image; this one is for the first, with the seed of the image number 0."""
        parameters = self.parameters
        return [
            replace(
                self,
                candidate=candidate,
                number=number,
                parameters=replace(parameters, seed=(parameters.seed + number) % SEEDS),
            )
            for candidate, number in enumerate(range(self.number, self.number + self.num_images))
        ]


def request(
    prompt: Prompt,
    requested: Sequence[RequestedParameters],
    multiple: int = 8,
    limits: Limits | None = None,
) -> Request:
    """Return the request for the prompt's first image, with the run's parameters, the most specific first.

    Its chunks are not counted yet. A size computed from an aspect ratio is a multiple of ``multiple``.
    Without ``limits``, a prompt may request everything that is valid. Raises PromptFailed
    (``invalid_document``, ``invalid_prompt``, ``invalid_parameters`` or ``abandoned``).
    """
    if prompt.fault is not None:
        raise PromptFailed(ErrorCode.INVALID_DOCUMENT, prompt.fault)
    if prompt.deaths >= DEATHS_BEFORE_ABANDONED:
        raise PromptFailed(
            ErrorCode.ABANDONED, f"{prompt.deaths} workers died or stalled while processing it"
        )
    text = check_prompt_text(prompt.text, prompt.prompt_tags)
    parameters = resolve_parameters((prompt.requested, *requested), seed=prompt.id.seed, multiple=multiple)
    if limits is not None:
        limits.check(parameters)
    return Request(prompt=prompt, text=text, parameters=parameters, num_images=parameters.num_images)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfiguration:
    """The model for a team's prompts, and parameters for all of them.

    ``safety_checker`` False disables the model's own checker. ``feature_cache`` and ``autoencoder`` are
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


MAX_RETRY_DELAY = 86_400.0
"""The maximum delay in seconds between two attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """An image that is stored at ``image_url``, with the SHA-256 of its bytes.

    ``text`` is the text it was generated from, ``used`` all other parameters, by the names under which they
    are recorded. ``evaluation`` is an evaluator's assessment. ``number`` is its number within the prompt,
    from 0; ``iteration`` is the iteration that made it, from 1. ``negative_left_out`` is the request's.
    """

    image_url: str
    sha256: str
    text: str
    used: Mapping[str, object]
    number: int = 0
    iteration: int = 1
    truncated: bool = False
    evaluation: Evaluation | None = None
    negative_left_out: bool = False

    @property
    def score(self) -> float | None:
        """The evaluator's score in [0, 1]; None if there is none."""
        return None if self.evaluation is None else self.evaluation.score


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A prompt whose images are stored, in the order of their numbers.

    The first image is the result; the others are additional images of a prompt with several. ``text`` is the
    prompt's own text. In a loop, the result is the best of its ``tries``, made in ``iterations`` iterations.
    """

    prompt: Prompt
    text: str
    images: tuple[StoredImage, ...]
    tries: tuple[StoredImage, ...] = ()
    iterations: int = 0

    @property
    def claim(self) -> Claim:
        """The claim under which it was made."""
        return self.prompt.claim

    @property
    def first(self) -> StoredImage:
        """The image that is the result."""
        return self.images[0]

    @property
    def images_made(self) -> int:
        """The number of images made under this claim."""
        return _images_in(self.iterations, self.tries) if self.tries else len(self.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsRefinement:
    """A prompt whose ``tries`` are not good enough after ``iterations`` iterations.

    It is pending again at once; its next iteration uses the text ``next_prompt``. ``text`` is its own text.
    """

    prompt: Prompt
    text: str
    tries: tuple[StoredImage, ...]
    iterations: int
    next_prompt: str

    @property
    def claim(self) -> Claim:
        """The claim under which the last iteration was made."""
        return self.prompt.claim

    @property
    def first(self) -> StoredImage:
        """The image that would be the result."""
        return best_of(self.tries)

    @property
    def images_made(self) -> int:
        """The number of images made under this claim."""
        return _images_in(self.iterations, self.tries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A prompt that failed permanently, with a message for its owner.

    ``written`` is False if its document could not be written: it keeps what it holds.
    """

    prompt: Prompt
    code: ErrorCode
    message: str
    attempts: int
    written: bool = True

    @property
    def claim(self) -> Claim:
        """The claim under which it failed."""
        return self.prompt.claim


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLater:
    """A prompt that failed but may be retried: pending again, not before ``wait`` seconds from now."""

    prompt: Prompt
    code: ErrorCode
    message: str
    attempts: int
    wait: float

    @property
    def claim(self) -> Claim:
        """The claim under which it failed."""
        return self.prompt.claim


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitsScore:
    """A prompt whose ``images`` are stored, of which some have no score since the evaluator failed.

    It is pending again at once; a later claim scores the stored images, and generates those that are missing.
    """

    prompt: Prompt
    text: str
    images: tuple[StoredImage, ...]

    @property
    def claim(self) -> Claim:
        """The claim under which the images were made."""
        return self.prompt.claim


Outcome = Completed | NeedsRefinement | AwaitsScore | Failed | RetryLater


def best_of(tries: Sequence[StoredImage]) -> StoredImage:
    """Return the try with the highest score, the first among equals; scores come before missing scores."""
    return max(tries, key=lambda image: -1.0 if image.score is None else image.score)


def _images_in(iteration: int, tries: Sequence[StoredImage]) -> int:
    return sum(image.iteration == iteration for image in tries)


def failure(prompt: Prompt, exc: PromptFailed, max_attempts: int) -> Failed | RetryLater:
    """Return a permanent failure, or a retry after a growing delay: 2, 8, 32 … seconds, at most a day."""
    # An abandoned prompt was not attempted this time.
    attempts = prompt.attempts + (exc.code is not ErrorCode.ABANDONED)
    if exc.code.retryable and attempts < max_attempts:
        wait = min(2.0 * 4 ** min(attempts - 1, 20), MAX_RETRY_DELAY)
        return RetryLater(prompt=prompt, code=exc.code, message=str(exc), attempts=attempts, wait=wait)
    return Failed(prompt=prompt, code=exc.code, message=str(exc), attempts=attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluator's assessment of an image.

    ``score`` is in [0, 1], where 1 means all that the prompt asks for; None if the image could not be
    evaluated, for the reason in ``error``. ``matches`` and ``missing`` are short phrases. ``better_prompt``
    is a text to try instead, if the evaluator proposes one. ``evaluator`` is the evaluator's name.
    """

    evaluator: str
    score: float | None = None
    matches: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    better_prompt: str | None = None
    error: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that was recorded as ``document``; raise ValueError if it is malformed."""
        score, phrases = document.get("score"), {n: document.get(n, []) for n in ("matches", "missing")}
        fields = {name: document.get(name) for name in ("evaluator", "better_prompt", "error")}
        texts = [
            *phrases["matches"],
            *phrases["missing"],
            *(text for text in fields.values() if text is not None),
        ]
        valid_score = score is None or (isinstance(score, int | float) and 0 <= score <= 1)
        if fields["evaluator"] is None or not valid_score or not all(isinstance(text, str) for text in texts):
            raise ValueError("not an evaluation")
        values: Any = {**fields, **{name: tuple(words) for name, words in phrases.items()}}
        return cls(**values, score=score)

    @property
    def document(self) -> dict[str, object]:
        """The document to record, without empty fields."""
        fields = {
            "evaluator": self.evaluator,
            "score": self.score,
            "matches": list(self.matches),
            "missing": list(self.missing),
            "better_prompt": self.better_prompt,
            "error": self.error,
        }
        return {name: value for name, value in fields.items() if value not in (None, [])}


SMALLEST_SIZE: Final = RequestedParameters(width=128, height=128)
"""Placeholder for the model's own size where only what is certain to exceed a limit may be refused.

It is at most the size of every model, and large enough for every aspect ratio.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """The maximum pixels of an image, steps of an image, images of a prompt, and work of a prompt.

    The work is images × steps × megapixels; a megapixel is 1,000,000 pixels. A refinement loop's candidates
    and iterations are the operator's own choice and do not count as images.
    """

    max_pixels: int = 4096**2
    max_steps: int = 1000
    max_images: int = 100
    max_work: float = 25_000

    def check(self, parameters: Parameters) -> None:
        """Raise PromptFailed (``invalid_parameters``) for the first limit that the parameters exceed."""
        width, height, steps = parameters.width, parameters.height, parameters.num_inference_steps
        images, pixels = parameters.num_images, width * height
        if pixels > self.max_pixels:
            raise _too_much(f"width × height is {width}×{height}, {pixels:,} pixels", self, "max_pixels")
        if steps > self.max_steps:
            raise _too_much(f"num_inference_steps is {steps:,}", self, "max_steps")
        if images > self.max_images:
            raise _too_much(f"num_images is {images:,}", self, "max_images")
        if images * steps * pixels > self.max_work * 1e6:
            parts = f"num_images {images:,} × num_inference_steps {steps:,} × {pixels / 1e6:.2f} megapixels"
            raise _too_much(f"{parts} is {images * steps * pixels / 1e6:,.1f}", self, "max_work")


def _too_much(request: str, limits: Limits, name: str) -> PromptFailed:
    flag = name.replace("_", "-")
    maximum = f"{getattr(limits, name):,}".removesuffix(".0")
    message = f"{request}; this job allows at most {maximum} (--{flag})"
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)
