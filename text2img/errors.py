"""The exceptions that the project raises, with the process's exit status.

    Text2ImgError
    ├── ConfigurationError   2          wrong usage or configuration, found before anything was claimed
    ├── RunFailed            1          something the whole run needs has failed; its claims are released
    │   ├── DatabaseFailed
    │   │   ├── DatabaseMissing         2: there is no database, and this command does not create one
    │   │   └── WritesRejected          it rejects what this job writes; trying again does not help
    │   ├── StorageFailed
    │   │   └── BucketMissing           2: there is no such bucket
    │   ├── BrokerFailed
    │   ├── ModelFailed
    │   │   └── ModelUnusable
    │   ├── DeviceFailed
    │   └── EvaluatorFailed
    ├── Stopped              128 + n    signal n stopped the run
    ├── PromptFailed         –          one prompt failed: data, the run continues
    ├── EvaluationFailed     –          an image could not be evaluated: it is kept, without a score
    ├── ObjectUnreadable     –          a stored image cannot be read: its reader continues without it
    └── ClaimLost            –          another worker holds the prompt now: the outcome is discarded

A message is one line: the cause, and what to do. A file of prompts may have several errors, a line each.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """The cause of a prompt's ``error``. Only after ``GENERATION_FAILED`` may a retry succeed."""

    INVALID_PROMPT = "invalid_prompt"  # the text is missing, empty, or not text
    INVALID_PARAMETERS = "invalid_parameters"  # a parameter has the wrong type, range or name
    GENERATION_FAILED = "generation_failed"  # the model raised while it worked on this prompt
    NOT_FINITE = "not_finite"  # NaN or infinity in the image, even when decoded in fp32
    OUT_OF_MEMORY = "out_of_memory"  # does not fit into the device's memory, even alone
    SAFETY = "safety"  # the model's safety checker flagged the image
    STORAGE_REJECTED = "storage_rejected"  # the storage refused this one object
    INVALID_DOCUMENT = "invalid_document"  # the document cannot be read, or not be written back
    LORA_FAILED = "lora_failed"  # a LoRA could not be fetched or does not fit the model
    ABANDONED = "abandoned"  # a worker died at every attempt

    @property
    def retryable(self) -> bool:
        """True if the same prompt, unchanged, may succeed at another attempt."""
        return self is ErrorCode.GENERATION_FAILED


class Text2ImgError(Exception):
    """The base class of all errors that this project raises on purpose. Each argument is a line of it."""

    exit_status = 1

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines of the message: one, but for a file with several errors."""
        return tuple(map(str, self.args)) or ("",)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ConfigurationError(Text2ImgError):
    """Wrong usage or configuration: running it again unchanged would fail again."""

    exit_status = 2


class RunFailed(Text2ImgError):  # noqa: N818 - named after the event, like its siblings
    """Something the whole run needs has failed; another run later may succeed."""


class DatabaseFailed(RunFailed):
    """The database cannot be reached, rejects a request, or violates its guarantees."""


class DatabaseMissing(DatabaseFailed):
    """There is no database yet, and the command must not create one."""

    exit_status = 2


class WritesRejected(DatabaseFailed):
    """The database rejects what this job writes, whatever the document: trying again does not help."""


class StorageFailed(RunFailed):
    """The storage cannot be reached or rejects every object."""


class BucketMissing(StorageFailed):
    """The bucket does not exist, as was found before anything was claimed."""

    exit_status = 2


class BrokerFailed(RunFailed):
    """The message broker cannot be reached, or rejects a request."""


class ModelFailed(RunFailed):
    """The model is missing, incomplete, mismatched, or cannot be loaded."""


class ModelUnusable(ModelFailed):
    """The model cannot be run here, however often it is tried: another model or setting is needed."""

    exit_status = 2


class DeviceFailed(RunFailed):
    """The requested device is missing or has stopped working."""


class Stopped(Text2ImgError):  # noqa: N818 - not an error: the user requested it
    """A signal stopped the run. ``number`` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number
        self.exit_status = 128 + number


class PromptFailed(Text2ImgError):  # noqa: N818 - becomes data: the prompt's outcome
    """One prompt failed for a cause of its own; ``code`` classifies it, the message is for its owner."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class EvaluatorFailed(RunFailed):
    """The evaluator rejects every request, or stays unavailable: no image would get a score."""


class EvaluationFailed(Text2ImgError):  # noqa: N818 - named after the event, like its siblings
    """An image could not be evaluated; ``retryable``: the evaluator was unavailable, and may answer later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class ObjectUnreadable(Text2ImgError):  # noqa: N818 - named after the event, like its siblings
    """A stored object cannot be read: it is missing, outside the storage, too large, or forbidden."""


class ClaimLost(Text2ImgError):  # noqa: N818 - named after the event, like its siblings
    """The claim expired and another worker may hold the prompt: no outcome of it may be written."""
