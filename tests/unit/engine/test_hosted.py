"""The hosted engine against a service over the wire: what is asked of it, and what its answers become."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import traceback
from contextlib import nullcontext as nothing

import pytest

from tests.hosted import TEXT, Clock, engine, generate, request, waiting_engine
from tests.servers.fal import KEY, MODEL, data_url, painted, shade
from tests.waiting import until
from text2img.engine import GeneratedImage
from text2img.engine.hosted import HostedOptions
from text2img.engine.hosted.engine import HostedEngine
from text2img.engine.hosted.queue_request import HttpClient, RequestFailed
from text2img.errors import ConfigurationError, DeviceFailed, ErrorCode, ModelFailed, PromptFailed, Stopped
from text2img.prompts import RequestedParameters


def failed(fal, **options):
    """The failure that the one prompt became."""
    (end,) = generate(fal, **options)
    assert isinstance(end, PromptFailed)
    return end


def test_a_picture_comes_back_as_it_was_asked_for(fal):
    """The model's documented input goes out; the pixels, the cost and the request's id come back."""
    (image,) = generate(fal, request(negative_prompt="blurry"))
    assert fal.submitted == [
        {
            "prompt": TEXT,
            "negative_prompt": "blurry",
            "seed": 11,
            "num_inference_steps": 4,
            "guidance_scale": 2.5,
            "image_size": {"width": 128, "height": 64},
            "num_images": 1,
            "output_format": "png",
            "enable_safety_checker": True,
        }
    ]
    assert image.pixels.shape == (64, 128, 3)
    assert tuple(image.pixels[0, 0]) == shade(11)
    assert (image.scheduler, image.seed, image.truncated) == ("hosted", None, False)
    assert image.provider_metadata == {"request_id": next(iter(fal.requests)), "billed_units": 1.5}


def test_the_key_goes_to_the_queue_and_not_with_the_picture(fal):
    """Whoever keeps the pictures' files never sees the key."""
    generate(fal)
    assert fal.keys_at_files == [None]


def test_a_batch_is_drawn_at_once_and_comes_back_in_order(fal):
    """Four requests are at the service together; each picture is its own; progress is told as steps."""
    fal.together = threading.Barrier(4)
    steps = []
    batch = [request(name=str(seed), seed=seed, num_inference_steps=28) for seed in (5, 6, 7, 8)]
    pictures = engine(fal).generate(batch, lambda done, of: steps.append((done, of)))
    assert [tuple(image.pixels[0, 0]) for image in pictures] == [shade(seed) for seed in (5, 6, 7, 8)]
    assert steps == sorted(steps)
    assert {(7, 28), (14, 28), (21, 28), (28, 28)} <= set(steps) <= {(n, 28) for n in (0, 7, 14, 21, 28)}


def test_the_safety_checker_goes_as_the_team_wants_it(fal):
    """A configuration that switches the checker off is told to the service."""
    generate(fal, safety_checker=False)
    assert fal.submitted[0]["enable_safety_checker"] is False


def test_a_picture_inside_the_answer(fal):
    """A data: URL is read like a file; nothing else is fetched."""
    fal.plan(TEXT, fields={"images": [{"url": data_url(3, (128, 64))}]})
    (image,) = generate(fal)
    assert tuple(image.pixels[0, 0]) == shade(3)
    assert fal.keys_at_files == []


def test_what_was_chosen_elsewhere_is_said(fal):
    """Another seed and another size than asked for are the picture's own, not corrected and not hidden."""
    fal.plan(TEXT, size=(96, 96), fields={"seed": 99})
    (image,) = generate(fal)
    assert image.seed == 99
    assert image.pixels.shape == (96, 96, 3)


@pytest.mark.parametrize("fields", [{"seed": None}, {"seed": "11"}, {"seed": -4}, {"seed": True}])
def test_a_seed_that_is_none_is_not_believed(fal, fields):
    """Where the answer tells no seed, or none that can be one, the one asked for stands."""
    fal.plan(TEXT, fields=fields)
    assert generate(fal)[0].seed is None


@pytest.mark.parametrize("units", ["nan", "inf", "-1", "", "a lot"])
def test_a_cost_that_is_no_number_is_not_noted(fal, units):
    """Only a finite number of units, from 0 on, counts as what was billed."""
    fal.plan(TEXT, headers={"x-fal-billable-units": units})
    assert "billed_units" not in generate(fal)[0].provider_metadata


BLACK = painted(None, (128, 64))
SCHEMA = {
    "detail": [
        {"loc": ["body", "num_inference_steps"], "msg": "must be at most 12", "type": "less_than_equal"}
    ]
}
POLICY = {"detail": [{"loc": ["body", "prompt"], "msg": "was flagged", "type": "content_policy_violation"}]}


