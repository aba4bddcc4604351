"""The tries as a table: a line for each fault."""

from __future__ import annotations

from tests.chaos.workers import BATCH

PROMISED = ("lost", "twice", "stuck", "wrong", "untold")
"""What there must be none of."""


def table(tries):
    """Markdown. What was made again is in batches a kill: on average, and at worst where each stood alone."""
    faults = list(dict.fromkeys(each["fault"] for each in tries))
    lines = [_line([each for each in tries if each["fault"] == fault]) for fault in faults]
    head = ["fault", "times", "prompts", *PROMISED, "made again"]
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [head, rule, *lines])


def _line(tries):
    kills = sum(each["kills"] for each in tries)
    batches = [each["again"] / BATCH for each in tries]
    worst = f", at worst {max(batches):g}" if kills == len(tries) else ""
    sums = [sum(each[name] for each in tries) for name in ("prompts", *PROMISED)]
    return [tries[0]["fault"], kills, *sums, f"{sum(batches) / kills if kills else 0:.1f}{worst}"]
