"""The tries as a table: a line for each fault."""

from __future__ import annotations

from tests.chaos.workers import BATCH

PROMISED = ("lost", "twice", "stuck", "wrong", "untold")
"""What there must be none of."""


def table(tries):
    """Markdown. ``made again`` is the most that one kill has cost, in batches and on average over kills."""
    faults = list(dict.fromkeys(each["fault"] for each in tries))
    lines = [_line([each for each in tries if each["fault"] == fault]) for fault in faults]
    head = ["fault", "kills", "prompts", *PROMISED, "made again, batches a kill"]
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [head, rule, *lines])


def _line(tries):
    kills = sum(each["kills"] for each in tries)
    again = [each["again"] / each["kills"] / BATCH for each in tries if each["kills"]]
    sums = [sum(each[name] for each in tries) for name in PROMISED]
    cost = f"{sum(again) / len(again):.2g}, at most {max(again):.2g}" if again else "–"
    return [tries[0]["fault"], kills, sum(each["prompts"] for each in tries), *sums, cost]