@pytest.mark.parametrize(
    ("plan", "code", "words"),
    [
        ({"submit": [(422, {}, SCHEMA)]}, "invalid_parameters", "num_inference_steps must be at most 12"),
        ({"result": [(422, {}, SCHEMA)]}, "invalid_parameters", "num_inference_steps must be at most 12"),
        ({"result": [(422, {}, POLICY)]}, "safety", "prompt was flagged"),
        ({"fields": {"has_nsfw_concepts": [True]}}, "safety", "flagged the image"),
        ({"fields": {"has_nsfw_concepts": None}, "image": BLACK}, "safety", "all black"),
        ({"result": [(500, {}, {"detail": "CUDA ran dry"})]}, "generation_failed", "CUDA ran dry"),
        ({"result": [(200, {}, b"<html>")]}, "generation_failed", "no JSON object"),
        ({"submit": [(200, {}, {"request_id": "../../x"})]}, "generation_failed", "no request_id"),
        ({"fields": {"images": []}}, "generation_failed", "no image"),
        ({"fields": {"images": [{"url": 7}]}}, "generation_failed", "no image"),
        (
            {"fields": {"images": [{"url": "data:image/png;base64,!!"}]}},
            "generation_failed",
            "not valid base64",
        ),
        ({"image": b"GIF89a"}, "generation_failed", "a file that is not an image"),
        ({"image": painted(1, (128, 64))[:-40]}, "generation_failed", "a file that is not an image"),
        ({"image": painted(1, (9000, 8000))}, "generation_failed", "too large"),
        ({"states": ["CANCELLED"]}, "generation_failed", "the request is CANCELLED"),
        ({"states": ["\ud800\x00x\n"]}, "generation_failed", "the request is x"),
        ({"submit": [(422, {}, {"detail": "\ud800a\x00b\u2028c"})]}, "invalid_parameters", "a b c"),
        ({"submit": [(422, {}, {"detail": {"not": "a list"}})]}, "invalid_parameters", "(422)"),
        ({"submit": [(200, {}, b"[" * 100_000)]}, "generation_failed", "no JSON object"),
        ({"lost": True}, "generation_failed", "no longer has the request"),
    ],
)
def test_what_fails_one_prompt(fal, plan, code, words):
    """Each answer becomes the failure of its prompt by the code that fits, with the reason."""
    fal.plan(TEXT, **plan)
    end = failed(fal)
    assert end.code == ErrorCode(code)
    assert words in str(end)
    assert "\n" not in str(end)


def test_black_pictures_are_believed_where_the_checker_speaks_or_is_off(fal):
    """A black picture that the service calls safe, or that no checker has seen, is a picture."""
    fal.plan(TEXT, image=BLACK)
    assert isinstance(generate(fal)[0], GeneratedImage)
    fal.plan(TEXT, image=BLACK, fields={"has_nsfw_concepts": None})
    assert isinstance(generate(fal, safety_checker=False)[0], GeneratedImage)


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/x.png",
        "http://127.0.0.1:1/files/x.png",
        "https://fal.media.example.com/x.png",
        "https://notfal.media/x.png",
        "http://v3.fal.media/x.png",
        "https://v3.fal.media:8443/x.png",
        "https://user@v3.fal.media/x.png",
        "https://storage.googleapis.com/other/x.png",
        "https://[::1",
        "file:///etc/passwd",
        "ftp://fal.media/x.png",
        "https://v3.fal.media\\@example.com/x.png",
        "",
    ],
)
def test_addresses_that_are_not_the_services_are_not_asked(fal, address):
    """A picture is fetched from the service's own hosts alone, whatever its answer says."""
    fal.plan(TEXT, fields={"images": [{"url": address}]})
    end = failed(fal)
    assert end.code is ErrorCode.GENERATION_FAILED
    assert "address" in str(end)
    assert fal.keys_at_files == []


@pytest.mark.parametrize(
    "address",
    [
        "https://v3.fal.media/files/a/b.png",
        "https://fal.media/files/b.png",
        "https://storage.googleapis.com/falserverless/b.png",
    ],
)
def test_addresses_of_the_service_itself(address):
    """The hosts where fal keeps pictures are taken; loopback is not, unless the operator points there."""
    from text2img.engine.hosted.queue_request import check_address

    check_address(address, None)
    check_address("http://127.0.0.1:9/files/b.png", "http://127.0.0.1:9/queue")
    with pytest.raises(PromptFailed):
        check_address("http://127.0.0.1:9/files/b.png", None)


