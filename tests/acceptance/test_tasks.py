"""Several tasks of one platform's job at once, over one queue: told apart in documents and logs."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from contextlib import closing

from tests.acceptance import product
from tests.acceptance.product import sleeping

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--device", "cpu", "--batch-size", "2")
MODEL = ("--model-id", str(product.MODEL))


def rows(folder, query):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        return database.execute(query).fetchall()


def test_tasks_share_a_queue_under_one_run_id(tmp_path):
    """Three tasks with the same RUN_ID: every prompt once, each task with a run document of its own, with
    its index and the platform's execution, and both in every line of its log.
    """
    product.add(tmp_path, *({"id": f"p{n}", "text": product.SCENE} for n in range(9)))
    platform = {"RUN_ID": "night", "CLOUD_RUN_EXECUTION": "text2img-abcde", "CLOUD_RUN_TASK_COUNT": "3"}
    tasks = []
    for index in "012":
        environment = product.environment(tmp_path, **platform, CLOUD_RUN_TASK_INDEX=index)
        environment["LOG_FILE"] = f"task{index}.log"
        command = sleeping.command("run", *JOB, *MODEL)
        tasks.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE))
    said = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    runs = rows(tmp_path, "SELECT _id, task_index, execution, completed FROM runs ORDER BY _id")
    ids = [run[:3] for run in runs]
    assert set(ids) <= {(f"night-{n}", n, "text2img-abcde") for n in range(3)}
    made = dict(rows(tmp_path, "SELECT run_id, count(*) FROM dataset_records GROUP BY run_id"))
    assert {run[0]: run[3] for run in runs if run[3]} == made
    assert sum(made.values()) == 9
    for index in range(3):
        lines = [json.loads(line) for line in (tmp_path / f"task{index}.log").read_text().splitlines()]
        assert lines
        assert {(line["task_index"], line["execution"]) for line in lines} == {(index, "text2img-abcde")}
