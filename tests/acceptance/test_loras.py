"""LoRAs by prompt, from enqueue to picture: good ones, and every kind of bad one."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.waiting import until
from text2img.images import read_parameters

CAPTION = "a large red circle on a yellow background"
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--num-inference-steps", "5", "--guidance-scale", "3", "--batch-size", "4")


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """Files of LoRAs for the demo model: good, and each bad in its own way."""
    from diffusers import UNet2DConditionModel

    from tests.engine import loras

    unet = UNet2DConditionModel.from_pretrained(product.MODEL / "unet")

    class Demo:
        pass

    demo, folder = Demo(), tmp_path_factory.mktemp("styles")
    demo.unet = unet
    good = loras.tensors(loras.halves(demo, size=0.3))
    loras.save(folder, good, "good")
    loras.save(folder, loras.tensors(loras.halves(demo, size=0.3, seed=1)), "other")
    key = min(good)
    loras.save(folder, {**good, key: torch.full_like(good[key], torch.nan)}, "nan")
    partly = {"unet.no.such.lora_A.weight": torch.ones(4, 8), "unet.no.such.lora_B.weight": torch.ones(8, 4)}
    loras.save(folder, {**good, **partly}, "partly")
    loras.save(folder, {name: torch.ones(4, 2048) for name in good if "attn2.to_k" in name}, "family")
    (folder / "corrupt.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-100])
    return folder


def enqueue(folder, *prompts):
    (folder / "prompts.json").write_text(json.dumps(prompts))
    added = product.run("enqueue", *JOB[:2], "prompts.json", folder=folder)
    assert added.returncode == 0, added.stderr


def rows(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in database.execute("SELECT * FROM datasets")}


def pixels(folder, name):
    with Image.open(folder / "pictures" / f"{name}.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def prompt(name, path=None, **more):
    lora = {} if path is None else {"lora": {"path": str(path), **more}}
    return {"id": name, "text": CAPTION, "seed": 7, **lora}


def test_good_and_bad_loras_in_one_run(tmp_path, styles, httpserver):
    """Pictures with a LoRA differ from those without; each bad one is lora_failed with its reason; all others
    complete, and what was used is written down wherever it belongs, without the URL's secret.
    """
    content = (styles / "good.safetensors").read_bytes()
    httpserver.expect_request("/loras/good.safetensors").respond_with_data(content)
    httpserver.expect_request("/loras/page").respond_with_data("<html>log in</html>")
    url = httpserver.url_for("/loras/")
    bad = {
        "missing": (styles / "none.safetensors", "there is no such file"),
        "gone": (f"{url}none", "its server answers 500"),
        "page": (f"{url}page", "a web page"),
        "corrupt": (styles / "corrupt.safetensors", "it is corrupt"),
        "nan": (styles / "nan.safetensors", "not finite"),
        "partly": (styles / "partly.safetensors", "weights belong to a module of this model"),
        "family": (styles / "family.safetensors", "the LoRA cannot be used"),
        "forbidden": ("/etc/x.safetensors", "--lora-source"),
        "elsewhere": ("owner/name", "--lora-source"),
    }
    httpserver.expect_request("/loras/none").respond_with_response(Response(b"", 410))
    bad["gone"] = (f"{url}none", "its server answers 410")
    enqueue(
        tmp_path,
        prompt("plain"),
        prompt("styled", styles / "good.safetensors"),
        prompt("fetched", f"{url}good.safetensors?sig=hush"),
        prompt("weak", styles / "good.safetensors", weight=0.05),
        {**prompt("both"), "lora": [{"path": f"{styles}/{name}.safetensors"} for name in ("good", "other")]},
        prompt("again"),
        *(prompt(name, path) for name, (path, _) in bad.items()),
    )
    finished = product.run(*JOB, *QUICK, "--lora-source", f"{styles},{url}", folder=tmp_path, timeout=240)
    assert finished.returncode == 3, finished.stderr
    assert finished.stdout.startswith(f"completed 6, failed {len(bad)}, remaining 0"), finished.stderr
    done = rows(tmp_path)
    for name, (_, reason) in bad.items():
        assert (done[name]["error_code"], reason in done[name]["error"]) == ("lora_failed", True), done[name]
    plain, styled = pixels(tmp_path, "plain"), pixels(tmp_path, "styled")
    assert np.abs(plain - pixels(tmp_path, "again")).max() <= 1
    assert np.abs(plain - styled).mean() > 5
    assert np.abs(pixels(tmp_path, "fetched") - styled).max() <= 1
    assert 0 < np.abs(pixels(tmp_path, "weak") - plain).mean() < np.abs(styled - plain).mean()
    assert np.abs(pixels(tmp_path, "both") - styled).mean() > 5
    _check_records(tmp_path, done, finished, f"{url}good.safetensors")


def _check_records(folder, done, finished, url):
    assert json.loads(done["fetched"]["used"])["loras"] == [{"path": url, "weight": 1.0}]
    assert "loras" not in json.loads(done["plain"]["used"])
    read = read_parameters((folder / "pictures" / "fetched.png").read_bytes())
    assert read["loras"] == [{"path": url, "weight": 1.0}]
    assert "hush" not in finished.stdout + finished.stderr + json.dumps(read)
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        (result,) = database.execute(
            "SELECT loras FROM dataset_records WHERE dataset_id = 'fetched'"
        ).fetchone()
    assert json.loads(result) == [{"path": url, "weight": 1.0}]


def test_a_dry_run_groups_by_lora(tmp_path, styles):
    """``--dry-run`` shows batches by their LoRAs and says which are not allowed; it fetches nothing."""
    enqueue(
        tmp_path,
        prompt("a", styles / "good.safetensors"),
        prompt("b"),
        prompt("c", styles / "good.safetensors"),
        prompt("d", "https://evil.example/x?sig=hush"),
    )
    finished = product.run(*JOB, "--dry-run", "--lora-source", str(styles), folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"scheduler, LoRA {styles}/good.safetensors × 1: a, c" in finished.stdout
    assert "d would fail: this LoRA is not from a source" in finished.stdout
    assert "hush" not in finished.stdout


def test_a_source_that_is_none_is_found_before_anything_else(tmp_path):
    """A wrong --lora-source is one line and status 2."""
    finished = product.run(*JOB, "--lora-source", "http://host/x", folder=tmp_path)
    assert finished.returncode == 2
    assert "--lora-source (LORA_SOURCE): http:// is supported only" in finished.stderr


def test_doctor_knows_of_loras(tmp_path, styles):
    """``doctor`` tries the folder that keeps LoRAs where some are fetched."""
    wanted = ("--lora-source", f"{styles},https://loras.example/", "--lora-cache")
    enqueue(tmp_path, prompt("a"))
    well = product.run("doctor", *JOB, *wanted, "kept", folder=tmp_path)
    assert f"from {styles}" in well.stdout
    (tmp_path / "file").touch()
    ill = product.run("doctor", *JOB, *wanted, "file/below", folder=tmp_path)
    assert ill.returncode == 2
    assert "--lora-cache (LORA_CACHE)" in ill.stdout


def test_a_run_that_waits_for_a_lora_stops_at_once(tmp_path, httpserver):
    """SIGTERM while a LoRA's server is silent ends the run by itself; the claim is released."""
    asked, end = threading.Event(), threading.Event()

    def hang(_):
        asked.set()
        end.wait(product.HANG)
        return Response(b"", 410)

    httpserver.expect_request("/slow").respond_with_handler(hang)
    enqueue(tmp_path, prompt("a", httpserver.url_for("/slow")))
    with sleeping.running(*JOB, *QUICK, "--lora-source", httpserver.url_for("/"), folder=tmp_path) as job:
        try:
            until(asked.is_set, lambda: job.poll() is not None)
            job.send_signal(signal.SIGTERM)
            _, errors = job.communicate()
        finally:
            end.set()
    assert (job.returncode, product.GRACE_EXCEEDED in errors) == (143, False), errors
    row = rows(tmp_path)["a"]
    assert (row["status"], row["attempts"] or 0) == ("pending", 0)


