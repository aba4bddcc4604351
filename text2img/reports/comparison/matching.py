"""Which pictures of two runs belong together, and what the runs did differently. Knows no database."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from text2img.prompts import NOTES
from text2img.reports.comparison import Difference, Pair, Picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from text2img.databases import Made, Run
    from text2img.reports.comparison import Side

MOST_VALUES: Final = 20
"""Of a parameter that each prompt has for itself, so many values are told."""


def pictures_of(made: Made) -> Iterator[Picture]:
    """The pictures of a completed prompt; the n-th has the seed of the first and n, as they are made."""
    seed = made.used.get("seed")
    used = made.used if made.iterations is None else {**made.used, "iterations": made.iterations}
    first = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    for number, url in enumerate(made.image_urls):
        yield Picture(
            prompt=made.id,
            number=number,
            text=made.text,
            seed=None if first is None else first + number,
            url=url,
            score=made.scores[number] if number < len(made.scores) else None,
            used=used,
        )


def matched(a: Iterable[Picture], b: Iterable[Picture]) -> tuple[Pair, ...]:
    """The pairs in A's order: by the prompt's id, and what that leaves over by its text and the seed.

    Each picture is in one pair at the most.
    """
    pairs: dict[int, Pair] = {}
    left: dict[int, Picture] = {}
    theirs = {(one.prompt, one.number): one for one in b}
    for place, ours in enumerate(a):
        if partner := theirs.pop((ours.prompt, ours.number), None):
            pairs[place] = Pair(a=ours, b=partner, by_id=True)
        else:
            left[place] = ours
    by_text = defaultdict(list)
    for their in reversed(theirs.values()):
        by_text[their.text, their.seed].append(their)
    for place, ours in left.items():
        if partners := by_text.get((ours.text, ours.seed)):
            pairs[place] = Pair(a=ours, b=partners.pop(), by_id=False)
    return tuple(pairs[place] for place in sorted(pairs))


def differences(a: Side, b: Side, pairs: Sequence[Pair]) -> list[Difference]:
    """What differs: the texts, seeds and parameters of pairs, then where and with what the runs were made."""
    recorded = [(_recorded(pair.a), _recorded(pair.b)) for pair in pairs]
    names = dict.fromkeys(name for both in recorded for one in both for name in one)
    found = [_difference(name, recorded) for name in names]
    around = [_around(a.runs), _around(b.runs)]
    for name in dict.fromkeys((*around[0], *around[1])):
        ours, theirs = (one.get(name, ()) for one in around)
        if ours != theirs:
            found.append(Difference(name=name, a=ours, b=theirs, pairs=0))
    return [each for each in found if each.a != each.b or each.pairs]


def _recorded(picture: Picture) -> Mapping[str, object]:
    parameters = {name: value for name, value in picture.used.items() if name not in (*NOTES, "seed")}
    return {"text": picture.text, **parameters, "seed": picture.seed}


def _difference(
    name: str, recorded: Sequence[tuple[Mapping[str, object], Mapping[str, object]]]
) -> Difference:
    differing = [(a.get(name), b.get(name)) for a, b in recorded if a.get(name) != b.get(name)]
    ours, theirs = (_distinct(values) for values in zip(*differing, strict=True)) if differing else ((), ())
    return Difference(name=name, a=ours, b=theirs, pairs=len(differing))


def _around(runs: Sequence[Run]) -> dict[str, tuple[object, ...]]:
    """What of a run is not a picture's: its host and the versions of what it used."""
    said = [{"host": run.host, **{f"{name} version": v for name, v in run.versions.items()}} for run in runs]
    names = dict.fromkeys(name for one in said for name in one)
    return {name: _distinct(one[name] for one in said if name in one) for name in names}


def _distinct(values: Iterable[object]) -> tuple[object, ...]:
    """Each value once, in order, MOST_VALUES at the most; lists and objects are no keys, their JSON is."""
    seen: dict[str, object] = {}
    for value in values:
        if len(seen) == MOST_VALUES:
            break
        seen.setdefault(json.dumps(value, sort_keys=True, default=str), value)
    return tuple(seen.values())
