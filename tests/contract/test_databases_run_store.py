"""Journal, on every database: configurations, runs, counts, new prompts and retries."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.contract.database_suite import ALL, failed, postponed, texts
from tests.outcomes import completed
from text2img.databases import NewPrompt, Run, RunTotals, Selection
from text2img.errors import ConfigurationError, ErrorCode
from text2img.prompts import Lora, ModelConfiguration, PromptId, RequestedParameters

_NOW = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)


def _new(name, **fields):
    requested = fields.pop("requested", RequestedParameters())
    return NewPrompt(id=PromptId("str", name), text=f"a {name}", requested=requested, **fields)


def _configure(stand, **fields):
    stand.put({"_id": "c", "model_type": "stable_diffusion", **fields}, table="model_configs")


def test_a_model_configuration_is_read_whole(stand):
    """Every documented field arrives, as a wish or as the model's."""
    given = {"model_path": "gs://b/m", "revision": "r", "variant": "fp16", "safety_checker": False}
    wished = {
        "scheduler": "ddim",
        "num_inference_steps": 9,
        "guidance_scale": 3.5,
        "width": 256,
        "height": 320,
        "aspect_ratio": "16:9",
        "num_images": 2,
        "negative_prompt": "blurry",
    }
    lora = {"path": "styles/ink.safetensors", "weight": 0.5}
    _configure(stand, **given, **wished, lora=lora)
    expected = ModelConfiguration(
        **given,
        requested=RequestedParameters(**wished, lora=(Lora("styles/ink.safetensors", 0.5),)),
        id=PromptId("str", "c"),
    )
    assert stand.database.runs.model_configuration(None) == expected
    assert stand.database.runs.model_configuration("c") == expected


def test_without_a_configuration_there_is_none(stand):
    """No configuration of that type is no error, unless one was asked for by its id."""
    stand.put({"_id": 1, "model_type": "video"}, table="model_configs")
    assert stand.database.runs.model_configuration(None) is None
    with pytest.raises(ConfigurationError, match="no model configuration with the _id 'spring'"):
        stand.database.runs.model_configuration("spring")


def test_a_configuration_is_matched_by_number_and_text(stand):
    """An id that reads as a number finds the numbered configuration."""
    stand.put({"_id": 7, "model_type": "stable_diffusion", "model_path": "m"}, table="model_configs")
    assert stand.database.runs.model_configuration("7").model_path == "m"


def test_the_first_configuration_is_the_same_each_time(stand):
    """Of several, the one with the smallest id is taken."""
    for name in "bac":
        stand.put({"_id": name, "model_type": "stable_diffusion", "model_path": name}, table="model_configs")
    assert stand.database.runs.model_configuration(None).model_path == "a"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"guidance_scal": 3},
            "'guidance_scal' is not a field of a model configuration; did you mean guidance_scale",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000; it is 0"),
        ({"width": 500}, "width must be a multiple of 8"),
        ({"guidance_scale": "high"}, "guidance_scale must be a number; it is 'high'"),
        ({"scheduler": "eular"}, "did you mean euler"),
        ({"steps": 20}, "'steps' is not a field of a model configuration; it is called num_inference_steps"),
        ({"checkpoint": "x"}, "it is called model_path here"),
        ({"model_path": 7}, "model_path must be text"),
        ({"safety_checker": "no"}, "safety_checker must be true or false; it is 'no'"),
    ],
)
def test_a_wrong_configuration_names_the_field(stand, fields, message):
    """An unknown or impossible field is an error that names it and the configuration."""
    _configure(stand, **fields)
    with pytest.raises(ConfigurationError, match="model configuration c: ") as caught:
        stand.database.runs.model_configuration(None)
    assert message in str(caught.value)


def test_a_configuration_of_another_kind_is_refused_by_id(stand):
    """Asked for by its id, a configuration for other work is no silent fallback."""
    stand.put({"_id": "v", "model_type": "video"}, table="model_configs")
    with pytest.raises(ConfigurationError, match="model_type must be stable_diffusion; it is 'video'"):
        stand.database.runs.model_configuration("v")


