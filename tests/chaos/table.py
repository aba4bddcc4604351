"""The tries as tables: a line for each fault, and one for each state in which runs were asked to end."""

from __future__ import annotations

from tests.chaos.stops import TARGET, is_late
from tests.chaos.workers import BATCH

PROMISED = ("lost", "twice", "stuck", "wrong", "undelivered")
"""What there must be none of."""


def table(tries):
    """Markdown. What was made again is in batches a kill: on average, and at worst where each stood alone; a
    dash where the workers' logs ended with the run that gathers them.
    """
    faults = list(dict.fromkeys(each["fault"] for each in tries))
    lines = [_line([each for each in tries if each["fault"] == fault]) for fault in faults]
    return _markdown(["fault", "times", "prompts", *PROMISED, "made again"], lines)


def table_of_stops(tries):
    """Markdown. The longest time that a run took to end in each state, its target, and how busy the cores
    were just before that run was asked; where any was too late on idle cores, the longest of those.
    """
    stops = [each for each in tries if "seconds" in each]
    lines = []
    for fault in dict.fromkeys(each["fault"] for each in stops):
        here = [each for each in stops if each["fault"] == fault]
        longest = max(here, key=lambda each: (is_late(each), each["seconds"]))
        seconds = [f"{longest['seconds']:.1f}", f"{TARGET:g}"]
        lines.append([fault, len(here), *seconds, f"{longest['busy']:.0%}"])
    return _markdown(["asked to end", "times", "longest, s", "target, s", "cores busy then"], lines)


def _markdown(head, lines):
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [head, rule, *lines])


def _line(tries):
    kills = sum(each["kills"] for each in tries)
    batches = [each["again"] / BATCH for each in tries]
    worst = f", at worst {max(batches):g}" if kills == len(tries) else ""
    sums = [sum(each[name] for each in tries) for name in ("prompts", *PROMISED)]
    again = f"{sum(batches) / kills if kills else 0:.1f}{worst}"
    return [tries[0]["fault"], kills, *sums, "–" if min(batches) < 0 else again]
