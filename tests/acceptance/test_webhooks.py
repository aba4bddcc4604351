"""A prompt's own webhooks, from the outside: a backend hears how far its generations are and how they end."""

from __future__ import annotations

import sqlite3
import threading
import uuid
from contextlib import closing

import pytest
from pymongo import MongoClient
from standardwebhooks import Webhook
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.chaos.triggers import holding
from tests.servers import free_port
from tests.waiting import until

DATABASE = ("--database", "sqlite:///prompts.db")
JOB = (*DATABASE, "--output", "pictures", "--model-id", str(product.MODEL), "--webhook-host", "127.0.0.1")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CAPTION = product.SCENE
STEP_BY_STEP = "a boat, step by step"
PLACE = "/api/webhooks/inference"
MILESTONES = [0, 25, 50, 75, 90]
ALL_STEPS = 1_000_000


@pytest.fixture
def backend(httpserver):
    """Takes whatever comes."""
    httpserver.expect_request(f"{PLACE}/progress", method="PATCH").respond_with_data("")
    httpserver.expect_request(f"{PLACE}/complete", method="POST").respond_with_data("")
    httpserver.expect_request(f"{PLACE}/failed", method="POST").respond_with_data("")
    return httpserver


def _enqueue(folder, *prompts):
    product.add(folder, *({"text": CAPTION, **prompt} for prompt in prompts))


def _follow(server, folder, reached):
    """Let the device go on once the backend has heard of the milestone that its steps have reached.

    A device that is quicker than the backend would have milestones dropped, which is right but no part of
    what is tested. ``reached``: for each prompt whose text is STEP_BY_STEP, after how many steps of the
    device it has reached each milestone.
    """

    def handle(request):
        body = request.get_json()
        steps = [*reached[body["generation_id"]], ALL_STEPS]
        following = steps[MILESTONES.index(body["progress"]["progress_percent"]) + 1]
        whole, file = folder / "written", folder / f"{body['generation_id']}.steps"
        whole.write_text(str(following))
        whole.rename(file)
        return Response()

    server.clear()
    server.expect_request(f"{PLACE}/progress", method="PATCH").respond_with_handler(handle)
    server.expect_request(f"{PLACE}/complete", method="POST").respond_with_data("")
    server.expect_request(f"{PLACE}/failed", method="POST").respond_with_data("")


