"""The flow with prompts that ask for several pictures: one claim and one outcome each, whatever happens."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.painter import Bench, Painter
from tests.waiting import until
from text2img.databases import Selection
from text2img.errors import ErrorCode, PromptFailed, Stopped, StorageFailed
from text2img.prompts import PromptId
from text2img.prompts.ids import ObjectName

SELECTION = Selection()


@pytest.fixture
def bench(tmp_path):
    """Four prompts, of which 1 wants five pictures and 3 wants twelve."""
    made = Bench(tmp_path, 4)
    with closing(sqlite3.connect(made.file)) as rows, rows:
        rows.execute("UPDATE datasets SET num_images = 5, seed = 20 WHERE _id = 1")
        rows.execute("UPDATE datasets SET num_images = 12, seed = 40 WHERE _id = 3")
    rows.close()
    yield made
    made.database.close()


def _pictures(bench):
    return {path.stem for path in bench.folder.glob("*.png")}


FIVE = {"1", *(f"1~{n}" for n in range(1, 5))}
TWELVE = {"3", *(f"3~{n}" for n in range(1, 10)), "3~1~0", "3~1~1"}


def _urls(bench, prompt):
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        (urls,) = rows.execute("SELECT image_urls FROM datasets WHERE _id = ?", [prompt]).fetchone()
    rows.close()
    return urls


def test_each_picture_has_its_seed_and_its_name(bench):
    """Seed, seed + 1, … under the names with a number, in batches that count pictures; each prompt is done
    once, and the tally counts prompts and pictures.
    """
    painter = Painter()
    bench.work(painter)
    assert bench.counts == (0, 0, 4, 0)
    assert _pictures(bench) == {"0", "2"} | FIVE | TWELVE
    assert [bench.shade(name) for name in ("1", "1~1", "1~4", "3", "3~9", "3~1~1")] == [
        20,
        21,
        24,
        40,
        49,
        51,
    ]
    assert max(map(len, painter.batches)) == bench.batch_size
    assert sum(map(len, painter.batches)) == 1 + 5 + 1 + 12
    assert (bench.stats.completed, bench.stats.images, bench.stats.made) == (4, 19, 19)


def test_the_name_follows_the_template(bench):
    """The number comes after whatever stands around the id."""
    bench.work(Painter(), object_name=ObjectName.parse("gen_{generation_id}.v1"), limit=2)
    assert _pictures(bench) == {"gen_0.v1", "gen_1.v1", *(f"gen_1.v1~{n}" for n in range(1, 5))}


def test_one_picture_that_fails_fails_its_prompt_alone(bench):
    """The prompt ends in ``error`` once, without a URL, though its others could be made; others complete."""
    recorded, flagged = _recorded(bench), PromptFailed(ErrorCode.SAFETY, "flagged")
    bench.work(Painter(lambda request: flagged if request.parameters.seed == 41 else None))
    assert bench.counts == (0, 0, 3, 1)
    assert sorted(claim.id.text for claim in recorded) == ["0", "1", "2", "3"]
    assert _urls(bench, 3) is None
    assert _pictures(bench) >= {"0", "2"} | FIVE
    assert bench.stats.images == 7


def test_what_is_spoilt_is_made_no_further(tmp_path):
    """Once a picture has failed, those of its prompt that have not reached the device are left out."""
    bench = Bench(tmp_path, 1)
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute("UPDATE datasets SET num_images = 100")
    rows.close()

    def fault(request):
        if request.number == 1:
            return PromptFailed(ErrorCode.SAFETY, "flagged")
        if request.number >= 8:  # while it is on the device, the first batch comes to be stored
            until((bench.folder / "0~3.png").exists)
        return None

    bench.work(Painter(fault))
    assert (bench.counts, bench.stats.made < 100) == ((0, 0, 0, 1), True)
    bench.database.close()


def test_a_picture_that_failed_is_tried_again_with_all_of_its_prompt(bench):
    """After its wait the prompt is made whole, under the same names."""
    tries = []

    def fault(request):
        if request.parameters.seed == 22:
            tries.append(request.prompt.attempts)
            if len(tries) == 1:
                return PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
        return None

    clock = bench.hurry()
    bench.work(Painter(fault))
    assert (tries, bench.counts, bench.stats.postponed) == ([0, 1], (0, 0, 4, 0), 1)
    assert clock.pauses == [2]
    assert _pictures(bench) == {"0", "2"} | FIVE | TWELVE


def test_a_storage_that_fails_in_the_middle_completes_no_prompt_by_halves(bench):
    """Of a prompt whose third picture could not be stored nothing is recorded: it is pending again, and the
    next run completes it beside the pictures that are there.
    """
    kept = bench.storage

    class Dying:
        def put(self, name, *rest):
            if name == "1~2.png":
                raise StorageFailed("the network is gone")
            return kept.put(name, *rest)

    bench.storage = Dying()
    with pytest.raises(StorageFailed):
        bench.work(Painter())
    assert bench.counts[1] == bench.counts[3] == 0
    assert _urls(bench, 1) is None
    bench.storage = kept
    bench.work(Painter())
    assert bench.counts == (0, 0, 4, 0)
    assert _pictures(bench) == {"0", "2"} | FIVE | TWELVE


def test_a_claim_that_is_lost_takes_all_its_pictures_along(bench):
    """Another worker has the prompt meanwhile: none of the pictures that are left is made, nothing is
    recorded of it.
    """
    recorded, painter = _recorded(bench), Painter()

    def fault(request):
        if request.parameters.seed == 40:
            # As when this worker had slept: it learns of the loss with its next sign of life.
            bench.database.queue.release([request.prompt.claim])
            assert len(bench.database.queue.claim("w2", 1, 60, SELECTION)) == 1
            leases[0].forget([request.prompt.claim])

    painter.fault, leases, made = fault, [], bench.leases
    bench.leases = lambda: leases.append(made()) or leases[0]
    bench.work(painter)
    assert bench.counts == (0, 1, 3, 0)
    assert "3" not in {claim.id.text for claim in recorded}
    assert sum(batch.count("3") for batch in painter.batches) <= 8  # the batch, and the one behind it


def test_a_stop_between_two_pictures_gives_the_prompt_back(bench):
    """Stopped with some of its pictures stored, a prompt is pending without an attempt or a death."""

    def fault(request):
        if request.parameters.seed == 48:
            bench.stop.set(15)
            bench.stop.check()

    with pytest.raises(Stopped):
        bench.work(Painter(fault))
    left = bench.database.queue.peek(10, SELECTION)
    assert [(prompt.id.text, prompt.attempts, prompt.deaths) for prompt in left] == [("3", 0, 0)]


def test_a_death_counts_for_prompts_with_a_picture_on_the_device(bench):
    """Whoever has pictures in this batch and the one before is on the device still; whoever has them only in
    other batches is not.
    """
    marks = []
    kept = bench.database.queue.start

    def start(claims, left=()):
        marks.append(([claim.id.text for claim in claims], [claim.id.text for claim in left]))
        kept(claims, left)

    bench.database.queue.start = start
    bench.work(Painter())
    for claims, left in marks:
        assert len(set(claims)) == len(claims)
        assert not set(claims) & set(left)
    assert any(claims == ["3"] and left == [] for claims, left in marks)


def test_a_prompt_that_killed_two_workers_shares_its_batches_with_nobody(bench):
    """All batches that hold pictures of it hold nothing else."""
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute("UPDATE datasets SET deaths = 2 WHERE _id = 1")
    rows.close()
    painter = Painter()
    bench.work(painter)
    assert bench.counts == (0, 0, 4, 0)
    assert {tuple(batch) for batch in painter.batches if "1" in batch} == {("1",) * 4, ("1",)}


def test_seeds_beyond_the_largest_are_refused(bench):
    """The last picture's seed has to be one as well; the sentence says so, and nothing is made."""
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute("UPDATE datasets SET seed = ? WHERE _id = 1", [2**63 - 5])
        rows.execute("UPDATE datasets SET seed = ? WHERE _id = 3", [2**63 - 11])
    rows.close()
    bench.work(Painter())
    assert bench.counts == (0, 0, 3, 1)
    assert bench.database.runs.counts(SELECTION).errors == {"invalid_parameters": 1}
    assert _pictures(bench) == {"0", "2"} | FIVE


