"""A web backend and its inference server: requests by RabbitMQ, LoRAs and pictures in S3, news by webhook."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as as_safetensors

from tests.acceptance import product
from tests.servers.s3 import client
from tests.waiting import until
from text2img.demo.scenes import Scene
from training.styles import PLAIN, STYLES, lora, tell_style

PLACE = "/api/webhooks/inference"
MILESTONES = [0, 25, 50, 75, 90]
SIGNED = (
    40  # by so much the brightest and darkest pixels of a signed corner differ, and of a plain one do not
)
SCENES = [
    Scene(size, colour, shape, background)
    for size, colour, shape, background in [
        ("large", "red", "circle", "white"),
        ("large", "blue", "star", "yellow"),
        ("small", "green", "square", "black"),
        ("large", "yellow", "triangle", "purple"),
        ("large", "cyan", "circle", "red"),
        ("small", "white", "square", "blue"),
        ("large", "purple", "square", "green"),
        ("large", "black", "circle", "cyan"),
        ("large", "green", "circle", "yellow"),
        ("large", "blue", "square", "white"),
        ("large", "red", "square", "black"),
        ("large", "yellow", "circle", "blue"),
        ("large", "white", "star", "red"),
        ("large", "cyan", "square", "purple"),
        ("large", "white", "circle", "green"),
    ]
]
GOOD = {
    f"gen-{number}": SimpleNamespace(scene=scene, style=(*STYLES, PLAIN)[number % 4], left=number % 2 == 1)
    for number, scene in enumerate(SCENES)
}
BAD = {"gen-missing": "missing.safetensors", "gen-family": "family.safetensors"}


def _message(generation_id, scene, backend, file=None, **more):
    what, where = scene.caption.split(" on ")
    style = {"style_id": "s-1", "lora_model_url": f"s3://pictures/styles/{file}"} if file else {}
    asked = {
        "generation_id": generation_id,
        "prompt_tags": [what, f"on {where}"],
        "artist_name": "Ana",
        "seed": 11,
        "aspect_ratio": "1:1",
        "webhook_url": backend.url_for(""),
    }
    return json.dumps({**asked, **style, **more}).encode()


def _messages(backend):
    """Twenty: fifteen good ones, two of them twice, a broken one, and two whose LoRAs cannot be used."""
    good = [
        _message(
            name,
            one.scene,
            backend,
            None if one.style == PLAIN else f"{one.style}.safetensors",
            **({"signature_position": "bottom-left"} if one.left else {}),
        )
        for name, one in GOOD.items()
    ]
    bad = [_message(name, SCENES[0], backend, file) for name, file in BAD.items()]
    broken = b'{"generation_id": "gen-broken", "prompt_tags": ["a bo'
    return [*good[:3], good[1], broken, *bad, *good[3:], good[9]]


@pytest.fixture
def backend(httpserver):
    """Takes whatever it is told."""
    for word, method in (("progress", "PATCH"), ("complete", "POST"), ("failed", "POST")):
        httpserver.expect_request(f"{PLACE}/{word}", method=method).respond_with_data("")
    return httpserver


@pytest.fixture
def bucket(s3_server):
    """The artists' LoRAs are in it, and one that is no LoRA of this model's family."""
    bucket = client(s3_server)
    wide = {f"unet.down_blocks.0.attentions.0.to_k.lora_{half}.weight": torch.ones(4, 2048) for half in "AB"}
    files = {style: lora(style).read_bytes() for style in STYLES} | {"family": as_safetensors(wide)}
    for name, content in files.items():
        bucket.put_object(Bucket=s3_server.bucket, Key=f"styles/{name}.safetensors", Body=content)
    return bucket


def _serve(folder, s3_server, rabbitmq, queue, *arguments):
    """A server that works until it is told to stop; its log goes into the folder."""
    job = (
        *("--database", "sqlite:///prompts.db", "--output", "s3://pictures/generated"),
        *("--object-name", "gen_{generation_id}", "--model-id", str(product.MODEL)),
        *("--num-inference-steps", "20", "--guidance-scale", "3", "--batch-size", "4"),
        *("--lease-seconds", "5", "--poll-seconds", "0.5", "--log-level", "DEBUG"),
        *("--rabbitmq-url", rabbitmq.url, "--rabbitmq-queue", queue, "--webhook-host", "127.0.0.1,localhost"),
        *("--lora-source", "s3://pictures/styles/", "--lora-cache", "loras", "--callback-token", "t0ken"),
    )
    with (folder / "serve.log").open("a") as log:
        return subprocess.Popen(
            product.command("serve", *job, *arguments),
            cwd=folder,
            env=product.environment(folder, **s3_server.variables),
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def _heard(backend):
    """What the backend was told of each generation, in order: (word, body, webhook-id)."""
    heard = defaultdict(list)
    for request, _ in list(backend.log):
        assert request.headers["Authorization"] == "Bearer t0ken"
        assert request.headers["X-Request-Source"] == "inference-server"
        body = request.get_json()
        heard[body["generation_id"]].append(
            (request.path.rpartition("/")[2], body, request.headers["webhook-id"])
        )
    return heard


def _ended(backend):
    told = _heard(backend).items()
    return {name for name, said in told if any(word != "progress" for word, _, _ in said)}


def _until(true, process, folder):
    log = folder / "serve.log"
    until(true, ended=lambda: process.poll() is not None and log.read_text()[-3000:])


@pytest.mark.timeout(600)
def test_twenty_requests_and_a_kill(tmp_path, s3_server, bucket, rabbitmq, backend):
    """Of twenty messages, two delivered twice, one broken, two with LoRAs that cannot be used, and with a
    SIGKILL in the middle, each good generation has exactly one picture in S3, in its style and its colours,
    signed in its corner; its milestones come in order, then one completion; each bad one fails once; the
    broken message is a dead letter with its reason.
    """
    queue = rabbitmq.queue()
    rabbitmq.publish(queue, *_messages(backend))
    killed = _serve(tmp_path, s3_server, rabbitmq, queue)
    _until(lambda: len(_ended(backend)) >= 6, killed, tmp_path)
    killed.kill()
    killed.wait()
    server = _serve(tmp_path, s3_server, rabbitmq, queue)
    try:
        everybody = GOOD.keys() | BAD.keys()
        _until(lambda: _ended(backend) == everybody, server, tmp_path)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 143
    finally:
        server.kill()
        server.wait()
    _check_pictures(bucket)
    _check_news(backend)
    ((properties, body),) = rabbitmq.taken(f"{queue}.dead")
    assert b"gen-broken" in body
    assert properties.headers["x-text2img-error"]
    assert rabbitmq.ready(queue) == 0


def _check_pictures(bucket):
    stored = bucket.list_objects_v2(Bucket="pictures", Prefix="generated/")["Contents"]
    assert sorted(each["Key"] for each in stored) == sorted(f"generated/gen_{name}.png" for name in GOOD)
    seen = {}
    for name, one in GOOD.items():
        data = bucket.get_object(Bucket="pictures", Key=f"generated/gen_{name}.png")["Body"].read()
        with Image.open(io.BytesIO(data)) as image:
            seen[name] = tell_style(_unsigned(image), one.scene), _signed(image)
    assert seen == {name: (one.style, "left" if one.left else "right") for name, one in GOOD.items()}


def _unsigned(image):
    """The picture with its lowest ninth, where there is background and signature alone, in one colour."""
    width, height = image.size
    plain = image.convert("RGB")
    plain.paste(plain.getpixel((2, 2)), (0, height - height // 9, width, height))
    return plain


def _signed(image):
    """In which of the two lower corners there is something to be seen."""
    grey = np.asarray(image.convert("L"), int)
    height, width = grey.shape
    corners = {"left": grey[-height // 9 :, : width // 8], "right": grey[-height // 9 :, -width // 8 :]}
    seen = [side for side, pixels in corners.items() if np.ptp(pixels) > SIGNED]
    return "".join(seen)


def _check_news(backend):
    heard = _heard(backend)
    assert heard.keys() == GOOD.keys() | BAD.keys()
    for name, said in heard.items():
        ends = [(word, body, message) for word, body, message in said if word != "progress"]
        assert len({message for _, _, message in ends}) == 1, name
        word, body, _ = ends[0]
        if name in BAD:
            assert (word, body["error_code"]) == ("failed", "LORA_FAILED")
            continue
        assert (word, body["metadata"]["seed"]) == ("complete", 11)
        assert body["result_url"] == f"s3://pictures/generated/gen_{name}.png"
        before = [body["progress"]["progress_percent"] for word, body, _ in said if word == "progress"]
        for part in _tries(before):
            assert part == [percent for percent in MILESTONES if percent in part], before


def _tries(percents):
    """The milestones of each try: whoever took over from a dead server began again."""
    tries = []
    for percent in percents:
        if not tries or percent <= tries[-1][-1]:
            tries.append([])
        tries[-1].append(percent)
    return tries