def test_a_run_is_kept_and_replaced(stand):
    """The run's document says what the run was, to the last figure; saving it again replaces it."""
    run = Run(id="r", started_at=_NOW, host="h", model="m", worker="h-1-ab")
    stand.database.runs.save_run(run, 60)
    (kept,) = stand.database.runs.last_runs(5)
    assert kept == run
    assert kept.alive_until - kept.seen_at == timedelta(seconds=60)
    assert timedelta(0) < kept.alive_until - datetime.now(UTC) < timedelta(minutes=2)
    assert "lease_expires_at" in stand.backend.get("r", "runs")
    over = Run(
        id="r",
        started_at=_NOW,
        host="h",
        task_index=3,
        execution="text2img-x7k2p",
        status="completed",
        finished_at=_NOW + timedelta(minutes=1),
        completed=3,
        failed=2,
        postponed=1,
        images_per_second=1.5,
        steady_images_per_second=1.75,
        device_busy=0.9,
        device_busy_of_run=0.8,
        peak_memory=2**33,
        seconds={"claim": 0.5},
        versions={"torch": "2"},
        images=6,
        gpu_hour_price=3.6,
    )
    stand.database.runs.save_run(over, 60)
    assert stand.database.runs.last_runs(5) == [over]
    assert stand.database.runs.run("r") == over
    assert stand.database.runs.run("s") is None
    assert (stand.database.runs.run("r").alive_until, stand.database.runs.run("r").seen_at) == (None, None)
    kept = stand.backend.get("r", "runs")
    assert "lease_expires_at" not in kept
    assert (kept["gpu_hour_price"], kept["dollars_per_1000_images"]) == (3.6, 10)


def test_what_1000_images_cost_is_left_out_where_nobody_knows(stand):
    """Without a price, without an image, and before its end, a run's document says no cost."""
    over = {"started_at": _NOW, "finished_at": _NOW + timedelta(minutes=1), "host": "h"}
    stand.database.runs.save_run(Run(id="free", images=6, **over), 60)
    stand.database.runs.save_run(Run(id="idle", gpu_hour_price=3.6, **over), 60)
    stand.database.runs.save_run(Run(id="on", started_at=_NOW, host="h", gpu_hour_price=3.6, images=6), 60)
    for run_id in ("free", "idle", "on"):
        assert "dollars_per_1000_images" not in stand.backend.get(run_id, "runs")
        assert stand.database.runs.run(run_id).dollars_per_1000_images is None


def test_the_last_runs_come_newest_first(stand):
    """At most as many as asked for, the newest first."""
    for n in range(4):
        stand.database.runs.save_run(Run(id=f"r{n}", started_at=_NOW + timedelta(hours=n), host="h"), 60)
    assert [run.id for run in stand.database.runs.last_runs(3)] == ["r3", "r2", "r1"]


def test_counts_say_where_everything_stands(stand):
    """Each status, live and expired leases, errors by code, and what is untold."""
    stand.put(*({"_id": n} for n in range(8)), {"_id": "later", "dataset_id": "spring"})
    live, expired = stand.claim("a", 1)[0], stand.claim("a", 2, 0)
    done, bad, worse, again = stand.claim("b", 4)
    stand.record(
        completed(done), failed(bad), failed(worse, ErrorCode.NOT_FINITE), postponed(again, 60), notify=True
    )
    counts = stand.database.runs.counts(ALL)
    assert (counts.pending, counts.processing, counts.completed, counts.error) == (3, 3, 1, 2)
    assert (counts.live_leases, counts.expired_leases, counts.undelivered) == (1, 2, 3)
    assert dict(counts.errors) == {"safety": 1, "not_finite": 1}
    assert stand.database.runs.counts(Selection("spring")).pending == 1
    assert stand.database.queue.holds(live.claim)
    assert len(expired) == 2


def test_counts_of_nothing_are_zero(stand):
    """An empty database has counts as well."""
    counts = stand.database.runs.counts(ALL)
    assert (counts.pending, counts.undelivered, counts.oldest_pending, dict(counts.errors)) == (
        0,
        0,
        None,
        {},
    )


def test_the_oldest_pending_prompt_is_told(stand):
    """Its time is when it was enqueued; a prompt that is no longer pending does not count."""
    before = datetime.now(UTC) - timedelta(seconds=1)
    stand.database.runs.enqueue([_new("boat")])
    assert before < stand.database.runs.counts(ALL).oldest_pending < datetime.now(UTC) + timedelta(seconds=1)
    stand.claim()
    assert stand.database.runs.counts(ALL).oldest_pending is None