def test_the_device_does_not_wait_for_a_lora(tmp_path, httpserver, styles):
    """While a LoRA is being fetched, prompts without one are drawn: they are stored before it has come."""
    content = (styles / "good.safetensors").read_bytes()

    seen: list[int] = []
    ended = threading.Event()

    def stored():
        return len(list((tmp_path / "pictures").glob("*.png")))

    def late(_):
        until(lambda: stored() >= 6, ended.is_set)
        seen.append(stored())
        return Response(content)

    httpserver.expect_request("/late.safetensors").respond_with_handler(late)
    enqueue(tmp_path, prompt("s", httpserver.url_for("/late.safetensors")), *(prompt(n) for n in range(6)))
    source = ("--lora-source", httpserver.url_for("/"))
    try:
        finished = sleeping.run(*JOB, *QUICK, *source, folder=tmp_path)
    finally:
        ended.set()
    assert finished.stdout.startswith("completed 7, failed 0"), finished.stderr
    assert seen == [6]


@pytest.mark.models
def test_a_model_configurations_lora(tmp_path, styles):
    """A model configuration's LoRA counts for prompts without one, with its own scheduler and few steps; a
    prompt's own, or none, wins. One that is not allowed ends the run before anything is claimed.
    """
    enqueue(
        tmp_path, prompt("styled"), {**prompt("plain"), "lora": []}, prompt("b", styles / "other.safetensors")
    )
    told = (
        "stable_diffusion",
        str(product.MODEL),
        json.dumps({"path": f"{styles}/good.safetensors"}),
        "lcm",
        4,
        1,
    )
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database:
        database.execute(
            "INSERT INTO model_configs (_id, model_type, model_path, lora, scheduler, num_inference_steps,"
            " guidance_scale) VALUES (1, ?, ?, ?, ?, ?, ?)",
            told,
        )
        database.commit()
    refused = product.run(*JOB[:4], folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "the model configuration's LoRA cannot be used: this LoRA is not from a source" in refused.stderr
    assert {row["status"] for row in rows(tmp_path).values()} <= {None, "pending"}
    finished = product.run(*JOB[:4], "--lora-source", str(styles), folder=tmp_path)
    assert finished.stdout.startswith("completed 3, failed 0"), finished.stderr
    used = {name: json.loads(row["used"]) for name, row in rows(tmp_path).items()}
    assert {
        (one["scheduler"], one["num_inference_steps"], one["guidance_scale"]) for one in used.values()
    } == {("lcm", 4, 1.0)}
    named = {name: [lora["path"] for lora in one.get("loras", ())] for name, one in used.items()}
    paths = [f"{styles}/good.safetensors"], [], [f"{styles}/other.safetensors"]
    assert named == dict(zip(("styled", "plain", "b"), paths, strict=True))
    assert np.abs(pixels(tmp_path, "plain") - pixels(tmp_path, "styled")).mean() > 5
