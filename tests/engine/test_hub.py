"""Models by hub id, against a small hub of our own on loopback; each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys

import pytest
from werkzeug import Response

from tests.engine.conftest import look
from tests.servers.models import MODEL
from text2img.engine import EngineOptions
from text2img.engine.loading import wanted_files
from text2img.errors import ModelFailed

COMMIT = "c0ffee" * 6 + "c0ff"
CODE = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from text2img.engine.diffusers import DiffusersEngine
from text2img.engine import EngineOptions
from text2img.errors import Text2ImgError
for options in eval(sys.argv[1]):
    try:
        engine = DiffusersEngine(EngineOptions(**{'model': 'owner/model', 'device': 'cpu', **options}))
        card = engine.inspect()
        loaded = 'torch' in sys.modules
        print(card.name, card.revision, card.family, loaded, *card.approximations.values())
    except Text2ImgError as exc:
        print(type(exc).__name__, exc)
"""
SILENT = """
from text2img.engine.loading import find
from text2img.engine import EngineOptions
from text2img.errors import ModelFailed
try:
    find(EngineOptions(model='owner/model'), timeout=0.2)
except ModelFailed as exc:
    print(exc)
"""


def inspect_models(tmp_path, endpoint, *options, offline="0"):
    """What a fresh process says of owner/model with each of the options, one after the other."""
    said = run(tmp_path, endpoint, CODE, repr(options), HF_HUB_OFFLINE=offline)
    assert len(said) == len(options)
    return said


def run(tmp_path, endpoint, *command, **variables):
    """The lines that a fresh process prints, which has an empty hub's cache of its own."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", *command], env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def tiny_autoencoder():
    """The files of one that fits the demo model, as far as an inspection looks at it."""
    own = json.loads((MODEL / "vae" / "config.json").read_text())
    config = {
        "_class_name": "AutoencoderTiny",
        "latent_channels": own["latent_channels"],
        "decoder_block_out_channels": [8] * len(own["block_out_channels"]),
    }
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(8)
    return {"config.json": json.dumps(config).encode(), "diffusion_pytorch_model.safetensors": weights}


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


def test_fetched_once_and_found_again(httpserver, tmp_path):
    """Only what is read of a model and an autoencoder is fetched, without torch; the second run, one that is
    offline and one whose hub is away need no more; recorded with their commits, and what there is no copy of
    is named with what to do.
    """
    endpoint = httpserver.url_for("").rstrip("/")
    files = {str(path.relative_to(MODEL)): path.read_bytes() for path in MODEL.rglob("*") if path.is_file()}
    files |= {"model.ckpt": b"x", "unet/diffusion_pytorch_model.bin": b"x", "README.md": b"x"}
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = b"x"
    fetched = repository(httpserver, "owner/model", files)
    tiny = tiny_autoencoder()
    pickled = {"diffusion_pytorch_model.bin": b"x", "taesd_decoder.safetensors": b"x", "README.md": b"x"}
    fetched_tiny = repository(httpserver, "owner/tiny", {**tiny, **pickled})
    plain, named = {}, {"autoencoder": "owner/tiny"}
    pinned, unknown = {"autoencoder": f"owner/tiny@{COMMIT}"}, {"model": "owner/unknown"}
    model = f"owner/model {COMMIT} sd False"
    both = f"{model} owner/tiny@{COMMIT}"

    assert inspect_models(tmp_path, endpoint, plain) == [model]
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert not [name for name in fetched if name.endswith((".bin", ".ckpt", ".md", "fp16.safetensors"))]
    del fetched[:]
    assert inspect_models(tmp_path, endpoint, plain, named, pinned) == [model, both, both]
    assert fetched == []
    assert set(fetched_tiny) == set(tiny)

    offline = inspect_models(tmp_path, "http://127.0.0.1:9", plain, pinned, unknown, offline="1")
    assert offline[:2] == [model, both]
    assert "HF_HUB_OFFLINE is set and this machine has no copy of owner/unknown" in offline[2]
    away = inspect_models(tmp_path, "http://127.0.0.1:9", plain, unknown)
    assert away[0] == model
    assert "cannot be reached" in away[1]


ONE_FILE = """
import sys
from text2img.engine import EngineOptions
from text2img.engine.loading import find
from text2img.engine.single_file import read_single_file
from text2img.errors import Text2ImgError
for options in eval(sys.argv[1]):
    try:
        folder, record = read_single_file(EngineOptions(**options), find)
        print(folder.components['unet'].file, folder.revision, *record.values())
    except Text2ImgError as exc:
        print(type(exc).__name__, exc)
