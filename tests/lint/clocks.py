"""Finds tests that depend on how fast the machine is.

A test that compares elapsed time with a number fails on a busy machine although the product is right. What
must be fast belongs into a benchmark, or is a count; where time is the subject the test brings its own clock.
Refused are

- a comparison of elapsed time: ``monotonic() - begun < 5``, ``took < 5`` where ``took`` came from a clock, a
  deadline (``until = monotonic() + 5`` … ``monotonic() < until``), whichever way round it is written;
- ``sleep`` of any kind: ``tests/waiting.py`` waits for a condition instead;
- a short limit on waiting that decides whether a test passes: ``assert event.wait(2)``,
  ``process.wait(timeout=5)``, ``thread.join(0.5)``. From a minute on a limit only ends what hangs.

A line, or the line above it, that says ``# clock: reason`` is let through: a scripted server that has to be
slow, for instance.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOCKS = frozenset(
    {
        *("monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "process_time_ns"),
        *("thread_time", "time_ns", "clock_gettime"),
    }
)
"""Names that mean a clock wherever they are called; ``time`` does so only as ``time.time()``."""
WAITS = frozenset({"wait", "join", "communicate", "acquire", "wait_procs"})
HANG = 60
"""Seconds; a limit from here on is no statement about speed."""
_EXEMPT = re.compile(r"#.*\bclock: \S")


class Finding(NamedTuple):
    """Where a test depends on time, and how."""

    line: int
    reason: str


def findings(source: str) -> list[Finding]:
    """Return what the module's source has to change, in the order of its lines."""
    lines = source.splitlines()
    found = {finding for scope in _scopes(ast.parse(source)) for finding in _of_scope(scope)}
    return sorted(each for each in found if not _is_exempt(lines, each.line))


def _is_exempt(lines: list[str], number: int) -> bool:
    above = lines[number - 2].strip() if number > 1 else ""
    return bool(_EXEMPT.search(lines[number - 1]) or (above.startswith("#") and _EXEMPT.search(above)))


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the module and each outermost function, whose names the functions within it share."""
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _of_scope(scope: ast.AST) -> Iterator[Finding]:
    instants, durations = _names(scope)
    for node in ast.walk(scope):
        if isinstance(node, ast.Compare):
            if any(_is_duration(part, instants, durations) for part in (node.left, *node.comparators)):
                yield Finding(node.lineno, "compares elapsed time; count something, or bring a clock")
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _names(scope: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names that hold a clock's value, and those that hold a sum or difference of one."""
    instants: set[str] = set()
    durations: set[str] = set()
    before = (-1, -1)
    while (len(instants), len(durations)) != before:
        before = (len(instants), len(durations))
        for target, value in _assignments(scope):
            if _is_duration(value, instants, durations):
                durations.add(target)
            elif _has_instant(value, instants):
                instants.add(target)
    return instants, durations


def _assignments(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(scope):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                pairs = list(zip(names, values, strict=False))
            case ast.Assign(targets=targets, value=value):
                pairs = [(target, value) for target in targets]
            case (
                ast.AnnAssign(target=target, value=ast.expr() as value)
                | ast.NamedExpr(target=target, value=value)
            ):
                pairs = [(target, value)]
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value]):
                pairs = [(ast.Name(id=name), value)]
            case _:
                continue
        yield from ((target.id, value) for target, value in pairs if isinstance(target, ast.Name))


def _is_clock(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time")):
            return True
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
            return name in CLOCKS
    return False


def _has_instant(node: ast.AST, instants: set[str]) -> bool:
    return any(
        _is_clock(each) or (isinstance(each, ast.Name) and each.id in instants) for each in ast.walk(node)
    )


def _is_duration(node: ast.AST, instants: set[str], durations: set[str]) -> bool:
    """Say whether a sum or difference of a clock's value, or a name for one, is in the expression."""
    return any(
        (isinstance(each, ast.BinOp) and _has_instant(each, instants))
        or (isinstance(each, ast.Name) and each.id in durations)
        for each in ast.walk(node)
    )


def _of_call(call: ast.Call) -> Iterator[Finding]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "sleep":
        yield Finding(call.lineno, "sleeps; wait for a condition with tests.waiting.until")
    elif name in WAITS and (limit := _limit(call)) is not None and limit < HANG:
        yield Finding(
            call.lineno, f"waits {limit:g} s at most; leave the limit out, or make it {HANG} s or more"
        )


def _limit(call: ast.Call) -> float | None:
    """Return the number of seconds that the call waits, where it is written as a number."""
    values = [word.value for word in call.keywords if word.arg == "timeout"] or call.args[:1]
    if values and isinstance(values[0], ast.Constant) and isinstance(values[0].value, int | float):
        return None if isinstance(values[0].value, bool) else float(values[0].value)
    return None
