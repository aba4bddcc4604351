"""Which batch a stage's time belongs to, when prompts have several pictures, fail, or are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.painter import Bench, Painter
from text2img.concurrency.stages import StageTimer
from text2img.databases import Selection
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed
from text2img.telemetry.otel import SdkTracer
from text2img.telemetry.tracing import TraceRecorder


class Timed(Painter):
    """Counts two milliseconds for each batch."""

    def generate(self, batch, on_step):
        made = super().generate(batch, on_step)
        self.seconds = {"denoise": self.seconds.get("denoise", 0.0) + 0.002}
        return made


class Spans:
    """The spans of a bench's run, once it is over."""

    def __init__(self, bench, *, long_running=False):
        provider, self._kept = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self._bench, self._traced = (
            bench,
            TraceRecorder(SdkTracer(provider), "night", long_running=long_running),
        )
        bench.seconds = StageTimer(self._traced.stage)
        bench.traces = self._traced
        bench.progress = self._traced.wrap_progress(bench.progress)

    def work(self, painter, **changes):
        try:
            self._bench.work(painter, **changes)
        finally:
            self.before_close = self._kept.get_finished_spans()
            self._traced.close(5, succeeded=True)
            self.all = self._kept.get_finished_spans()

    def named(self, name):
        return [span for span in self.all if span.name == name]

    def stages(self, batch):
        return sorted(
            span.name for span in self.all if span.parent and span.parent.span_id == batch.context.span_id
        )


@pytest.fixture
def bench(tmp_path):
    """Ten prompts, four a batch."""
    made = Bench(tmp_path, 10)
    yield made
    made.database.close()


def test_pictures_of_one_prompt_in_several_batches(bench):
    """Each batch has its own encoding and upload, also where the prompt is recorded with another batch."""
    spans = Spans(bench)
    requested = (replace(bench.requested[0], num_images=3),)
    spans.work(Timed(), requested=requested)
    batches = spans.named("batch")
    assert sum(batch.attributes["text2img.batch.size"] for batch in batches) == 30
    for batch in batches:
        assert set(spans.stages(batch)) >= {"denoise", "encode", "upload"}
        assert len(set(spans.stages(batch))) == len(spans.stages(batch))
    assert bench.counts == (0, 0, 10, 0)


def test_a_batch_ends_when_its_outcomes_are_recorded(bench):
    """All three spans have ended when the work is done, before the recorder ends those that are left."""
    spans = Spans(bench)
    spans.work(Timed())
    assert [span.name for span in spans.before_close].count("batch") == 3


def test_failed_prompts_are_counted_and_end_their_batch(bench):
    """A batch with a failure says how many; its span ends with the record all the same."""

    def fault(request):
        return PromptFailed(ErrorCode.SAFETY, "flagged") if request.parameters.seed == 3 else None

    spans = Spans(bench)
    spans.work(Timed(fault))
    failed = [batch.attributes["text2img.batch.failed"] for batch in spans.named("batch")]
    assert sorted(failed) == [0, 0, 1]
    assert all("record" in spans.stages(batch) for batch in spans.named("batch"))


def test_a_device_that_fails_ends_its_batch_as_an_error(bench):
    """The batch in which the device failed has that status, and so the run goes down as it would untraced."""

    def fault(request):
        raise DeviceFailed("it is gone")

    spans = Spans(bench)
    with pytest.raises(DeviceFailed):
        spans.work(Timed(fault))
    (batch,) = spans.named("batch")
    assert batch.status.status_code is StatusCode.ERROR


def test_a_batch_whose_claims_were_lost_is_not_kept_open(bench):
    """What another worker took away is never settled here; the span is there once the work is over."""

    class Robbed(Timed):
        def generate(self, batch, on_step):
            bench.database.queue.extend([request.prompt.claim for request in batch], -60)
            bench.database.queue.claim("thief", 10, 60, Selection())
            return super().generate(batch, on_step)

    spans = Spans(bench)
    spans.work(Robbed(), limit=4)
    (batch,) = spans.named("batch")
    assert batch.end_time is not None
    assert bench.counts[2] == 0


def test_a_servers_batches_are_traces_of_their_own(bench):
    """Without an end there is no span that all of them could stand under."""
    spans = Spans(bench, long_running=True)
    spans.work(Timed())
    batches = spans.named("batch")
    assert len({batch.context.trace_id for batch in batches}) == len(batches) == 3
    assert spans.named("run") == []
