"""The bar that people see: prompts, and each iteration of their loops."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from tests.outcomes import completed, iterated
from text2img.errors import ErrorCode
from text2img.prompts import Claim, Evaluation, Failed, Prompt, PromptId
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
