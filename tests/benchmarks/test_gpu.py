"""The GPU benchmark without a GPU: its rehearsal, its checks, its limits of time."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import measures
from benchmarks.gpu.checks import checks
from benchmarks.gpu.task import Task, missing
from text2img.engine.devices import check_device, silence_libraries, suppress_warnings
from text2img.errors import DeviceFailed

ROWS = [
    {"model": "sd15", "row": "roof", "chip": "NVIDIA H200", "tflops": 700.0},
    {"model": "sd15", "row": "bare eager diffusers, batch 1", "images_per_second": 2.0},
    {
        "model": "sd15", "row": "ours, compiled", "images_per_second": 10.0, "tflops": 346.0,
        "bit_equal": True, "recompilations": 0, "denoise_bytes": 10, "decode_bytes": 11,
    },
    {
        "model": "sd15", "row": "the whole job", "images_per_second": 9.8, "completed": 500,
        "device_busy": 0.99, "device_busy_of_all": 0.91,
    },
    {"model": "sdxl", "row": "ours, eager", "images_per_second": 1.6, "tflops": 450.0, "bit_equal": True},
]  # fmt: skip


def _rehearsed(folder, **changes):
    return Task(**{**gpu._REHEARSED, "model": "sd15", "folder": str(folder), **changes})


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path, capsys):
    """One line, status 2, no JSON."""
    try:
        check_device("cuda")
    except DeviceFailed:
        assert gpu.main(["--results", str(tmp_path)]) == 2
        assert capsys.readouterr().out.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    else:
        pytest.skip("there is a GPU")


def _here(figure, _seconds):
    """Measure in this process, which has imported torch and diffusers already."""
    root, ours = logging.getLogger(), logging.getLogger("text2img")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, suppress_warnings():
            silence_libraries()
            measures.MEASURES[figure.measure](figure.task)
    finally:  # the whole job has set up its own
        logging.captureWarnings(capture=False)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
    return [json.loads(line) for line in out.getvalue().splitlines()], None


def test_the_rehearsal_runs_the_whole_script(tmp_path):
    """With tiny models every figure that this version can make is made, and the JSON is no result."""
    assert gpu.main(["--rehearse", "--models", "sd15", "--results", str(tmp_path)], run=_here) == 0
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert (file.name, kept["rehearsal"], kept["note"][:11]) == ("gpu-rehearsal.json", True, "A rehearsal")
    rows = {row["row"]: row for row in kept["figures"]}
    assert {"roof", "bare eager diffusers, batch 1", "ours, eager", "the whole job"} <= set(rows)
    assert rows["the whole job"]["completed"] == 4
    assert rows["the whole job"]["images_per_second_to_the_end"] < rows["the whole job"]["images_per_second"]
    assert all("this version has no" in each for each in kept["skipped"])


def test_the_engine_takes_a_built_model_and_repeats_itself(tmp_path, capsys):
    """SDXL as well is built so that the product's engine takes it; a batch made again is the same."""
    task = _rehearsed(tmp_path / "sdxl", model="sdxl")
    with suppress_warnings():
        silence_libraries()
        measures.build(task)
        observed = measures.Observed(task.open(), task)
        observed.generate()
        observed.generate()
        assert observed.figures() == {"bit_equal": True}
        assert observed.pictures[0].shape == (2, 64, 64, 3)
        assert observed.pictures[0].std() > 1
        observed.pictures[1] = observed.pictures[1] ^ 1
    assert observed.figures() == {"bit_equal": False}
    assert capsys.readouterr().out == ""


def test_a_process_that_fails_is_noted_and_the_rest_goes_on(tmp_path):
    """A figure that cannot be measured costs itself only; what there is no time for is noted too."""
    book, given = gpu.Book({}, rehearsal=True, results=tmp_path), []

    def run(figure, seconds):
        given.append((figure.measure, seconds))
        return (
            ([], "nowhere")
            if figure.measure == "eager"
            else ([{"row": "roof", "chip": "CPU", "tflops": 1.0}], None)
        )

    broken = gpu.Figure("eager", _rehearsed(tmp_path / "nowhere"))
    lacking = gpu.Figure("option", broken.task, ("no_such_option",))
    planned = [lacking, broken, gpu.Figure("roof", broken.task)]
    gpu.measure(book, planned, 300.0, run=run, clock=lambda: 100.0)
    gpu.measure(book, [broken], 300.0, run=run, clock=lambda: 281.0)
    assert given == [("eager", 200.0), ("roof", 200.0)]
    assert [row["row"] for row in book.rows] == ["roof"]
    assert book.failed
    no_option, failed, late = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["skipped"]
    assert "this version has no no_such_option" in no_option
    assert "nowhere" in failed
    assert "no time left" in late


def test_a_process_has_its_rows_read_and_its_failure_named(tmp_path):
    """What a measuring process prints are rows; the last line of what it says as it fails is the trouble."""
    task = _rehearsed(tmp_path / "nowhere")
    ((row,), trouble) = gpu.process(gpu.Figure("roof", task), 200)
    assert (row["row"], row["chip"], trouble) == ("roof", "CPU", None)
    rows, trouble = gpu.process(gpu.Figure("no such figure", task), 200)
    assert (rows, trouble) == ([], "KeyError: 'no such figure'")


def test_the_time_that_is_left_ends_a_process(tmp_path):
    """A process that outlasts the time is ended, and what it had printed is kept."""
    rows, trouble = gpu.process(gpu.Figure("roof", _rehearsed(tmp_path, seconds=3600.0)), 0.05)
    assert (rows, trouble) == ([], "out of time")


def test_every_target_has_a_check_that_can_fail():
    """Figures that reach all targets pass; each one made worse fails its own check and no other."""
    assert all(check.met for check in checks(ROWS))
    worse = [
        (2, "tflops", 200.0, "roof"), (2, "decode_bytes", 12, "decoding"), (2, "recompilations", 1, "recomp"),
        (2, "bit_equal", False, "bit-equal"), (3, "device_busy", 0.9, "first to last"),
        (3, "device_busy_of_all", 0.5, "whole job of 500"), (1, "images_per_second", 5.0, "batch 1"),
        (2, "images_per_second", 20.0, "its engine alone"), (4, "images_per_second", 1.0, "SDXL, 20 steps"),
        (4, "tflops", 300.0, "SDXL: TFLOP/s"),
    ]  # fmt: skip
    for row, name, value, figure in worse:
        rows = [{**each, name: value} if each is ROWS[row] else each for each in ROWS]
        (missed,) = [check for check in checks(rows) if not check.met]
        assert figure in missed.figure


@pytest.mark.compiler
def test_a_recompilation_is_counted():
    """A graph that is compiled anew raises the count; one that is there already does not."""

    def doubled(values):
        return values * 2

    compiled = torch.compile(doubled, backend="eager", dynamic=False)
    counts = [measures._graphs()]
    for size in (2, 2, 3):
        compiled(torch.ones(size))
        counts.append(measures._graphs())
    assert [after - before for before, after in itertools.pairwise(counts)] == [1, 0, 1]


def test_options_that_this_version_lacks_are_named():
    """An engine option that exists is not missing, and one that does not is left out of the command line."""
    assert missing({"dtype": "fp32", "no_such_option": 1}) == ["no_such_option"]
    task = replace(_rehearsed("nowhere"), engine={"no_such_option": 1, "dtype": "fp32"})
    assert "--no-such-option" not in task.arguments()
    assert "--dtype" in task.arguments()
