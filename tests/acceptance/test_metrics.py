"""What Prometheus gets of a run: a file, a push, an answer while a server works; and what that costs."""

from __future__ import annotations

import re
import signal
import socket
import sqlite3
import urllib.request
from base64 import b64encode
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping
from tests.acceptance.test_serve import JOB, serving
from tests.servers import free_port
from tests.waiting import until
from text2img.errors import ErrorCode

QUICK = ("--metrics-seconds", "1")


def parsed(text):
    """Each sample by its name and label, after a check of what promtool would check."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    found = {}
    for family in families:
        assert family.name.startswith("text2img_")
        assert family.documentation
        assert family.type in {"counter", "gauge"}
        for sample in family.samples:
            assert sample.name.endswith("_total") is (family.type == "counter")
            assert len(sample.labels) <= 1
            found[(sample.name.removeprefix("text2img_"), *sample.labels.values())] = sample.value
    return found


@pytest.fixture(scope="module")
def gateway():
    """A server for what takes pushes as a Pushgateway does: PUT replaces a group, 200 is success."""
    with HTTPServer(host="127.0.0.1", port=0) as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory, gateway):
    """A run of two prompts with two pictures each, which goes on until something was pushed, and one that
    fails; its folder, and what it said.
    """
    folder = tmp_path_factory.mktemp("made")

    def handle(request):
        (folder / "release").touch()
        return Response()

    gateway.expect_request(re.compile("/hub/metrics/job/.*"), method="PUT").respond_with_handler(handle)
    product.add(folder, "hold", "a large green square on a white background")
    with closing(sqlite3.connect(folder / "prompts.db")) as database, database:
        database.execute("INSERT INTO datasets (_id, text) VALUES (1, '')")
    url = f"http://night:hush%2Fword@127.0.0.1:{gateway.port}/hub"
    told = ("--callback-url", f"http://127.0.0.1:{free_port()}/", "--callback-patience", "0")
    arguments = ("--num-images", "2", "--metrics-textfile", "night.prom", "--pushgateway", url, *told)
    finished = sleeping.run("run", *JOB, *QUICK, *arguments, "--log-level", "DEBUG", folder=folder)
    return folder, finished


def test_a_run_leaves_its_figures_in_a_file(made):
    """Images, outcomes, failures by code, seconds by stage, the device's share, backlogs: as they were."""
    folder, finished = made
    assert finished.returncode == 3, finished.stderr
    found = parsed((folder / "night.prom").read_text())
    assert found["images_total",] == 4
    assert (found["prompts_total", "completed"], found["prompts_total", "failed"]) == (2, 1)
    codes = {code: value for (name, *code), value in found.items() if name == "prompt_failures_total"
             for code in code}  # fmt: skip
    assert codes == {**dict.fromkeys(map(str, ErrorCode), 0), "invalid_prompt": 1}
    stages = {"claim", "load", "denoise", "decode", "encode", "upload", "record"}
    assert all(found["stage_seconds_total", stage] > 0 for stage in stages)
    device = found["stage_seconds_total", "denoise"] + found["stage_seconds_total", "decode"]
    assert found["device_busy_seconds_total",] >= device - 0.01
    assert 0 < found["device_busy_ratio",] <= 1
    assert found["queue_prompts", "claimable"] == found["expired_leases",] == found["claims_lost_total",] == 0
    assert found["untold_notices", "callback"] == 1
    assert found["run_succeeded",] == 1
    assert 0 < found["run_start_time_seconds",] < found["run_end_time_seconds",]
    written = (folder / "night.prom").stat().st_mtime
    assert found["run_end_time_seconds",] == pytest.approx(written, abs=3600)  # seconds since 1970
    assert [path.name for path in folder.glob("night.prom*")] == ["night.prom"]


def test_a_run_pushes_its_figures(made, gateway):
    """Several times, the last time all of them; as the user of the URL, whose password is said nowhere."""
    pushed = [request for request, _ in gateway.log]
    assert len(pushed) > 1
    assert {request.path for request in pushed} == {
        f"/hub/metrics/job/text2img/instance/{socket.gethostname()}"
    }
    assert pushed[-1].headers["Authorization"] == f"Basic {b64encode(b'night:hush/word').decode()}"
    last = parsed(pushed[-1].get_data(as_text=True))
    assert (last["images_total",], last["run_succeeded",]) == (4, 1)
    assert ("run_succeeded",) not in parsed(pushed[0].get_data(as_text=True))
    assert "completed 2" in made[1].stdout
    assert "hush" not in made[1].stdout + made[1].stderr