def test_what_passes_is_waited_out(fal):
    """429 with Retry-After, 503 and a gateway's page are asked again; the picture comes in the end."""
    answers = [(429, {"retry-after": "1"}, {}), (503, {}, b"<html>nginx</html>")]
    fal.plan(TEXT, submit=answers, result=[(502, {}, b"<html>nginx</html>")])
    clock = Clock(pauses := [])
    (image,) = generate(fal, clock=clock, retry_timeout=20)
    assert isinstance(image, GeneratedImage)
    assert pauses[0] == 1  # as the service asked
    assert 1.5 <= pauses[1] <= 2
    assert fal.asked["submit"] == 3
    assert len(fal.submitted) == 1


def test_no_wait_beyond_the_retry_timeout(fal):
    """A Retry-After beyond the retry timeout fails the run without any wait."""
    fal.plan(TEXT, submit=[(429, {"retry-after": "600"}, {})])
    clock = Clock(pauses := [])
    with pytest.raises(DeviceFailed, match="429"):
        generate(fal, clock=clock, retry_timeout=20)
    assert (pauses, fal.asked["submit"]) == ([], 1)


def test_an_address_that_is_signed_is_in_no_trace():
    """What a picture's address carries may open it to others: no message and no stack trace shows it."""
    address = "http://127.0.0.1:9/files/x?signature=hush"
    with pytest.raises(RequestFailed) as failure:
        HttpClient(1).request("GET", address)
    assert "127.0.0.1" in str(failure.value)
    assert "hush" not in "".join(traceback.format_exception(failure.value))


def test_a_service_that_is_away_fails_the_run_and_no_prompt(fal):
    """When nothing works until the retry timeout, no prompt's try is used up."""
    fal.down = True
    with pytest.raises(DeviceFailed, match="fal answers 503"):
        generate(fal, request(name="1"), request(name="2"))


def test_a_service_that_is_not_there(fal):
    """A refused connection reads as one line, without an address that could hold a secret."""
    with pytest.raises(DeviceFailed, match=r"127\.0\.0\.1 refuses connections"):
        generate(fal, url="http://127.0.0.1:9", retry_timeout=0.5)


def test_pictures_that_were_made_are_kept_when_the_service_goes_away(fal):
    """Where one of a batch is there, the others fail by themselves, to be tried again: it was paid for."""
    fal.plan("lost", submit=[(503, {}, b"")], forever=True)
    made, lost = generate(fal, request(name="1"), request("lost", name="2"))
    assert isinstance(made, GeneratedImage)
    assert isinstance(lost, PromptFailed)
    assert lost.code is ErrorCode.GENERATION_FAILED


def test_a_request_that_cannot_be_fetched_alone_does_not_end_every_run(fal):
    """A single request that the service took, and then has only faults for, fails by itself."""
    fal.plan(TEXT, result=[(503, {}, b"")], forever=True)
    assert failed(fal).code is ErrorCode.GENERATION_FAILED
    assert fal.cancelled == [TEXT]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, {"detail": f"no access with Key {KEY}"}), "refuses the key (401: no access with Key ***)"),
        ((403, {}, {"detail": "User is locked. See https://fal.ai/dashboard?t=1"}), "locked. See …"),
        ((402, {}, {}), "requires payment"),
        ((404, {}, {"detail": "Application not found"}), "has no model fal-ai/flux/dev"),
        ((307, {"location": "https://example.com"}, {}), "redirects"),
    ],
)
def test_what_ends_the_run(fal, answer, words):
    """What would be said of every prompt is the run's failure; neither the key nor an address is repeated."""
    fal.plan(TEXT, submit=[answer], forever=True)
    with pytest.raises(ModelFailed) as failure:
        generate(fal, request(name="1"), request(name="2"))
    assert words in str(failure.value)
    assert KEY not in str(failure.value)


@pytest.mark.parametrize("where", ["submit", "IN_QUEUE", "result", "file"])
def test_what_hangs_is_given_up(fal, where):
    """A service that takes a question and never answers, or lets a file trickle, is given up."""
    fal.plan(TEXT, hangs=where)
    # The retry timeout allows four attempts: on a busy machine another answer may take half a second once.
    with pytest.raises(DeviceFailed) if where == "submit" else nothing():
        assert failed(fal, timeout=0.5, retry_timeout=8).code is ErrorCode.GENERATION_FAILED
    assert not fal.end.is_set()  # it hangs still


def test_a_request_that_stays_as_it_is_is_taken_back(fal):
    """One that makes no progress for the stall timeout is cancelled, and fails alone."""
    fal.plan("stuck", states=["IN_QUEUE"])
    made, stuck = generate(fal, request(name="1"), request("stuck", name="2"), stall_timeout=1)
    assert isinstance(made, GeneratedImage)
    assert str(stuck) == "the request has been IN_QUEUE at fal for 1 s"
    assert fal.cancelled == ["stuck"]


