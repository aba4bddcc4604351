"""The files beside images: whatever a document or an evaluator left in an outcome, they are plain JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType

import pytest
import yaml
from bson import ObjectId

from tests.outcomes import completed
from text2img.databases import CompletedPrompt
from text2img.prompts import Claim, Evaluation, Prompt, PromptId, RequestedParameters
from text2img.prompts.ids import IterationFolderName
from text2img.reports.run_files import RunSummary, Sidecars
from text2img.storage.local import LocalStorage

PROMPT = Prompt(
    claim=Claim(id=PromptId("str", "a"), worker="w", number=1),
    text="a boat", requested=RequestedParameters(seed=1),
)  # fmt: skip


@pytest.fixture
def sidecars(tmp_path):
    return Sidecars(LocalStorage(str(tmp_path)), IterationFolderName(), lambda _: True)


def _read(folder):
    files = {file.name: file.read_bytes() for file in (folder / "results" / "a").iterdir()}
    return {
        name: yaml.safe_load(data) if name.endswith("yaml") else json.loads(data, parse_constant=pytest.fail)
        for name, data in files.items()
    }


def _outcome(used, score=0.5):
    outcome = completed(PROMPT, evaluations=[Evaluation(evaluator="demo", score=score)])
    return replace(outcome, images=tuple(replace(image, used=used) for image in outcome.images))


USED = {
    "owner": ObjectId("0123456789abcdef01234567"),
    "made": datetime(2026, 11, 28, tzinfo=UTC),
    "strength": float("nan"),
    "huge": 10**5000,
    "key": b"\0",
    "half": "\ud800",
}


def test_what_json_cannot_say_is_null_or_text(tmp_path, sidecars):
    """An ObjectId, a date, NaN, a huge number, bytes, half a character: the files are there and readable."""
    sidecars.write(_outcome(USED, score=float("inf")))
    found = _read(tmp_path)
    assert sorted(found) == [
        "iteration_1_evaluation.json", "iteration_1_results.json", "iteration_1_results.yaml", "summary.json",
    ]  # fmt: skip
    best = found["summary.json"]["best"]
    assert {name: best[name] for name in (*USED, "score")} == {
        "owner": "0123456789abcdef01234567",
        "made": "2026-11-28T00:00:00+00:00",
        "strength": None,
        "huge": None,
        "key": "AA==",
        "half": "\\ud800",
        "score": None,
    }
    assert found["iteration_1_results.yaml"] == found["iteration_1_results.json"]


class Unreadable(dict):
    """Parameters that raise when they are read."""

    def keys(self):
        raise ValueError("not a mapping any more")


def test_a_file_that_cannot_be_made_is_left_out(tmp_path, sidecars, caplog):
    """The image is stored by then: a warning is all, and the next outcome's files are written."""
    sidecars.write(_outcome(MappingProxyType(Unreadable(a=1))))
    assert "cannot be made: ValueError" in caplog.text
    sidecars.write(_outcome({}))
    assert "summary.json" in _read(tmp_path)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 10**400, -(10**4000), "1", None, [1]])
def test_a_try_of_any_numbers_is_on_the_contact_sheet(tmp_path, number):
    """The label of a try that another program has changed is made without the number."""
    entry = {"iteration": number, "seed": number, "score": number, "image_url": "gone"}
    prompt = CompletedPrompt(
        id=PromptId("str", "a"), text="a boat", dataset_id=None, run_id="r", image_urls=(), completed_at=None,
        used={}, tries=(entry,),
    )  # fmt: skip
    summary = RunSummary(None, LocalStorage(str(tmp_path)), lambda: None)
    [candidate] = summary._row(prompt).candidates
    assert (candidate.iteration, candidate.seed, candidate.score) == (1, 0, None)