def test_fewer_prompts_are_claimed_where_each_has_many_pictures(tmp_path):
    """Once it is known how many pictures prompts have, no more are claimed than fill the batches ahead."""
    bench, most = Bench(tmp_path, 60), []
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute("UPDATE datasets SET num_images = 4")
    rows.close()
    kept = bench.database.queue.claim
    bench.database.queue.claim = lambda worker, limit, *rest: most.append(limit) or kept(worker, limit, *rest)
    bench.work(Painter())
    assert bench.counts == (0, 0, 60, 0)
    assert max(most[3:]) <= 2
    bench.database.close()


@settings(
    phases=[Phase.explicit, Phase.generate], max_examples=examples(30), suppress_health_check=[*HealthCheck]
)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=6),
    st.integers(1, 5),
    st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 6)), st.sampled_from(["safety", "twice"])),
)
def test_whatever_fails_each_prompt_has_one_outcome(tmp_path_factory, images, size, faults):
    """Of any prompts in any batches with any pictures failing: whoever lost none has all of its pictures, of
    its seeds and under its names; the others are in error, once; nothing was recorded twice for a claim.
    """
    bench = Bench(tmp_path_factory.mktemp("album"), len(images))
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.executemany(
            "UPDATE datasets SET num_images = ?, seed = 10 * _id WHERE _id = ?",
            [(number, prompt) for prompt, number in enumerate(images)],
        )
    rows.close()
    recorded = _recorded(bench)

    def fault(request):
        fate = faults.get((int(request.prompt.id.text), request.number))
        return fate and PromptFailed(ErrorCode.SAFETY if fate == "safety" else ErrorCode.NOT_FINITE, fate)

    bench.work(Painter(fault), batch_size=size)
    lost = {prompt for prompt, number in faults if prompt < len(images) and number < images[prompt]}
    assert bench.counts == (0, 0, len(images) - len(lost), len(lost))
    assert sorted(int(claim.id.text) for claim in recorded) == list(range(len(images)))
    for prompt in set(range(len(images))) - lost:
        names = [ObjectName().of(PromptId("int", str(prompt)), number) for number in range(images[prompt])]
        assert [bench.shade(name) for name in names] == [10 * prompt + n for n in range(images[prompt])]
        urls = [str(bench.folder / f"{name}.png") for name in names]
        assert json.loads(_urls(bench, prompt) or "[]") == (urls if len(urls) > 1 else [])
    assert all((_urls(bench, prompt) is None) for prompt in lost)
    bench.database.close()


def _recorded(bench):
    """The claims of which something was recorded, as they come."""
    claims, kept = [], bench.database.queue.record

    def record(outcomes, run_id, **options):
        written = kept(outcomes, run_id, **options)
        claims.extend(outcome.claim for outcome in written)
        return written

    bench.database.queue.record = record
    return claims
