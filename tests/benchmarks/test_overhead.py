"""The overhead benchmark: its machinery in short, with files in the place of servers, and its tables."""

from __future__ import annotations

import json

from benchmarks import overhead
from benchmarks.overhead import Cost
from benchmarks.results import report
from benchmarks.sampler import Sampler, Share
from tests.waiting import until


def test_the_job_is_measured_beside_its_encoding(tmp_path):
    """A few prompts through the whole job: each figure of the row is there, and its check is kept."""
    arguments = ["--prompts", "10", "--side", "64", "--rounds", "1", "--results", str(tmp_path)]
    overhead.main([*arguments, "--database", "sqlite", "--storage", "folder"])
    kept = json.loads((tmp_path / "overhead.json").read_text())
    (row,), (check,) = kept["rows"], kept["checks"]
    assert (row["database"], row["storage"]) == ("sqlite", "folder")
    assert min(row["prompts/s"], row["cpu ms"], row["encode ms"]) > 0
    assert check["measured"] == row["cpu ÷ encode"]


def test_a_prompt_that_costs_more_than_its_picture_misses_the_target():
    """Each kind has its row of medians and its check; processor time of twice the encoding's is too much."""
    costs = {
        ("sqlite", "folder"): [Cost(0.1, cpu, 0.010, []) for cpu in (0.012, 0.9, 0.011)],
        ("mongodb", "bucket"): [Cost(0.2, cpu, 0.010, []) for cpu in (0.020, 0.021, 0.001)],
    }
    outcome = overhead.result(200, 512, 3, costs)
    assert [(round(check.measured, 3), check.met) for check in outcome.checks] == [(1.2, True), (2.0, False)]
    first, second = outcome.rows
    assert (first["prompts/s"], first["cpu ms"], first["encode ms"]) == (10, 12, 10)
    assert (second["database"], second["prompts/s"]) == ("mongodb", 5)
    assert outcome.status == 1
    assert "MISSED: processor time a prompt ÷ encoding alone, mongodb and bucket" in report(outcome)


def test_a_profile_names_the_functions():
    """One table has all functions in their order, the other ours alone, by what they call; both are cut."""
    shares = [
        Share("PIL/ImageFile.py:1 encode", 0.4, 0.4),
        Share("text2img/images/formats.py:1 encode", 0.2, 0.6),
        Share("text2img/worker/flow.py:1 run", 0.1, 0.9),
    ]
    by_itself, ours = overhead.page(("sqlite", "folder"), shares, 100, 2).split("our functions")
    assert by_itself.startswith("\nsqlite and folder, by itself:\n")
    assert [line.split()[1] for line in by_itself.splitlines()[4:6]] == ["4", "2"]
    assert "ImageFile.py" in by_itself.splitlines()[4]
    assert "flow.py" not in by_itself
    assert [line.split()[3] for line in ours.splitlines()[3:]] == ["9", "6"]
    assert "flow.py" in ours.splitlines()[3]
    assert "ImageFile.py" not in ours


def test_the_profile_is_of_the_job_s_own_process(capsys):
    """A few prompts, sampled: functions of the job are among those that were seen; nothing is kept."""
    arguments = ["--profile", "--prompts", "10", "--side", "256", "--top", "50"]
    assert overhead.main([*arguments, "--database", "sqlite", "--storage", "folder"]) == 0
    by_itself, ours = capsys.readouterr().out.split("our functions")
    assert "own ms a prompt" in by_itself
    assert "text2img" in ours


def test_what_a_thread_gains_goes_to_the_functions_on_its_stack():
    """The function that waits is seen, with what it calls; the sampler's own thread is not."""

    def waits(sampler):
        with sampler:
            until(lambda: any("waits" in share.function for share in sampler.shares()))

    sampler = Sampler()
    waits(sampler)
    (seen,) = [share for share in sampler.shares() if "<locals>.waits" in share.function and share.whole]
    assert seen.whole >= seen.own
    assert not [share for share in sampler.shares() if "Sampler._sample" in share.function]
