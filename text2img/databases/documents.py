"""Conversion between records and the fields of documents or rows, for every adapter.

Covers prompts, refinement attempts, model configurations, completed and failed prompts; ``run_documents`` has
runs.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, cast

from text2img.databases import CompletedPrompt, Failure, NewPrompt, UndeliveredOutcome
from text2img.databases.records import HASH_FIELDS, recorded_hashes, tries_of
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts import ModelConfiguration, Prompt, RequestedParameters, Status
from text2img.prompts.parameters import (
    PARAMETER_NAMES,
    STYLE_CHECKS,
    check_aspect_ratio,
    check_integer,
    check_loras,
    check_num_images,
    check_number,
    check_pixels,
    check_prompt_text,
    check_scheduler,
    check_text,
)
from text2img.prompts.quoting import quoted
from text2img.prompts.syntax import name_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from text2img.prompts import Claim, PromptId


log = logging.getLogger(__name__)

CLAIM_FIELDS: Final = ("claimed_by", "claim_token", "lease_expires_at", "started_claim")
"""The fields that a claim sets and that are removed when it ends; ``claim_number`` is never removed."""
FAILURE_FIELDS: Final = ("error", "error_code", "error_at", "attempts", "deaths", "not_before")
OPTIONAL_RESULT_FIELDS: Final = ("image_urls", "score", "scores", "evaluation", "iterations", "tries")
"""Fields that only some completed prompts have: those with several images, an evaluator, or a loop."""
NEXT_PROMPT_FIELD: Final = "next_prompt"
"""In a pending prompt: the text for the next iteration of its loop."""
UNSCORED_FIELD: Final = "unscored_images"
"""In a pending prompt: its stored images, of which some wait for the evaluator."""
SUCCESS_FIELDS: Final = ("image_url", "completed_at", "used", *OPTIONAL_RESULT_FIELDS)
WEBHOOK_PENDING: Final = "webhook_untold"
"""In a final prompt: the id of the notification for its own webhook, until that is saved."""
WEBHOOK_ID: Final = "webhook_message_id"
"""In a final prompt: the same id, as long as the outcome stays the same, to send the notification again."""
OUTCOME_FIELDS: Final = (
    *CLAIM_FIELDS,
    *FAILURE_FIELDS,
    *SUCCESS_FIELDS,
    NEXT_PROMPT_FIELD,
    UNSCORED_FIELD,
    "untold",
    WEBHOOK_PENDING,
    WEBHOOK_ID,
    "run_id",
)
"""Fields that are removed from a prompt that is requeued as if new."""
PROMPT_FIELDS: Final = (
    "text",
    "prompt_tags",
    "webhook_url",
    *PARAMETER_NAMES,
    "priority",
    "attempts",
    "deaths",
    "claim_number",
    "started_claim",
    *("status", "tries", NEXT_PROMPT_FIELD, UNSCORED_FIELD, *HASH_FIELDS),
)
"""The fields of a prompt's document that a claim reads."""
MAX_BYTES: Final = 8_000_000
"""Approximate size of the outcomes that are held in memory at once for prompts' own webhooks."""
NOTIFICATION_FIELDS: Final = (
    *("text", "prompt_tags", "status", "image_url", "image_urls", "score", "iterations", "used"),
    *("error_code", "error", "attempts"),
)
"""The fields from which notifications about an outcome are made."""

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
COUNTABLE: Final = 2**53
"""Upper bound of counters: below it, every number type of the databases is exact for whole numbers."""


def count_of(value: object) -> int:
    """Return a counter's value; 0 if it is no valid count, as another program may have left it."""
    number = number_of(value)
    return int(number) if 0 <= number < COUNTABLE else 0


def number_of(value: object) -> float:
    """Return a number's value; 0 if it is not a finite number, or an integer that no float can hold."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return value if numeric and abs(value) <= sys.float_info.max else 0  # type: ignore[arg-type,return-value]


def merged_counts(values: Iterable[tuple[object, int]]) -> dict[str, int]:
    """Return the number of documents for each value, as text of at most 60 printable characters."""
    counts: Counter[str] = Counter()
    for value, number in values:
        counts[quoted(value)] += number
    return dict(counts.most_common())


def object_of(value: object) -> dict[str, Any]:
    """Return an object's fields; empty if the value is not an object."""
    return value if isinstance(value, dict) else {}