@pytest.mark.parametrize("answers", [False, True], ids=["silent", "refusing"])
def test_a_dead_gateway_costs_nothing(tmp_path, answers):
    """One that refuses, and one that takes the connection and says no more: status 0, the file is
    written, and the URL's password stays where it was.
    """
    product.add(tmp_path, "a boat")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = free_port() if answers else silent.getsockname()[1]
        url = f"http://night:hushword@127.0.0.1:{port}/metrics/job/j/team/a"
        other = ("--dataset-id", "none", "--metrics-textfile", "t.prom", "--pushgateway", url)
        finished = product.run("run", *JOB, *other, "--log-level", "DEBUG", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 0, ")
    assert "published" in finished.stderr
    assert "hushword" not in finished.stderr
    assert parsed((tmp_path / "t.prom").read_text())["run_succeeded",] == 1


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return parsed(answer.read().decode())


def test_a_server_answers_while_it_works(tmp_path):
    """Before there is anything, while prompts wait that it does not take, and after it has made one."""
    product.add(tmp_path)
    port = free_port()
    with serving(tmp_path, "--metrics-port", str(port), *QUICK) as server:
        server.says(f"metrics at http://127.0.0.1:{port}/metrics")
        assert scraped(port)["images_total",] == 0
        product.add(tmp_path, SCENE)
        server.says("completed p-")
        until(lambda: scraped(port)["images_total",] >= 1)
        found = scraped(port)
        assert found["stage_seconds_total", "denoise"] > 0
        assert ("run_succeeded",) not in found
        assert server.ends(signal.SIGTERM)[0] == 143


def test_silent_receivers_do_not_hold_up_a_stop(tmp_path):
    """A gateway and a trace collector that take connections and say no more: asked to end after a picture, a
    server ends by itself.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        with serving(tmp_path, "--pushgateway", url, *QUICK, **traced) as server:
            product.add(tmp_path, SCENE)
            server.says("completed p-")
            assert server.ends(signal.SIGTERM)[0] == 143
    assert "the metrics of the run's end could not be published" in server.said


def test_what_cannot_be_is_refused(tmp_path):
    """Before anything is claimed: status 2, and a line that names the option."""
    wrong = [
        (("run", "--metrics-textfile", "no/folder/t.prom"), "--metrics-textfile"),
        (("run", "--pushgateway", "gateway:9091"), "--pushgateway"),
        (("run", "--pushgateway", "http://gateway/metrics/job/a/b"), "--pushgateway"),
        (("serve", "--metrics-port", "high"), "--metrics-port"),
        (("serve", "--metrics-port", "70000"), "--metrics-port"),
    ]
    each = product.run_each([(command, *JOB, *arguments) for (command, *arguments), _ in wrong], tmp_path)
    for (_, named), refused in zip(wrong, each, strict=True):
        assert (refused.returncode, named in product.errors(refused)[-1]) == (2, True), refused.stderr


def test_doctor_finds_what_a_run_would_refuse(tmp_path):
    """A folder that is not there fails its line, with status 2; one that is there passes, and stays empty."""
    product.add(tmp_path)
    for file, word, status in (("no/folder/t.prom", "FAILED", 2), ("t.prom", "ok", 0)):
        arguments = ("--metrics-textfile", file, "--pushgateway", "http://127.0.0.1:9/")
        said = product.run("doctor", *JOB, *arguments, folder=tmp_path)
        assert re.search(rf"^metrics +{word} .*--metrics-textfile", said.stdout, re.MULTILINE), said.stdout
        assert said.returncode == status
    assert not list(tmp_path.glob("*.prom"))


def test_a_port_that_is_taken_is_refused(tmp_path):
    """A server that could not be asked would not be noticed: status 2."""
    product.add(tmp_path, "a boat")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = product.run("serve", *JOB, "--metrics-port", port, folder=tmp_path)
    assert (refused.returncode, "--metrics-port" in refused.stderr) == (2, True), refused.stderr


def test_without_the_package_a_sentence_says_what_to_install(tmp_path):
    """Asked for and not installed: status 2; not asked for: it is not even looked for."""
    (tmp_path / "prometheus_client.py").write_text(
        "raise ModuleNotFoundError('no', name='prometheus_client')\n"
    )
    missing = {"folder": tmp_path, "PYTHONPATH": str(tmp_path)}
    product.add(tmp_path, "a boat")
    refused = product.run("run", *JOB, "--metrics-textfile", "t.prom", **missing)
    assert (refused.returncode, "pip install 'prometheus-client" in refused.stderr) == (2, True)
    assert product.run("run", *JOB, "--dataset-id", "none", **missing).returncode == 0