def _steps(of):
    """After how many of its steps a prompt with one picture has reached each milestone."""
    return [-(-percent * of // 100) for percent in MILESTONES]


def _heard(server, generation_id):
    """(last word of the path, body) of what was said of a generation, in order."""
    said = [(request.path.rsplit("/", 1)[1], request.get_json()) for request, _ in server.log]
    return [(word, body) for word, body in said if body["generation_id"] == generation_id]


def _ids(server, word):
    return [sent.headers["webhook-id"] for sent, _ in server.log if sent.path.endswith(f"/{word}")]


def _url(server, path=""):
    return f"http://127.0.0.1:{server.port}{path}"


def _row(folder, table, prompt_id):
    with closing(sqlite3.connect(folder / "prompts.db")) as connection:
        connection.row_factory = sqlite3.Row
        query = f"SELECT * FROM {table} WHERE _id = ?"  # noqa: S608 - the test's own
        return connection.execute(query, [prompt_id]).fetchone()


def _said_right(server, steps):
    """Of the generation with so many steps: every milestone once and in order, then its completion."""
    *progress, (word, complete) = _heard(server, f"g{steps}")
    assert [word for word, _ in progress] == ["progress"] * 5
    said = [body["progress"] for _, body in progress]
    assert [each["progress_percent"] for each in said] == MILESTONES
    assert {each["total_steps"] for each in said} == {steps}
    for each in said:
        assert each["current_step"] == -(-each["progress_percent"] * steps // 100)
        assert {type(value) for value in each.values()} == {int}
        assert each["estimated_seconds"] >= 0
        assert set(each) == {"current_step", "total_steps", "progress_percent", "estimated_seconds"}
    # Before the first step there is no pace, and after the last one nothing is left.
    assert any(each["estimated_seconds"] > 0 for each in said) == (steps > 1)
    assert word == "complete"
    metadata = {"seed": 7, "steps": steps, "guidance_scale": 4.0}
    assert complete["metadata"] == metadata
    assert complete["result_url"].endswith(f"/g{steps}.png")
    assert set(complete) == {"generation_id", "result_url", "metadata"}


@pytest.mark.smoke
def test_a_backend_hears_of_every_milestone_and_of_the_end(tmp_path, backend):
    """For 1, 7 and 50 steps: 0, 25, 50, 75 and 90 % in order, then the completion; each request signed
    and with the token, whichever way the backend's address was written.
    """
    ways = {1: "", 7: "/", 50: f"{PLACE}/progress"}
    prompts = [
        {
            "id": f"g{steps}", "text": STEP_BY_STEP, "seed": 7, "guidance_scale": 4,
            "num_inference_steps": steps, "webhook_url": _url(backend, path),
        }
        for steps, path in ways.items()
    ]  # fmt: skip
    _enqueue(tmp_path, *prompts)
    _follow(backend, tmp_path, {f"g{steps}": _steps(steps) for steps in ways})
    finished = sleeping.run(*JOB, folder=tmp_path, INTERNAL_API_TOKEN="sesame", CALLBACK_SECRET=SECRET)
    assert finished.returncode == 0, finished.stderr
    for steps in ways:
        _said_right(backend, steps)
    for sent, _ in backend.log:
        assert sent.method == ("PATCH" if sent.path.endswith("progress") else "POST")
        assert sent.headers["authorization"] == "Bearer sesame"
        assert sent.headers["x-request-source"] == "inference-server"
        Webhook(SECRET).verify(sent.get_data(), dict(sent.headers))
    assert "sesame" not in finished.stderr
    assert product.run("status", *DATABASE, folder=tmp_path).returncode == 0


def test_progress_and_result_are_of_all_its_pictures(tmp_path, backend):
    """Three pictures in batches of two: one series of milestones over all their steps, one completion that
    names them all.
    """
    prompt = {"id": "a", "num_images": 3, "num_inference_steps": 10, "webhook_url": _url(backend)}
    _enqueue(tmp_path, {**prompt, "text": STEP_BY_STEP})
    # Of 30 steps two are made at once for the first two pictures, and then one by one for the third.
    _follow(backend, tmp_path, {"a": [0, 4, 8, 13, 17]})
    finished = sleeping.run(*JOB, "--batch-size", "2", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    *progress, (word, complete) = _heard(backend, "a")
    assert [body["progress"]["progress_percent"] for _, body in progress] == MILESTONES
    assert {body["progress"]["total_steps"] for _, body in progress} == {30}
    assert word == "complete"
    assert len(set(complete["result_urls"])) == 3
    assert complete["result_url"] == complete["result_urls"][0]


def test_a_slow_backend_is_told_the_newest_and_holds_up_nothing(tmp_path, httpserver):
    """While it takes until the picture is stored to hear of 0 %, the milestones in between are dropped; the
    newest is told, and then the completion.
    """
    image = tmp_path / "pictures" / "a.png"

    def handle(request):
        until(image.exists)  # a run that waited for this would tell of each milestone, after 5 s
        return Response()

    httpserver.expect_request(f"{PLACE}/progress").respond_with_handler(handle)
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    _enqueue(tmp_path, {"id": "a", "num_inference_steps": 20, "webhook_url": _url(httpserver)})
    finished = sleeping.run(*JOB, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    *progress, (word, _) = _heard(httpserver, "a")
    assert [body["progress"]["progress_percent"] for _, body in progress] == [0, 90]
    assert word == "complete"


def test_a_failure_is_told_with_its_code(tmp_path, backend):
    """A prompt that cannot be made: failed, the code in capitals, the reason, no try before; no progress."""
    _enqueue(tmp_path, {"id": "a", "width": 72, "height": 64, "webhook_url": _url(backend)})
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as connection, connection:
        connection.execute("UPDATE datasets SET width = 65")
    finished = sleeping.run(*JOB, folder=tmp_path)
    assert finished.returncode == 3, finished.stderr
    [(word, body)] = _heard(backend, "a")
    assert word == "failed"
    assert "width" in body.pop("error_message")
    assert body == {"generation_id": "a", "error_code": "INVALID_PARAMETERS", "retry_count": 0}


@pytest.mark.parametrize("allowed", [(), ("--webhook-host", "backend.example, *.localhost")])
def test_no_host_is_told_that_was_not_allowed(tmp_path, backend, allowed):
    """The prompt fails before any work, with the option's name in the sentence; nothing goes to the host."""
    good = {"id": "good"}
    _enqueue(tmp_path, {"id": "a", "webhook_url": _url(backend)}, {"id": "b"}, good)
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as connection, connection:
        connection.execute("UPDATE datasets SET webhook_url = 'no URL' WHERE _id = 'b'")  # enqueue refuses it
    finished = sleeping.run(*JOB[:-2], *allowed, folder=tmp_path, INTERNAL_API_TOKEN="t")
    assert (finished.returncode, finished.stdout.split(";")[0]) == (3, "completed 1, failed 2, remaining 0")
    for name, words in (("a", "--webhook-host"), ("b", "webhook_url must be")):
        row = _row(tmp_path, "datasets", name)
        assert (row["status"], row["error_code"]) == ("error", "invalid_parameters")
        assert words in row["error"]
        assert row["webhook_untold"] is None
        assert not (tmp_path / "pictures" / f"{name}.png").exists()
    assert backend.log == []


def test_what_a_dead_backend_missed_the_next_run_tells(tmp_path, backend):
    """With nobody there the picture is made, the status is 0 and ``status`` shows what is untold; a run with
    nothing else to do tells it.
    """
    _enqueue(
        tmp_path, {"id": "a", "num_inference_steps": 1, "webhook_url": f"http://127.0.0.1:{free_port()}"}
    )
    down = sleeping.run(*JOB, "--callback-patience", "0", folder=tmp_path)
    assert (down.returncode, down.stdout.split(";")[0]) == (0, "completed 1, failed 0, remaining 0")
    status = product.run("status", *DATABASE, folder=tmp_path).stdout
    assert "notifications: 1 to be sent, 0 rejected" in status
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as connection, connection:  # it has moved
        where = (f"{_url(backend)}{PLACE}/complete", _url(backend))
        connection.execute("UPDATE callbacks SET url = ?, origin = ?", where)
    assert product.run(*JOB, folder=tmp_path).returncode == 0
    assert [word for word, _ in _heard(backend, "a")] == ["complete"]
    status = product.run("status", *DATABASE, folder=tmp_path).stdout
    assert "to be sent" in status
    assert "notifications: 1" not in status


def _killed_when(folder, condition):
    """Start a run, and kill it with SIGKILL once the condition is true."""
    with sleeping.running(*JOB, folder=folder) as process:
        until(condition, ended=process.poll)


def test_killed_between_record_and_notice_the_next_run_tells_it(tmp_path, backend):
    """SIGKILL when the prompt is completed and its notice not yet kept: the next run tells it once, under the
    id that was recorded with it.
    """
    _enqueue(tmp_path, {"id": "a", "webhook_url": _url(backend)})
    with holding(tmp_path / "prompts.db", "BEFORE INSERT ON callbacks", 1) as sight:
        _killed_when(tmp_path, sight.is_set)
    row = _row(tmp_path, "datasets", "a")
    assert (row["status"], _ids(backend, "complete")) == ("completed", [])
    assert product.run(*JOB, folder=tmp_path).returncode == 0
    assert _ids(backend, "complete") == [row["webhook_untold"]]
    assert product.run(*JOB, folder=tmp_path).returncode == 0
    assert len(_ids(backend, "complete")) == 1


def test_killed_while_it_tells_the_next_run_tells_it_under_the_same_id(tmp_path, httpserver):
    """SIGKILL after the backend has heard and before it has answered: it hears once more, with the same id
    and body, so that it knows it for the same.
    """
    heard, killed = [], threading.Event()

    def handle(request):
        heard.append((request.headers["webhook-id"], request.get_data()))
        killed.wait()
        return Response()

    httpserver.expect_request(f"{PLACE}/progress").respond_with_data("")
    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(handle)
    _enqueue(tmp_path, {"id": "a", "webhook_url": _url(httpserver)})
    _killed_when(tmp_path, lambda: heard)
    killed.set()
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as connection, connection:
        connection.execute("UPDATE callbacks SET lease_expires_at = NULL")  # 15 s, which are not waited for
    assert product.run(*JOB, folder=tmp_path).returncode == 0
    assert len(heard) == 2
    assert heard[0] == heard[1]


def test_all_of_it_on_mongodb(tmp_path, mongodb_server, backend):
    """The same job over MongoDB: milestones, completion, failure, and nothing untold."""
    name = f"t{uuid.uuid4().hex[:12]}"
    uri = f"{mongodb_server.rstrip('/')}/{name}"
    with MongoClient(uri) as client:
        client[name].datasets.insert_many([
            {"_id": "g7", "text": STEP_BY_STEP, "seed": 7, "guidance_scale": 4, "num_inference_steps": 7,
             "webhook_url": _url(backend)},
            {"_id": "bad", "text": CAPTION, "width": 65, "webhook_url": _url(backend)},
        ])  # fmt: skip
        _follow(backend, tmp_path, {"g7": _steps(7)})
        finished = sleeping.run("--mongo-uri", uri, *JOB[2:], folder=tmp_path)
        assert finished.returncode == 3, finished.stderr
        _said_right(backend, 7)
        assert [word for word, _ in _heard(backend, "bad")] == ["failed"]
        assert client[name].callbacks.count_documents({"state": "told"}) == 2
        assert client[name].datasets.count_documents({"webhook_untold": {"$exists": True}}) == 0


def test_doctor_looks_the_hosts_up(tmp_path):
    """Names that nobody knows, and what is no name, are found before a run."""
    _enqueue(tmp_path, {"id": "a"})
    cases = [
        ("127.0.0.1, *.example.com", 0, "allowed hosts: 127.0.0.1, *.example.com"),
        ("no-such-host.invalid", 1, "no-such-host.invalid has no address"),
        ("https://x", 2, "is not a host"),
    ]
    job = ("--database", f"sqlite:///{tmp_path}/prompts.db", *JOB[2:-1])
    each = product.run_each([("doctor", *job, hosts) for hosts, _, _ in cases], tmp_path)
    for (_, status, said), finished in zip(cases, each, strict=True):
        assert finished.returncode == status, finished.stdout
        assert said in finished.stdout