def test_a_huge_download_is_cut_off(fal):
    """More than 64 MiB is not read to its end."""
    fal.plan(TEXT, image=b"\x89PNG" + bytes(65 * 2**20))
    assert str(failed(fal)) == "fal's answer is malformed: it is too large"


def test_a_stop_takes_the_requests_back(fal):
    """What on_step raises ends the batch, and what waits at the service is cancelled there: both requests
    that are looked at every now and then, and one that is to be asked for again in an hour.
    """
    texts = ["one", "two", "three"]
    for text in texts[:2]:
        fal.plan(text, states=["IN_QUEUE"])
    fal.plan("three", states=["COMPLETED"], result=[(503, {"retry-after": "3000"}, b"")], forever=True)

    def on_step(done, of):
        if len(fal.requests) == 3 and fal.asked["result"]:
            raise Stopped(signal.SIGTERM)

    drawing = waiting_engine(fal, retry_timeout=3600, stall_timeout=3600)
    with pytest.raises(Stopped):
        drawing.generate([request(text, name=text) for text in texts], on_step)
    until(lambda: sorted(fal.cancelled) == sorted(texts))


def test_a_stop_does_not_wait_for_what_hangs(fal):
    """Also while the service says nothing, and would be waited for for an hour, a stop comes through."""
    fal.plan(TEXT, hangs="submit")

    def on_step(done, of):
        if fal.reached.is_set():
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        engine(fal, timeout=3600, retry_timeout=3600).generate([request()], on_step)
    assert not fal.end.is_set()  # it hangs still


def test_the_card_needs_no_network():
    """Sizes, steps and what the model draws well with are known without asking anybody."""
    away = {"key": KEY, "url": "http://127.0.0.1:9"}
    model_info = HostedEngine(HostedOptions(model="fal-ai/flux/schnell", **away)).inspect()
    assert (model_info.name, model_info.width, model_info.height) == ("fal:fal-ai/flux/schnell", 1024, 1024)
    assert (model_info.requested.num_inference_steps, model_info.max_steps["hosted"]) == (4, 12)
    assert (
        HostedEngine(HostedOptions(model="someone/thing", **away)).inspect().requested
        == RequestedParameters()
    )


@pytest.mark.parametrize(
    ("model", "requested", "words"),
    [
        ("fal-ai/flux/schnell", {"num_inference_steps": 13}, "at most 12"),
        (MODEL, {"scheduler": "euler"}, "it supports only its own"),
        (MODEL, {"lora": {"path": "someone/lora"}}, "takes no LoRAs"),
    ],
)
def test_what_a_hosted_model_does_not_do_is_refused_here(fal, model, requested, words):
    """Before anything is sent and paid, a prompt learns what such a model cannot do."""
    with pytest.raises(PromptFailed, match=words):
        engine(fal, model=model).prepare(request(**requested))
    assert fal.submitted == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "a b"},
        {"key": "a\nb"},
        {"url": "http://example.com"},
        {"url": "https://user:word@example.com"},
        {"url": "ftp://127.0.0.1"},
        {"url": "https://example.com/?q=1"},
    ],
)
def test_options_that_would_not_do(wrong):
    """A key that no header carries, and a URL to which it would go in the clear, are refused at once."""
    with pytest.raises(ConfigurationError) as failure:
        HostedOptions(**{"model": MODEL, "key": KEY, **wrong})
    assert wrong.get("key", "word") not in str(failure.value)


def test_the_key_is_not_in_the_options_repr():
    """Options may be logged."""
    assert KEY not in repr(HostedOptions(model=MODEL, key=KEY))


def test_doctor_asks_for_the_price(fal):
    """The key and the model are tried without a picture being made, and the price is told."""
    said = engine(fal).check_access()
    assert said == "fal-ai/flux/dev: the key is accepted; 0.025 USD per megapixels"
    assert fal.submitted == []
    with pytest.raises(ModelFailed, match="refuses the key"):
        engine(fal, key="another").check_access()
    with pytest.raises(ModelFailed, match="has no model"):
        engine(fal, model="fal-ai/nothing").check_access()


def test_torch_is_not_imported(fal):
    """A whole hosted batch leaves torch, diffusers and transformers alone."""
    script = (
        "import sys; sys.path.insert(0, '.'); from tests.hosted import generate\n"
        f"class Fal: url = {fal.url!r}\n"
        "print(generate(Fal)[0].pixels.shape, {'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert made.stdout == "(64, 128, 3) set()\n"
