"""Whatever can stand in a document or a row: strategies for prompts that no sane owner would write."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from hypothesis import strategies as st

from text2img.prompts.parameters import PARAMETER_NAMES

WISHED = ("text", "prompt_tags", "webhook_url", *PARAMETER_NAMES, "priority", "dataset_id")
"""What an owner may write, and is to be told of where it is wrong."""
OWN = (
    *("status", "claimed_by", "claim_number", "claim_token", "lease_expires_at", "started_claim"),
    *(
        "not_before",
        "attempts",
        "deaths",
        "image_url",
        "image_urls",
        "completed_at",
        "sha256",
        "run_id",
        "used",
    ),
    *(
        "error",
        "error_code",
        "error_at",
        "untold",
        "webhook_untold",
        "webhook_message_id",
        "unscored_images",
        "score",
        "scores",
        "evaluation",
    ),
)
"""What the job writes, so that whatever else stands there may be overwritten."""
EXTREMES = (0, -1, 0.5, -0.0, 2**31, 2**53, 2**63 - 1, -(2**63), 1e300, -1e300, 5e-324, float("inf"))
NUMBERS = st.sampled_from(EXTREMES) | st.integers(-(2**63), 2**63 - 1) | st.floats()
# No lone surrogates: neither BSON's encoder nor SQLite's takes them.
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.text(st.sampled_from("\0\n\r\t\x1b\x7f\u202e\u2028\ufeff${}.'\"é😀"), max_size=10),
    st.sampled_from(["pending", "$text", "$$NOW", "NaN", "9" * 30, "x" * 25_000, "1999-01-01T00:00:00Z"]),
)
_PAST = st.datetimes(datetime(1, 1, 2), datetime(2026, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
_BYTES = st.binary(max_size=20)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.integers(-(2**63), 2**63 - 1).map(Int64),
    TEXTS,
    _PAST,
    st.builds(ObjectId, st.binary(min_size=12, max_size=12)),
    st.uuids() | st.just(uuid.UUID(int=0)),
    st.sampled_from(["NaN", "sNaN", "-Infinity", "1E+6000", "0.1", "-0", "7"]).map(Decimal128),
    st.builds(Binary, _BYTES, st.sampled_from([0, 5, 6, 128])) | _BYTES,
    st.builds(Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.sampled_from([MinKey(), MaxKey(), Code("x()"), Code("x()", {"a": 1})]),
)
_KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0$."), max_size=8)
_NO_IDS = st.builds(Regex, st.sampled_from(["", "^a", "(", "\\d+"]), st.sampled_from([0, 2]))


def _nested(children):
    return st.lists(children, max_size=3) | st.dictionaries(_KEYS, children, max_size=3)


VALUES = st.one_of(_SCALARS, NUMBERS, _NO_IDS, st.recursive(_SCALARS, _nested, max_leaves=6))
IDS = st.one_of(_SCALARS, st.dictionaries(_KEYS, _SCALARS, max_size=3)).filter(
    lambda value: "nan" not in repr(value).lower()
)
"""MongoDB refuses lists and regular expressions as ids; the tests' server trips over NaN in one."""
USUAL = {
    "text": st.sampled_from(["a boat", "a cat\0", "", "  ", "half a pair, escaped: \\ud800"]),
    "negative_prompt": st.just("blurry"),
    "seed": st.sampled_from([0, 7, 7.0, 2**63 - 1]),
    "num_inference_steps": st.sampled_from([1, 30.0, 1000]),
    "guidance_scale": st.sampled_from([0, 7.5, 100]),
    "width": st.sampled_from([64, 64.0, 65]),
    "height": st.sampled_from([64, 4096, "64"]),
    "scheduler": st.sampled_from(["euler", "eular", "dpm++"]),
    "prompt_tags": st.sampled_from([["a", "boat"], [], ["a", 7], ["  "], "a boat", {"a": "boat"}]),
    "aspect_ratio": st.sampled_from(["1:1", "1:2", "2:1", "5:4"]),
    "num_images": st.sampled_from([1, 2, 3.0, 0, 101]),
    "lora": st.sampled_from([{"path": "ink"}, [{"path": "a", "weight": -1}, {"path": "b"}], [], [{}], "ink"]),
    "priority": st.sampled_from([0, 5, -2.5]),
    "status": st.sampled_from(["pending", "processing", None, "paused", "completed", "error"]),
    "untold": st.sampled_from([True, "msg_old"]),
    "run_id": st.sampled_from(["night", "old"]),
    "error_code": st.sampled_from(["safety", "no such code"]),
}


def documents(values=VALUES, ids=IDS, extra=_KEYS):
    """Documents of some of the known fields, each as usual or with any value at all, and of some others."""
    known = {
        name: st.one_of(*([USUAL[name]] * 2 if name in USUAL else []), values) for name in (*WISHED, *OWN)
    }
    others = st.dictionaries(extra.map(lambda key: f"my {key}"), values, max_size=2)
    return st.builds(
        lambda own, wished, mine, _id: {"_id": _id, **mine, **wished, **own},
        st.fixed_dictionaries({}, optional={name: known[name] for name in OWN}),
        st.fixed_dictionaries(
            {"text": known["text"]}, optional={name: known[name] for name in WISHED if name != "text"}
        ),
        others,
        ids,
    )
