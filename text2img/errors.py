"""What can go wrong, and what the process says of it by its exit status.

    Text2ImgError
    ├── ConfigurationError   2          wrong usage or configuration, found before anything was claimed
    ├── RunFailed            1          something the whole run needs has failed; what was claimed is released
    │   ├── DatabaseFailed
    │   │   └── DatabaseMissing         none was made yet, and this command makes none
    │   ├── StorageFailed
    │   ├── BrokerFailed
    │   ├── ModelFailed
    │   └── DeviceFailed
    ├── Stopped              128 + n    signal n asked the run to end
    ├── PromptFailed         –          one prompt's own failure: data, not the run's end
    ├── EvaluationFailed     –          a picture that could not be judged: it is kept, without a score
    ├── Unreadable           –          a stored picture that cannot be read back: whoever looks does without
    └── ClaimLost            –          another worker holds the prompt now: drop the outcome

A message is one line that says what is wrong and what to do. This module does not know who raises what.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Why a prompt ended in ``error``. Only ``GENERATION_FAILED`` may go better another time."""

    INVALID_PROMPT = "invalid_prompt"  # the text is missing, empty, or no text
    INVALID_PARAMETERS = "invalid_parameters"  # a parameter has the wrong type, range or name
    GENERATION_FAILED = "generation_failed"  # the model raised while it worked on this prompt
    NOT_FINITE = "not_finite"  # NaN or infinity in the picture, also when decoded in fp32
    OUT_OF_MEMORY = "out_of_memory"  # does not fit the device even alone
    SAFETY = "safety"  # the model's safety checker flagged the picture
    STORAGE_REJECTED = "storage_rejected"  # the storage refused this one object
    LORA_FAILED = "lora_failed"  # a LoRA could not be had or does not fit
    ABANDONED = "abandoned"  # workers died each time they tried it

    @property
    def retryable(self) -> bool:
        """Whether the same prompt may succeed when it is tried again unchanged."""
        return self is ErrorCode.GENERATION_FAILED


class Text2ImgError(Exception):
    """The root of all errors this project raises on purpose."""

    exit_status = 1


class ConfigurationError(Text2ImgError):
    """Wrong usage or configuration: running it again unchanged would fail again."""

    exit_status = 2


class RunFailed(Text2ImgError):  # noqa: N818 - it says what happened, as its kin do
    """Something the whole run needs has failed; running it again later may succeed."""


class DatabaseFailed(RunFailed):
    """The database cannot be reached, refuses, or broke its promises."""


class DatabaseMissing(DatabaseFailed):
    """There is no database yet, and whoever asked must not make one."""


class StorageFailed(RunFailed):
    """The storage cannot be reached or refuses every object."""


class BrokerFailed(RunFailed):
    """The message broker cannot be reached, or refuses what it is asked."""


class ModelFailed(RunFailed):
    """The model is missing, incomplete, mismatched, or cannot be loaded."""


class DeviceFailed(RunFailed):
    """The device that was asked for is not there or has stopped working."""


class Stopped(Text2ImgError):  # noqa: N818 - no error: somebody asked for it
    """A signal asked the run to end. ``number`` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number
        self.exit_status = 128 + number


class PromptFailed(Text2ImgError):  # noqa: N818 - becomes data: the prompt's outcome
    """One prompt failed by its own fault; ``code`` says how, the message is a sentence for its owner."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class EvaluationFailed(Text2ImgError):  # noqa: N818 - it says what happened, as its kin do
    """A picture could not be judged; it is stored all the same, without a score."""


class ObjectUnreadable(Text2ImgError):  # noqa: N818 - it says what happened, as its kin do
    """One stored object cannot be read back: it is gone, elsewhere, too large, or not for this account."""


class ClaimLost(Text2ImgError):  # noqa: N818 - it says what happened, as its kin do
    """The claim ran out and another worker may hold the prompt: nothing more may be written about it."""