def test_enqueue_adds_what_is_new(stand):
    """Known ids stay untouched, whatever has become of them; the number of new ones is returned."""
    assert stand.database.runs.enqueue([_new("a"), _new("b")]) == 2
    stand.record(completed(stand.claim(limit=1)[0]))
    assert stand.database.runs.enqueue([_new("a"), _new("b"), _new("c"), _new("c")]) == 1
    assert stand.get("a")["status"] == "completed"
    assert stand.backend.count("datasets") == 3
    assert stand.database.runs.enqueue([]) == 0


def test_an_enqueued_prompt_arrives_as_written(stand):
    """All that was asked for comes out of the claim; what was not wished is not there."""
    lora = [{"path": "ink.safetensors", "weight": 0.5}]
    requested = RequestedParameters(
        seed=5, width=640, scheduler="euler", aspect_ratio="1:2", num_images=2, lora=lora
    )
    hook = "https://b.example"
    new = _new("boat", requested=requested, dataset_id="spring", priority=2.5, webhook_url=hook)
    stand.database.runs.enqueue([new])
    (prompt,) = stand.claim(selection=Selection("spring"))
    assert (prompt.text, prompt.requested, prompt.priority) == ("a boat", requested, 2.5)
    assert prompt.webhook_url == hook
    assert not {"height", "negative_prompt", "attempts"} & set(stand.get("boat"))


def test_revise_makes_what_says_something_else_as_if_new(stand):
    """A completed prompt with another text, and a failed one with another seed, are pending as if new; one
    that says the same stays completed, and an id that is not there is not added.
    """
    lora = [{"path": "x", "weight": 1.0}]
    same = _new("same", requested=RequestedParameters(seed=1, lora=lora), priority=2)
    stand.database.runs.enqueue([_new("a", dataset_id="spring"), _new("b"), same])
    prompts = {prompt.id.text: prompt for prompt in stand.claim(limit=3)}
    stand.record(completed(prompts["a"]), failed(prompts["b"]), completed(prompts["same"]))
    changed = [_new("a"), _new("b", requested=RequestedParameters(seed=5)), same, _new("c")]
    assert stand.database.runs.requeue_changed(changed) == 2
    assert stand.database.runs.requeue_changed(changed) == 2 - 2
    first, second = stand.get("a"), stand.get("b")
    for document in (first, second):
        assert document["status"] == "pending"
        assert not {"image_url", "used", "error", "error_code", "attempts"} & set(document)
    assert "dataset_id" not in first
    assert second["seed"] == 5
    assert stand.get("same")["status"] == "completed"
    assert stand.backend.count("datasets") == 3
    assert {prompt.id.text for prompt in stand.claim(limit=5)} == {"a", "b"}


def test_revise_leaves_what_somebody_works_on(stand):
    """A prompt under a live lease keeps its content and its claim; once the lease is over it is revised, and
    the claim is worth nothing any more.
    """
    stand.database.runs.enqueue([_new("a")])
    (prompt,) = stand.claim(limit=1)
    changed = [_new("a", requested=RequestedParameters(seed=5))]
    assert stand.database.runs.requeue_changed(changed) == 0
    assert stand.database.queue.holds(prompt.claim)
    stand.database.queue.extend([prompt.claim], 0)
    assert stand.database.runs.requeue_changed(changed) == 1
    assert stand.record(completed(prompt)) == []
    assert stand.claim(limit=1)[0].requested.seed == 5


def test_many_prompts_are_enqueued_lazily(stand):
    """More than one helping goes in, from anything that yields prompts."""
    assert stand.database.runs.enqueue(_new(f"p{n:04}") for n in range(1203)) == 1203
    assert stand.database.runs.enqueue([_new("p0000"), _new("p1202"), _new("p1203")]) == 1


def test_retry_forgets_the_failure(stand):
    """Failed prompts are pending as if new; others, and the owner's fields, stay as they are."""
    stand.put({"_id": 1, "mine": "kept"}, {"_id": 2})
    one, two = stand.claim()
    stand.database.queue.start([one.claim])
    stand.record(failed(one), completed(two), notify=True)
    assert stand.database.runs.retry(None, ALL) == 1
    found = stand.get(1)
    gone = {"error", "error_code", "error_at", "attempts", "deaths", "untold", "run_id"}
    assert not gone & set(found)
    assert (found["status"], found["mine"]) == ("pending", "kept")
    (again,) = stand.claim()
    assert (again.claim.number, again.attempts, again.deaths) == (2, 0, 0)