"""


def test_one_file_of_a_repository(httpserver, tmp_path):
    """A file in a folder of a repository, with a base of another: the base's weights that the file holds are
    not fetched, the file's commit is recorded, the copy is found offline, and one that is not there is named.
    """
    endpoint = httpserver.url_for("").rstrip("/")
    weights = "unet/diffusion_pytorch_model.safetensors"
    whole = {str(path.relative_to(MODEL)): path.read_bytes() for path in MODEL.rglob("*") if path.is_file()}
    lent = repository(httpserver, "owner/base", whole)
    taken = repository(httpserver, "owner/files", {"a/b.safetensors": whole[weights], "c.safetensors": b"x"})
    name = "owner/files/a/b.safetensors"
    there = {"model": name, "base": "owner/base"}
    asked = [there, {"model": "owner/files/b.safetensors", "base": "owner/base"}, {"model": name}]
    found, missing, bare = run(tmp_path, endpoint, ONE_FILE, repr(asked))
    path, *recorded = found.split()
    assert path.endswith(f"{COMMIT}/a/b.safetensors")
    assert recorded == [COMMIT, f"owner/base@{COMMIT}"]
    assert "ConfigurationError owner/files has no file b.safetensors on the hub" in missing
    assert "give a whole model folder of its kind with --model-base" in bare
    assert taken == ["a/b.safetensors"]
    assert weights not in lent
    assert "unet/config.json" in lent
    offline = run(tmp_path, "http://127.0.0.1:9", ONE_FILE, repr([there]), HF_HUB_OFFLINE="1")
    assert offline == [found]


REFUSALS = {
    "owner/missing": (404, "RepoNotFound", "is not on the hub, or is private"),
    "owner/private": (401, "RepoNotFound", "is not on the hub, or is private"),
    "owner/gated": (403, "GatedRepo", "is gated"),
    "owner/older": (404, "RevisionNotFound", "no revision v9"),
    "owner/broken": (500, "", "the hub cannot be reached"),
}


def test_refused(httpserver, tmp_path):
    """Missing, private, gated, no such revision, a broken hub, not in diffusers' format: one line each."""
    for name, (status, code, _) in REFUSALS.items():
        httpserver.expect_request(f"/api/models/{name}/revision/v9").respond_with_data(
            "no", status=status, headers={"X-Error-Code": code}
        )
    info = {"id": "owner/bare", "sha": COMMIT, "siblings": [{"rfilename": "model.safetensors"}]}
    httpserver.expect_request("/api/models/owner/bare/revision/v9").respond_with_json(info)
    asked = [{"model": name, "revision": "v9"} for name in (*REFUSALS, "owner/bare")]
    *refused, bare = inspect_models(tmp_path, httpserver.url_for("").rstrip("/"), *asked)
    for line, (name, (_, _, says)) in zip(refused, REFUSALS.items(), strict=True):
        assert line.startswith("ModelFailed "), name
        assert says in line, name
    assert "owner/bare is not in diffusers' format: it has no model_index.json" in bare


def test_silent_hub(tmp_path):
    """A hub that accepts connections and never answers is given up, after three requests or fewer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        (said,) = run(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}", SILENT)
        server.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                server.accept()[0].close()
                asked += 1
    assert "the hub cannot be reached" in said
    assert 1 <= asked <= 3


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
