"""Tasks by the variables of each platform."""

from __future__ import annotations

import pytest

from text2img.worker.job import Task, current_task, new_run


@pytest.mark.parametrize(
    ("variables", "host", "task"),
    [
        (
            {"CLOUD_RUN_TASK_INDEX": "3", "CLOUD_RUN_EXECUTION": "job-x7k2p"},
            "localhost",
            Task(3, "job-x7k2p"),
        ),
        ({"JOB_COMPLETION_INDEX": "12"}, "text2img-29384120-12", Task(12, "text2img-29384120")),
        ({"JOB_COMPLETION_INDEX": "12"}, "a-name-that-was-cut", Task(12, None)),
        ({"BATCH_TASK_INDEX": "0", "BATCH_JOB_UID": "night-4711"}, "vm", Task(0, "night-4711")),
        ({"BATCH_TASK_INDEX": "0"}, "vm-0", Task(0, None)),
        ({"CLOUD_RUN_TASK_INDEX": ""}, "host-1", Task()),
        ({"BATCH_TASK_INDEX": "x", "CLOUD_RUN_TASK_INDEX": "-1"}, "host", Task()),
        ({}, "host-1", Task()),
    ],
)
def test_found_by_the_platforms_variables(variables, host, task):
    """Index and execution as each platform tells them; what is no number is none."""
    assert current_task(variables, host) == task


def test_only_tasks_add_to_a_run_id(monkeypatch):
    """A run that is no task keeps the id that it was given; a made one meets no other in any case."""
    monkeypatch.delenv("CLOUD_RUN_TASK_INDEX", raising=False)
    assert new_run("night").id == "night"
    monkeypatch.setenv("CLOUD_RUN_TASK_INDEX", "0")
    assert (new_run("night").id, new_run("night").task_index) == ("night-0", 0)
    assert new_run(None).id != new_run(None).id
