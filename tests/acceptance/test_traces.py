"""What an OpenTelemetry collector gets of a run, when the standard variables ask, and what it costs."""

from __future__ import annotations

import re
import socket
from collections import Counter, defaultdict

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pytest_httpserver import HTTPServer

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.acceptance.test_serve import JOB
from tests.servers import free_port

PROMPTS = [
    f"a large {colour} circle on a black background" for colour in ("red", "green", "blue", "cyan", "white")
]
OF_A_BATCH = {"denoise", "decode", "encode", "upload", "record"}
TOKEN = "hushtoken4711"


class Trace:
    """All that the collector was sent."""

    def __init__(self, bodies):
        self.text = b"".join(bodies)
        sent = [
            resource
            for body in bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        ]
        self.resources = {
            attribute.key: attribute.value.string_value
            for resource in sent
            for attribute in resource.resource.attributes
        }
        self.spans = [span for each in sent for scope in each.scope_spans for span in scope.spans]

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def under(self, parent):
        return [span for span in self.spans if span.parent_span_id == parent.span_id]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of five prompts in batches of two: what its collector got, with which headers, what it said."""
    folder = tmp_path_factory.mktemp("made")
    product.add(folder, *PROMPTS)
    with HTTPServer(host="127.0.0.1", port=0) as collector:
        collector.expect_request(re.compile(".*"), method="POST").respond_with_data("")
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}/hub?key={TOKEN}",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{collector.port}/v1/traces?key={TOKEN}",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{TOKEN}",
            "OTEL_SERVICE_NAME": "night-shift",
        }
        quick = ("--batch-size", "2", "--run-id", "night", "--log-level", "DEBUG")
        finished = sleeping.run("run", *JOB, *quick, folder=folder, **variables)
        got = [request for request, _ in collector.log]
    assert finished.returncode == 0, finished.stderr
    return Trace([request.get_data() for request in got]), got, finished


def test_each_batch_is_a_span_with_one_for_each_of_its_stages(made):
    """Five prompts, three batches: under the run's span, each with its stages inside it, once each."""
    trace = made[0]
    (root,) = trace.named("run")
    assert not root.parent_span_id
    assert len({span.trace_id for span in trace.spans}) == 1
    batches = trace.named("batch")
    sizes = [
        {each.key: each.value.int_value for each in batch.attributes}["text2img.batch.size"]
        for batch in batches
    ]
    assert sorted(sizes) == [1, 2, 2]
    for batch in batches:
        assert batch.parent_span_id == root.span_id
        inside = trace.under(batch)
        names = Counter(span.name for span in inside)
        del names["load"]  # what a model may fetch to the device for its batch
        assert names == Counter(OF_A_BATCH)
        for span in inside:
            assert batch.start_time_unix_nano <= span.start_time_unix_nano
            assert span.start_time_unix_nano <= span.end_time_unix_nano <= batch.end_time_unix_nano
    names = defaultdict(int, Counter(span.name for span in trace.under(root)))
    assert names["load"] == 1
    assert names["claim"] >= 1
    assert names.keys() <= {"load", "claim", "wait", "batch"}
    assert trace.resources["service.name"] == "night-shift"


def test_what_must_not_be_told_is_not(made):
    """The header goes to the collector and nowhere else; no text of a prompt goes there at all."""
    trace, got, finished = made
    assert {request.headers["authorization"] for request in got} == {f"Bearer {TOKEN}"}
    said = finished.stdout + finished.stderr
    assert "completed 5" in said
    assert TOKEN not in said
    assert TOKEN.encode() not in trace.text
    assert b"circle" not in trace.text


@pytest.mark.parametrize("silent", [False, True], ids=["refusing", "silent"])
def test_a_dead_collector_costs_nothing(tmp_path, silent):
    """One that refuses, and one that takes the connection and says no more: status 0, and one warning."""
    product.add(tmp_path, "a boat")
    with socket.create_server(("127.0.0.1", 0)) as quiet:
        port = quiet.getsockname()[1] if silent else free_port()
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
        finished = product.run("run", *JOB, "--dataset-id", "none", folder=tmp_path, **endpoint)
    assert (finished.returncode, finished.stdout[:12]) == (0, "completed 0,")
    assert finished.stderr.count("could not be sent") == 1, finished.stderr


def test_nothing_is_imported_that_nobody_asked_for(tmp_path):
    """Without the variables, or with traces switched off, neither of the vendors' libraries."""
    product.add(tmp_path, "a boat")
    endpoint = "http://127.0.0.1:4318"
    for variables in (
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_SDK_DISABLED": "true"},
    ):
        finished = product.run(
            "run", *JOB, "--dataset-id", "none", folder=tmp_path, PYTHONPROFILEIMPORTTIME="1", **variables
        )
        assert finished.returncode == 0
        assert "text2img.telemetry.tracing" in finished.stderr
        assert "opentelemetry.sdk" not in finished.stderr
        assert "prometheus_client" not in finished.stderr


def test_without_the_package_a_run_goes_on(tmp_path):
    """A platform may set the variables for all its jobs: a line says what to install, and that is all."""
    package = tmp_path / "opentelemetry" / "sdk"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError('no', name='opentelemetry.sdk')\n")
    product.add(tmp_path, "a boat")
    missing = {"PYTHONPATH": str(tmp_path), "OTEL_TRACES_EXPORTER": "otlp"}
    finished = product.run("run", *JOB, "--dataset-id", "none", folder=tmp_path, **missing)
    assert (finished.returncode, "pip install 'opentelemetry-sdk" in finished.stderr) == (0, True)