def prompt_of(claim: Claim, fields: Mapping[str, object], deaths: int) -> Prompt:
    """Return the claimed prompt; its text and parameters are not validated.

    A document that cannot be read is a prompt with a ``fault``, not an error.
    """
    try:
        return _prompt_of(claim, fields, deaths)
    except Exception as exc:
        log.debug("the document of %s cannot be read", claim.id, exc_info=exc)
        reason = f"the document cannot be read ({type(exc).__name__}); check its fields"
        return Prompt(claim=claim, text=None, deaths=deaths, fault=reason)


def _prompt_of(claim: Claim, fields: Mapping[str, object], deaths: int) -> Prompt:
    return Prompt(
        claim=claim,
        text=fields.get("text"),
        prompt_tags=fields.get("prompt_tags"),
        webhook_url=fields.get("webhook_url"),
        requested=RequestedParameters.of(fields),
        priority=number_of(fields.get("priority")),
        attempts=count_of(fields.get("attempts")),
        deaths=deaths,
        tries=tries_of(fields.get("tries")),
        unscored=tries_of(fields.get(UNSCORED_FIELD)),
        next_prompt=_text(fields.get(NEXT_PROMPT_FIELD)) or None,
        recorded_hashes=recorded_hashes(fields),
    )


def deaths_at_claim(fields: Mapping[str, object]) -> int:
    """Return a candidate's deaths once it is claimed: one more if its last claim died on the device."""
    started = fields.get("started_claim")
    was_started = fields.get("status") == Status.PROCESSING and started is not None
    died = was_started and started == fields.get("claim_number")
    return count_of(fields.get("deaths")) + (1 if died else 0)


def parse_id_candidates(text: str) -> list[object]:
    """Return the ids that a text may denote: the text and, if it has the form of a number, the number."""
    if not _NUMBER.fullmatch(text):
        return [text]
    number = float(text) if "." in text else int(text)
    fits = not isinstance(number, int) or -(2**63) <= number < 2**63
    return [text, number] if fits else [text]


def new_fields(prompt: NewPrompt, input_file: str | None = None) -> dict[str, object]:
    """Return the fields of a prompt to add, without its id and ``created_at``."""
    content = {**content_of(prompt), "input_file": input_file}
    given = {name: value for name, value in content.items() if value is not None}
    return {**given, "status": Status.PENDING.value}


def content_of(prompt: NewPrompt) -> dict[str, object]:
    """Return all fields that a prompt's owner may set; None for those not set."""
    return {
        "text": prompt.text,
        "prompt_tags": None,  # a new prompt's text already contains its tags
        "dataset_id": prompt.dataset_id,
        "priority": prompt.priority,
        "webhook_url": prompt.webhook_url,
        "style_id": prompt.style_id,
        **{name: getattr(prompt.requested, name) for name in PARAMETER_NAMES},
    }


def stored_content(prompt_id: PromptId, fields: Mapping[str, object]) -> NewPrompt | None:
    """Return what a prompt's owner has set, to compare it with a new prompt; None if it cannot be read."""
    try:
        return NewPrompt(
            id=prompt_id,
            text=str(effective_text(fields)),
            requested=RequestedParameters.of(fields),
            **{name: cast("Any", fields.get(name)) for name in _LABELS},
        )
    except Exception as exc:  # noqa: BLE001 - whatever the document holds, it is not the new prompt
        log.debug("a stored prompt cannot be compared with a message: %s", type(exc).__name__)
        return None


_LABELS: Final = ("dataset_id", "priority", "webhook_url", "style_id")
CONTENT_FIELDS: Final = ("text", "prompt_tags", *_LABELS, *PARAMETER_NAMES)
"""The fields that ``stored_content`` reads."""


def rejected_prompt(prompt_id: PromptId, reason: str) -> PromptFailed:
    """Return the error for a new prompt that the database rejects because of what it holds."""
    shown = reason.partition("\n")[0][:300]
    message = f"the database does not take {quoted(prompt_id.text)}: {shown}"
    return PromptFailed(ErrorCode.INVALID_DOCUMENT, message)


