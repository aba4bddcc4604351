"""A file of prompts as a run's input: added, made, and on another run only what is new or changed."""

from __future__ import annotations

import json
import pstats
import sqlite3
import subprocess
from contextlib import closing

import pytest
from PIL import Image

from tests.acceptance import product
from tests.acceptance.product import sleeping
from text2img.databases import Collections, open_database
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene
from text2img.intake import read_prompts

JOB = (
    *("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL)),
    *("--num-inference-steps", "10", "--guidance-scale", "3", "--input-file", "prompts.json"),
)
LOOP = ("--evaluator", "demo", "--candidates", "2")
CAPTIONS = {
    "a": "a large red circle on a white background",
    "b": "a small blue star on a yellow background",
    "c": "a large green square on a black background",
}


def _write(folder, captions):
    entries = [{"id": name, "text": text, "seed": 7} for name, text in captions.items()]
    (folder / "prompts.json").write_text(json.dumps(entries))


def _claims(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        return dict(database.execute("SELECT _id, claim_number FROM datasets"))


def _shows(folder, name, caption):
    with Image.open(folder / "pictures" / f"{name}.png") as image:
        return judge(image).shows(Scene.parse(caption))


@pytest.mark.smoke
def test_a_second_run_makes_what_is_new_or_changed(tmp_path):
    """The first run makes all prompts of the file, the second nothing, the third the one that was changed and
    the one that is new; the changed one's picture shows what its prompt says now.
    """
    _write(tmp_path, {name: CAPTIONS[name] for name in "ab"})
    first = sleeping.run(*JOB, folder=tmp_path)
    assert (first.returncode, first.stdout[:11]) == (0, "completed 2"), first.stderr
    again = sleeping.run(*JOB, folder=tmp_path)
    assert (again.returncode, again.stdout[:11]) == (0, "completed 0"), again.stderr
    changed = CAPTIONS | {"b": "a large purple triangle on a white background"}
    _write(tmp_path, changed)
    third = sleeping.run(*JOB, folder=tmp_path)
    assert (third.returncode, third.stdout[:11]) == (0, "completed 2"), third.stderr
    assert _claims(tmp_path) == {"a": 1, "b": 2, "c": 1}
    assert all(_shows(tmp_path, name, caption) for name, caption in changed.items())


def test_nothing_starts_before_all_is_right(tmp_path):
    """A file with two mistakes is both of them and status 2, and neither database nor picture."""
    (tmp_path / "prompts.json").write_text('[{"text": "a"},\n {"text": "", "seed": -1}]')
    refused = product.run(*JOB, folder=tmp_path)
    assert refused.returncode == 2
    (line,) = product.errors(refused)
    assert line.count("prompts.json, line 2: ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.json"]


def test_a_dry_run_adds_nothing(tmp_path):
    """--dry-run plans the file's prompts, though there is no database yet, nor the folder that the run would
    make for it, and makes neither; of each prompt it plans as many candidates as the run would draw.
    """
    _write(tmp_path, CAPTIONS)
    shown = product.run(*JOB, "--dry-run", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "3 prompts of prompts.json: 3 would be added, 0 generated again; 0 that left" in shown.stdout
    assert "batch 1: 3 × " in shown.stdout
    planned = product.run(*JOB[4:], *LOOP, "--dry-run", "--output-dir", "absent", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "batch 1: 6 × " in planned.stdout
    assert "a (image 1), a (image 2), b (image 1)" in planned.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.json"]


def test_many_prompts_are_added_at_a_steady_cost(tmp_path):
    """2,000 prompts of YAML, the slowest format, are checked and added by less than 1,500 calls a prompt; of
    10,000 there were 1,108 a prompt, in 3.5 s of a core.
    """
    lines = (
        f"- {{id: p{n}, text: 'no. {n}: {'a quiet harbour, ' * 12}', seed: {n}}}\n" for n in range(2_000)
    )
    (tmp_path / "prompts.yaml").write_text("".join(lines))
    enqueue = product.command("enqueue", *JOB[:2], "prompts.yaml")
    added = subprocess.run(
        [enqueue[0], "-m", "cProfile", "-o", "calls", *enqueue[1:]],
        cwd=tmp_path, env=product.environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert added.stdout == "added 2000 of 2000 prompts; 0 were there already\n", added.stderr
    assert pstats.Stats(str(tmp_path / "calls")).total_calls < 1_500 * 2_000


def test_a_prompt_that_left_the_file_is_removed(tmp_path):
    """A pending prompt of the file that is no longer in it is not made: status counts it, and it comes back
    with the file. Prompts of another file, enqueued ones and completed ones stay. A dry run names the batch
    that the run makes, and writes nothing.
    """
    database = ("--database", "sqlite:///prompts.db")
    job = (*database, "--output", "pictures", "--model-id", str(product.MODEL), "--log-format", "text")
    for name, ids in {"a.csv": "abc", "b.csv": "x"}.items():
        (tmp_path / name).write_text("id,text\n" + "".join(f"{each},a boat\n" for each in ids))
    product.add(tmp_path, {"id": "y", "text": "a boat"})
    with closing(open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())) as other:
        other.runs.enqueue(read_prompts(str(tmp_path / "b.csv")), str(tmp_path / "b.csv"))
    first = sleeping.run(*job, "--input-file", "a.csv", "--limit", "1", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    before = product.counts(tmp_path)
    (tmp_path / "a.csv").write_text("id,text,seed\nc,a boat,7\nd,a boat,\n")
    planned = sleeping.run(*job, "--dry-run", "--json", "--input-file", "a.csv", folder=tmp_path)
    plan = json.loads(planned.stdout)
    assert plan["input_file"] == {"added": 1, "changed": 1, "removed": 1}
    assert [[image["prompt_id"] for image in each["images"]] for each in plan["batches"]] == [list("cdxy")]
    assert product.counts(tmp_path) == before == {"completed": 1, "pending": 4}
    made = sleeping.run(*job, "--input-file", str(tmp_path / "a.csv"), folder=tmp_path)
    assert made.stdout.startswith("completed 4, failed 0, remaining 0"), made.stderr
    shown = sleeping.run("status", *database, folder=tmp_path).stdout
    assert "removed            1  (left their input file)" in shown
    (tmp_path / "a.csv").write_text("id,text\nb,a boat\n")
    again = sleeping.run(*job, "--input-file", "a.csv", folder=tmp_path)
    assert again.stdout.startswith("completed 1, failed 0, remaining 0"), again.stderr
    assert product.counts(tmp_path) == {"completed": 6}
