"""The bar that people see: prompts, and each iteration of their loops."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from tests.outcomes import completed, iterated
from text2img.errors import ErrorCode
from text2img.prompts import Claim, Evaluation, Failed, Prompt, PromptId, Request
from text2img.prompts.parameters import Parameters
from text2img.telemetry.progress import Bar

PROMPTS = [Prompt(claim=Claim(PromptId("int", str(n)), "w", 1), text="a boat") for n in range(4)]
SEEN = [Evaluation(evaluator="demo", score=0.5)]


def shown(*settled):
    """By its name, the last state of each line of a bar over four prompts to which these outcomes came."""
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=120, color_system=None))
    bar.begin(4)
    bar.step(1, 4)
    for outcomes in settled:
        bar.recorded(outcomes)
    bar.end()
    return dict(re.findall(r"(prompts|iteration \d) [━╸╺ ]*(\d[^\r\n]*)", screen.getvalue()))


def test_without_a_loop_there_is_one_line():
    """Prompts done of all, failures among them, and the mean score where there are scores."""
    failed = Failed(prompt=PROMPTS[1], code=ErrorCode.SAFETY, message="no", attempts=1)
    lines = shown([completed(PROMPTS[0], evaluations=SEEN), failed])
    line = lines.pop("prompts")
    assert not lines
    assert "2/4" in line
    assert "1 failed" in line
    assert "score 0.50" in line


def test_each_iteration_has_a_line_of_its_own():
    """Into the second go those that were not good enough after the first, and it fills as they are done."""
    going = [iterated(prompt) for prompt in PROMPTS[:3]]
    done = replace(completed(PROMPTS[0], evaluations=SEEN), tries=going[0].tries, iterations=2)
    counted = shown(going, [completed(PROMPTS[3], evaluations=SEEN), done])
    assert "2/4" in counted["prompts"]
    assert "4/4" in counted["iteration 1"]
    assert "1/3" in counted["iteration 2"]


class _Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now


def _request(prompt):
    wanted = Parameters(
        negative_prompt="",
        seed=1,
        num_inference_steps=10,
        guidance_scale=7.5,
        width=64,
        height=64,
        scheduler=None,
    )
    return Request(prompt=prompt, text="a boat", parameters=wanted)


def _last_line(screen):
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue().strip()))[-1].rstrip()


def test_speed_and_time_left_count_from_the_first_batch():
    """A minute of loading counts for neither; the steps of the first batch give a first estimate."""
    clock, screen = _Clock(), io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=120, color_system=None), clock)
    bar.begin(4)
    clock.now += 60
    bar.batch([_request(prompt) for prompt in PROMPTS[:2]])
    clock.now += 5
    bar.step(5, 10)
    bar._progress.refresh()
    assert "0:00:15 left" in _last_line(screen)
    clock.now += 5
    bar.recorded([completed(prompt) for prompt in PROMPTS[:2]])
    clock.now += 4
    bar.step(4, 10)
    bar._progress.refresh()
    assert "0.20 images/s 0:00:06 left" in _last_line(screen)


@pytest.mark.parametrize("width", [20, 30, 50, 80, 120])
def test_a_narrow_terminal_shows_less(width):
    """No line is wider than the terminal; how many prompts are done is there in any width."""
    clock, screen = _Clock(), io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=width, color_system=None), clock)
    bar.begin(4)
    bar.batch([_request(PROMPTS[0])])
    clock.now += 1
    bar.recorded([completed(PROMPTS[0], evaluations=SEEN)])
    bar.step(1, 10)
    bar._progress.refresh()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "1/4" in _last_line(screen)
    assert "0:00:03 left" in _last_line(screen)
    assert ("━" in _last_line(screen)) == (width >= 60)