def undelivered_of(prompt_id: PromptId, fields: Mapping[str, Any]) -> UndeliveredOutcome:
    """Return the outcome to deliver for a completed or failed prompt's document.

    Never raises: from a document that cannot be read, the outcome has only the image or the error.
    """
    try:
        return _undelivered_of(prompt_id, fields)
    except Exception as exc:  # noqa: BLE001 - one document must not hold back the others
        log.warning(
            "the outcome of %s is delivered in part: %s", ascii(str(prompt_id))[:100], type(exc).__name__
        )
    if fields.get("status") == Status.COMPLETED:
        return UndeliveredOutcome(id=prompt_id, text=None, image_url=_text(fields.get("image_url")) or None)
    code, message = _text(fields.get("error_code")), _text(fields.get("error"))
    return UndeliveredOutcome(id=prompt_id, text=None, code=code, message=message)


def _undelivered_of(prompt_id: PromptId, fields: Mapping[str, Any]) -> UndeliveredOutcome:
    text = _text_or_none(effective_text(fields))
    if fields.get("status") == Status.COMPLETED:
        used, urls = object_of(fields.get("used")), fields.get("image_urls")
        return UndeliveredOutcome(
            id=prompt_id,
            text=text,
            image_url=_text(fields.get("image_url")) or None,
            image_urls=tuple(map(_text, urls)) if isinstance(urls, list) else (),
            score=score if isinstance(score := fields.get("score"), float) else None,
            iterations=_whole(fields.get("iterations")),
            seed=_whole(used.get("seed")),
            steps=_whole(used.get("num_inference_steps")),
            guidance_scale=None if (guidance := used.get("guidance_scale")) is None else number_of(guidance),
        )
    return UndeliveredOutcome(
        id=prompt_id,
        text=text,
        code=_text(fields.get("error_code")),
        message=_text(fields.get("error")),
        attempts=count_of(fields.get("attempts")),
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def effective_text(fields: Mapping[str, Any]) -> object:
    """Return the text to generate from; if it is invalid, the ``text`` field as it is."""
    try:
        return check_prompt_text(fields.get("text"), fields.get("prompt_tags"))
    except PromptFailed:
        return fields.get("text")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


MODEL_TYPE: Final = "stable_diffusion"
_CHECKS: Final[dict[str, Callable[[str, object], object]]] = {
    "model_path": check_text,
    "revision": check_text,
    "variant": check_text,
    "negative_prompt": check_text,
    "scheduler": lambda _, value: check_scheduler(value),
    "num_inference_steps": lambda name, value: check_integer(name, value, 1, 1000),
    **dict.fromkeys(
        ("guidance_scale", "true_cfg_scale"), lambda name, value: check_number(name, value, 0, 100)
    ),
    "width": check_pixels,
    "height": check_pixels,
    "aspect_ratio": check_aspect_ratio,
    "num_images": check_num_images,
    "lora": lambda _, value: check_loras(value),
    "feature_cache": lambda name, value: check_integer(name, value, 0, 1000),
    "autoencoder": check_text,
    **STYLE_CHECKS,
}


def configuration_of(config_id: PromptId, fields: Mapping[str, object]) -> ModelConfiguration:
    """Return the model configuration; raise ConfigurationError that names the first invalid field.

    Any other error in reading it is a ConfigurationError, too.
    """
    text = str(config_id)
    where = f"model configuration {text if text.isprintable() and len(text) <= 60 else quoted(text)}"
    try:
        return _configuration_of(config_id, where, fields)
    except ConfigurationError:
        raise
    except Exception as exc:
        reason = f"it cannot be read ({type(exc).__name__}); check its fields"
        raise ConfigurationError(f"{where}: {reason}") from exc


def _configuration_of(config_id: PromptId, where: str, fields: Mapping[str, object]) -> ModelConfiguration:
    unchecked = {name: value for name, value in fields.items() if value is not None and name != "_id"}
    model_type = unchecked.pop("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise ConfigurationError(f"{where}: model_type must be {MODEL_TYPE}; it is {quoted(model_type)}")
    safety_checker = unchecked.pop("safety_checker", True)
    if not isinstance(safety_checker, bool):
        raise ConfigurationError(
            f"{where}: safety_checker must be true or false; it is {quoted(safety_checker)}"
        )
    checked = {name: _checked(where, name, value) for name, value in unchecked.items()}
    return ModelConfiguration(
        model_path=_text_at(checked, "model_path"),
        revision=_text_at(checked, "revision"),
        variant=_text_at(checked, "variant"),
        safety_checker=safety_checker,
        feature_cache=cast("int | None", checked.get("feature_cache")),
        autoencoder=_text_at(checked, "autoencoder"),
        requested=RequestedParameters.of(checked),
        id=config_id,
    )


def missing_configuration(config_id: str, collection: str) -> ConfigurationError:
    """Return the error for a requested configuration that does not exist."""
    return ConfigurationError(
        f"{collection} has no model configuration with the _id {quoted(config_id)}; check --model-config-id"
    )


def _checked(where: str, name: str, value: object) -> object:
    check = _CHECKS.get(name)
    if check is None:
        hint = name_hint(name, (*_CHECKS, "safety_checker", "model_type"))
        raise ConfigurationError(f"{where}: {quoted(name)} is not a field of a model configuration{hint}")
    try:
        return check(name, value)
    except PromptFailed as exc:
        raise ConfigurationError(f"{where}: {exc}") from None


def _text_at(checked: Mapping[str, object], name: str) -> str | None:
    value = checked.get(name)
    return None if value is None else str(value)


_COMMON_FIELDS: Final = ("text", "prompt_tags", "run_id")
COMPLETED_FIELDS: Final = (
    *(*_COMMON_FIELDS, "image_url", "image_urls", "completed_at", "used"),
    *("score", "scores", "evaluation", "iterations", "tries"),
    *HASH_FIELDS,
)
FAILED_PROMPT_FIELDS: Final = (*_COMMON_FIELDS, "error", "error_code", "error_at", "attempts")


def completed_prompt(
    prompt_id: PromptId, dataset_id: str | None, fields: Mapping[str, Any]
) -> CompletedPrompt:
    """Return a completed prompt; ``fields`` holds datetimes, dicts and lists, not their encodings."""
    iterations = count_of(fields.get("iterations"))
    return CompletedPrompt(
        id=prompt_id,
        text=_text_of(fields),
        dataset_id=dataset_id,
        run_id=_text_or_none(fields.get("run_id")),
        image_urls=_urls(fields),
        completed_at=_moment(fields.get("completed_at")),
        used=object_of(fields.get("used")),
        scores=_scores(fields),
        evaluation=object_of(fields.get("evaluation")),
        iterations=iterations or None,
        tries=tuple(entry for entry in _list(fields.get("tries")) if isinstance(entry, dict)),
        hashes=recorded_hashes(fields),
    )


def failed_prompt(prompt_id: PromptId, dataset_id: str | None, fields: Mapping[str, Any]) -> Failure:
    """Return a permanently failed prompt; ``fields`` as for ``completed_prompt``."""
    return Failure(
        id=prompt_id,
        text=_text_of(fields),
        dataset_id=dataset_id,
        run_id=_text_or_none(fields.get("run_id")),
        code=_text_or_none(fields.get("error_code")) or "",
        message=_text_or_none(fields.get("error")) or "",
        attempts=count_of(fields.get("attempts")),
        failed_at=_moment(fields.get("error_at")),
    )


def _urls(fields: Mapping[str, Any]) -> tuple[str, ...]:
    urls = [url for url in _list(fields.get("image_urls")) if isinstance(url, str)]
    first = _text_or_none(fields.get("image_url"))
    return tuple(urls or ([first] if first else []))


def _scores(fields: Mapping[str, Any]) -> tuple[float | None, ...]:
    scores = _list(fields.get("scores"))
    if not scores and fields.get("score") is not None:
        scores = [fields["score"]]
    return tuple(map(_score, scores))


def _score(value: object) -> float | None:
    """Return a number in [0, 1]; None for any other value."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric and 0 <= value <= 1 else None  # type: ignore[operator, arg-type]


def _text_of(fields: Mapping[str, Any]) -> str:
    text = effective_text(fields)
    return text if isinstance(text, str) else "" if text is None else str(text)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _moment(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None