def test_retry_can_be_narrowed(stand):
    """By error code and by data set."""
    stand.put({"_id": 1, "dataset_id": "a"}, {"_id": 2, "dataset_id": "b"}, {"_id": 3, "dataset_id": "b"})
    one, two, three = stand.claim()
    stand.record(failed(one), failed(two), failed(three, ErrorCode.NOT_FINITE))
    assert stand.database.runs.retry(ErrorCode.SAFETY, Selection("b")) == 1
    assert texts(stand.claim()) == ["2"]
    assert stand.database.runs.retry(ErrorCode.ABANDONED, ALL) == 0
    assert stand.database.runs.retry(None, ALL) == 2


def test_what_a_run_came_to(stand):
    """Its completed and failed prompts and all pictures of the completed; not other runs', nor what waits."""
    stand.put(*({"_id": number} for number in range(1, 7)))
    one, two, three, four, five, _ = stand.claim()
    pictures = ("gs://b/2-1.png", "gs://b/2-2.png")
    stand.record(completed(one), completed(two, image_urls=pictures), failed(three), postponed(four))
    stand.record(completed(five), run_id="run-2")
    assert stand.database.runs.run_totals("run-1") == RunTotals(completed=2, failed=1, images=3)
    assert stand.database.runs.run_totals("$run_id") == RunTotals(completed=0, failed=0, images=0)


def test_counts_know_the_pictures_of_completed_prompts(stand):
    """A prompt of three pictures counts three times, one of one once, what is not completed not at all."""
    stand.put(*({"_id": n} for n in range(4)))
    several, one, bad, _ = stand.claim("w", 4)
    urls = tuple(f"gs://b/{n}.png" for n in range(3))
    stand.record(completed(several, image_urls=urls), completed(one), failed(bad))
    assert stand.database.runs.counts(ALL).images == 4


def test_holdings_say_what_each_worker_has(stand):
    """Two workers, one of them silent beyond its lease, and a prompt that another program holds; not what is
    pending or done, and of a data set only its own.
    """
    stand.put(*({"_id": n, "dataset_id": "spring" if n < 2 else "autumn"} for n in range(7)))
    stand.put({"_id": "foreign", "status": "processing"})
    assert [each.worker for each in stand.database.runs.claims_by_worker(ALL)] == ["unknown"]
    stand.backend.change("foreign", {"status": "completed"})
    stand.claim("gone", 2, -60)
    alive = stand.claim("alive", 4, selection=Selection("autumn"))
    stand.record(completed(alive[0]))
    held = {each.worker: each for each in stand.database.runs.claims_by_worker(ALL)}
    assert {name: (each.prompts, each.expired) for name, each in held.items()} == {
        "gone": (2, 2),
        "alive": (3, 0),
    }
    now = datetime.now(UTC)
    assert held["gone"].lease_until < now < held["alive"].lease_until < now + timedelta(minutes=2)
    assert [each.worker for each in stand.database.runs.claims_by_worker(Selection("spring"))] == ["gone"]


def test_a_run_id_is_held_by_one_live_run(stand):
    """The first of two that begin has it, until it ends or its lease is over; its own worker keeps it."""
    runs = stand.database.runs
    first = Run(id="night", started_at=_NOW, host="h", worker="w1")
    second = Run(id="night", started_at=_NOW, host="h", worker="w2", tries=2, resumed_at=_NOW)
    assert runs.begin_run(first, 60)
    assert not runs.begin_run(second, 60)
    assert runs.run("night").worker == "w1"
    assert runs.begin_run(first, 60)
    assert runs.begin_run(second, 60, "w1")
    assert not runs.begin_run(first, 60)
    runs.save_run(replace(second, status="failed"), 60)
    assert runs.begin_run(first, -1)
    assert runs.begin_run(second, 60)
    found = runs.run("night")
    assert (found.worker, found.tries, found.resumed_at) == ("w2", 2, _NOW)


def test_unknown_statuses_are_counted_by_value(stand):
    """Under ``other``, quoted and cut, the most frequent first; a missing status is pending."""
    states = ["done", "done", 7, "\x1b[31m", "x" * 500]
    stand.put({"_id": 0}, *({"_id": n, "status": state} for n, state in enumerate(states, 1)))
    counts = stand.database.runs.counts(ALL)
    assert (counts.pending, sum(counts.other.values())) == (1, 5)
    assert next(iter(counts.other.items())) == ("'done'", 2)
    assert {"7", "'\\x1b[31m'"} < counts.other.keys()
    assert max(map(len, counts.other)) <= 60
