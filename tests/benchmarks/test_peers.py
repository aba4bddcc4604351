"""The comparison with other ways to run the same prompts: what is judged, and when it stops measuring."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.peers.__main__ import Pace, Task, largest_difference, result, settled
from benchmarks.results import report

TASK = Task(images=16, batch=8, steps=2)
JOB = "this job, SQLite and folder"


def paces(whole, steady):
    return [Pace(whole, steady), Pace(whole * 1.01, steady and steady * 0.99)]


def test_the_best_of_each_is_judged():
    """The job is compared with the loop in both ways, with every other in the whole process alone."""
    field = {"plain loop": paces(20.0, 16.0), "diffusers-cli": paces(30.0, None), JOB: paces(25.0, 16.0)}
    outcome = result(TASK, field, {1: 0, 8: 2}, {"Ray Data": "no pandas"})
    assert [(check.measured, check.met) for check in outcome.checks] == [
        (1.0, True),
        (0.8, False),
        (1.2, True),
        (0, True),
        (2, False),
    ]
    assert outcome.settings["absent"] == {"Ray Data": "no pandas"}
    assert "| diffusers-cli | all at once | 30.0 | 2 |" in report(outcome)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([Pace(20.0, 16.0)], False),
        ([Pace(20.0, 16.0), Pace(20.9, 15.3)], True),
        ([Pace(20.0, 16.0), Pace(21.1, 16.0)], False),
        ([Pace(20.0, 16.0), Pace(20.0, 15.1)], False),
        ([Pace(30.0, None), Pace(31.0, None)], True),
        ([Pace(26.0, 9.0), Pace(20.0, 16.0), Pace(20.5, 15.8)], True),
    ],
)
def test_it_goes_on_until_the_two_best_agree(measured, expected):
    """Two rounds agree within 5 % in both figures; one round never does."""
    assert settled(measured) is expected


def test_images_are_compared_by_name(tmp_path):
    """The largest difference of any value is found; folders of different names are an error."""
    for folder, value in (("one", 100), ("other", 97)):
        (tmp_path / folder).mkdir()
        pixels = np.full((4, 4, 3), 100, np.uint8)
        pixels[1, 2, 0] = value
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    assert largest_difference(tmp_path / "one", tmp_path / "other") == 3
    (tmp_path / "one" / "b.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match="different images"):
        largest_difference(tmp_path / "one", tmp_path / "other")
