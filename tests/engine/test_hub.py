"""Models by hub id, against a small hub of our own on loopback; each in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from werkzeug import Response

from tests.engine.conftest import look
from text2img.engine.hub import wanted_files
from text2img.engine.options import EngineOptions
from text2img.errors import ModelFailed

COMMIT = "c0ffee" * 6 + "c0ff"
CODE = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from text2img.engine.diffusers import DiffusersEngine
from text2img.engine.options import EngineOptions
from text2img.errors import Text2ImgError
try:
    card = DiffusersEngine(EngineOptions(model='owner/model', device='cpu', **eval(sys.argv[1]))).inspect()
    print(card.name, card.revision, card.family, 'torch' in sys.modules, *card.approximations.values())
except Text2ImgError as exc:
    print(type(exc).__name__, exc)
"""


def inspect_model(tmp_path, endpoint, offline="0", **options):
    """What a fresh process says of owner/model."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, repr(options)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture
def hub(httpserver, tiny):
    """A hub that has the tiny SD 1 model, some pickles and a fp16 variant beside it, and counts downloads."""
    folder = tiny("sd1")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {"model.ckpt": b"x", "unet/diffusion_pytorch_model.bin": b"x", "README.md": b"x"}
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = b"x"
    return httpserver.url_for("").rstrip("/"), repository(httpserver, "owner/model", files)


def repository(httpserver, name, files):
    """Have the hub serve a repository; what is fetched of it from now on."""
    info = {
        "id": name,
        "modelId": name,
        "sha": COMMIT,
        "siblings": [{"rfilename": path} for path in files],
    }
    tree = [
        {"type": "file", "path": path, "size": len(body), "oid": "0" * 40} for path, body in files.items()
    ]
    for revision in ("/revision/main", f"/revision/{COMMIT}", ""):
        httpserver.expect_request(f"/api/models/{name}{revision}").respond_with_json(info)
    httpserver.expect_request(f"/api/models/{name}/tree/{COMMIT}").respond_with_json(tree)
    fetched = []

    def serve(path, body):
        def respond(request):
            if request.method == "GET":
                fetched.append(path)
            headers = {"ETag": f'"{hash(body):x}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
            return Response(body, headers=headers)

        return respond

    for path, body in files.items():
        for revision in ("main", COMMIT):
            url = f"/{name}/resolve/{revision}/{path}"
            httpserver.expect_request(url).respond_with_handler(serve(path, body))
    return fetched


def test_fetched_once(hub, tmp_path):
    """Only what is read is fetched, without torch; the second run, and one without network, need no more."""
    endpoint, fetched = hub
    expected = f"owner/model {COMMIT} sd False"
    assert inspect_model(tmp_path, endpoint) == expected
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert not [name for name in fetched if name.endswith((".bin", ".ckpt", ".md", "fp16.safetensors"))]
    del fetched[:]
    assert inspect_model(tmp_path, endpoint) == expected
    assert fetched == []
    assert inspect_model(tmp_path, "http://127.0.0.1:9", offline="1") == expected
    assert inspect_model(tmp_path, "http://127.0.0.1:9") == expected


def test_an_autoencoder_is_fetched_as_models_are(hub, httpserver, tiny, tmp_path):
    """Its configuration and one set of weights, no pickle; recorded with its commit, found again offline."""
    endpoint, _ = hub
    folder = tiny("tiny autoencoder")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pickled = {"diffusion_pytorch_model.bin": b"x", "taesd_decoder.safetensors": b"x", "README.md": b"x"}
    fetched = repository(httpserver, "owner/tiny", {**files, **pickled})
    expected = f"owner/model {COMMIT} sd False owner/tiny@{COMMIT}"
    assert inspect_model(tmp_path, endpoint, autoencoder="owner/tiny") == expected
    assert set(fetched) == set(files)
    pinned = f"owner/tiny@{COMMIT}"
    assert inspect_model(tmp_path, endpoint, autoencoder=pinned) == expected
    assert inspect_model(tmp_path, endpoint, offline="1", autoencoder=pinned) == expected


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "is not on the hub, or is private"),
        (401, "RepoNotFound", "is not on the hub, or is private"),
        (403, "GatedRepo", "is gated"),
        (404, "RevisionNotFound", "no revision v9"),
        (500, "", "the hub cannot be reached"),
    ],
)
def test_refused(httpserver, tmp_path, status, code, says):
    """Missing, private, gated, of no such revision, or a broken hub: one line each."""
    httpserver.expect_request("/api/models/owner/model/revision/v9").respond_with_data(
        "no", status=status, headers={"X-Error-Code": code}
    )
    said = inspect_model(tmp_path, httpserver.url_for("").rstrip("/"), revision="v9")
    assert said.startswith("ModelFailed ")
    assert says in said
    assert "\n" not in said


def test_not_diffusers(httpserver, tmp_path):
    """A repository without model_index.json is no model in diffusers' format."""
    info = {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": "model.safetensors"}]}
    httpserver.expect_request("/api/models/owner/model").respond_with_json(info)
    said = inspect_model(tmp_path, httpserver.url_for("").rstrip("/"))
    assert "no model_index.json" in said


@pytest.mark.slow
def test_silent_hub(tmp_path):
    """A hub that accepts connections and never answers is given up within 30 seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        begun = time.monotonic()
        said = inspect_model(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
    assert "the hub cannot be reached" in said
    assert time.monotonic() - begun < 30


def test_offline(tmp_path):
    """Without network and without a copy, one line names both and what to do."""
    begun = time.monotonic()
    said = inspect_model(tmp_path, "http://127.0.0.1:9", offline="1")
    assert "HF_HUB_OFFLINE is set and this machine has no copy of owner/model" in said
    assert "cannot be reached" in inspect_model(tmp_path, "http://127.0.0.1:9")
    assert time.monotonic() - begun < 90


def test_offline_in_this_process():
    """The tests' own process, which is offline, gets the same error."""
    with pytest.raises(ModelFailed, match="HF_HUB_OFFLINE"):
        look("owner/model")


@pytest.mark.parametrize(
    ("variant", "checker", "expected"),
    [
        (None, True, {"unet/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors"}),
        ("fp16", False, {"unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"}),
    ],
)
def test_wanted_files(variant, checker, expected):
    """One set of weights a component, its configurations and vocabulary, no checker that is not wanted."""
    files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "tokenizer/merges.txt",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "safety_checker/pytorch_model.bin",
        "another/config.json",
    ]
    index = json.loads(
        '{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"], "image_encoder": [null, null],'
        '"tokenizer": ["transformers", "CLIPTokenizer"],'
        '"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}'
    )
    options = EngineOptions(model="owner/model", variant=variant, safety_checker=checker)
    texts = {"model_index.json", "unet/config.json", "tokenizer/merges.txt"}
    texts |= {"safety_checker/config.json"} if checker else set()
    assert set(wanted_files(files, index, options)) == expected | texts
