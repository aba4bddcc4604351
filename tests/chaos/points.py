"""Points beside the six steps: LoRAs, webhooks of prompts and several workers; ``serving`` has the others."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import numpy as np
import psutil
from safetensors.numpy import save

from tests.acceptance import product
from tests.chaos import serving
from tests.chaos.counts import are_alike, look
from tests.chaos.faults import finish
from tests.chaos.gates import Catch
from tests.chaos.listener import Listener
from tests.chaos.serving import Point
from tests.chaos.sites import FileSite
from tests.chaos.triggers import holding
from tests.chaos.workers import BATCH, PER_IMAGE, Worker
from tests.waiting import until

LORA = save({
    "unet.any.lora_A.weight": np.zeros((4, 64), np.float32),
    "unet.any.lora_B.weight": np.zeros((64, 4), np.float32),
})  # fmt: skip
"""A whole file, of which the engine that sleeps makes nothing."""
_PATH = "/style.safetensors"


class Beside:
    """An HTTP server beside the job: hosts a LoRA by GET, and is a backend for webhooks by other methods.

    ``heard``: (last word of the path, webhook-id, body, answered) of each webhook. ``served``: how many
    files were sent whole.
    """

    def __init__(self):
        handler = type("Handler", (_Handler,), {"beside": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.heard, self.served, self.catch = [], 0, None

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def catching(self, word, nth=1):
        """Hold back the answer to the ``nth`` request whose path ends in this word."""
        self.catch = Catch(lambda path: path.endswith(word), reply=False, nth=nth)
        try:
            yield self.catch
        finally:
            catch, self.catch = self.catch, None
            catch.let_go(through=False)


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        catch = self.beside.catch
        caught = bool(catch and catch.takes(self.path))
        self.send_response(200)
        self.send_header("Content-Length", str(len(LORA)))
        self.end_headers()
        self.wfile.write(LORA[: len(LORA) // 2])
        if caught and not catch.hold():
            return
        self.wfile.write(LORA[len(LORA) // 2 :])
        self.beside.served += 1

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        catch, word = self.beside.catch, self.path.rsplit("/", 1)[1]
        caught = bool(catch and catch.takes(self.path))
        self.beside.heard.append((word, self.headers["webhook-id"], body, not caught))
        if caught:
            catch.hold()
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PATCH = do_POST  # noqa: N815 - the name that http.server looks for


@contextmanager
def _site(folder, servers, *flags):
    """A site in files with a listener, and a server beside it."""
    with Listener() as listener, Beside() as beside:
        site = FileSite(folder, listener)
        site.beside = beside
        site.arguments += flags
        yield site


@contextmanager
def _lora_site(folder, servers):
    with _site(folder, servers, "--lora-cache", str(folder / "loras")) as site:
        site.arguments += ["--lora-source", f"{site.beside.url}/"]
        yield site


def _with_lora(site, book, ids):
    lora = json.dumps({"path": f"{site.beside.url}{_PATH}"})
    return [{**each, "lora": lora} for each in book.prompts(ids)]


def _whole_loras(site):
    return list((site.folder / "loras").glob("*.safetensors"))


def _die_fetching(site, book, number):
    """Half of the file has come."""
    site.add(book.prompts(range(BATCH)))
    site.add(_with_lora(site, book, range(BATCH, 3 * BATCH)))
    with site.beside.catching(_PATH) as catch, Worker(site, "killed") as worker:
        worker.reaches(catch.reached.is_set)
        worker.lives_on(Random(number).uniform(0, 0.2))
        worker.kill()
        assert not _whole_loras(site)
    _finish_with_loras(site)
    return {"kills": 1}


def _die_caching(site, book, number):
    """The file has its name in the cache; its entry may not be there yet."""
    site.add(_with_lora(site, book, range(3 * BATCH)))
    with Worker(site, "killed", holds=1) as worker:
        worker.reaches(partial(_whole_loras, site))
        worker.lives_on(Random(number).uniform(0, 0.02))
        worker.kill()
    _finish_with_loras(site)
    return {"kills": 1}


def _finish_with_loras(site):
    """What a killed run left in the cache is neither used half nor kept for ever, and what was drawn says by
    which LoRA.
    """
    finish(site)
    assert [each.read_bytes() for each in _whole_loras(site)] == [LORA]
    assert not list((site.folder / "loras").glob("part-*"))
    wanted = {each["_id"] for each in site.documents("datasets") if "lora" in each}
    used = {each["_id"] for each in site.documents("datasets") if "loras" in json.loads(each["used"])}
    assert used == wanted


@contextmanager
def _switching_site(folder, servers):
    with _site(folder, servers, "--lora-source", str(servers.styles)) as site:
        site.styles = sorted(map(str, servers.styles.glob("*.safetensors")))
        site.book = servers.switched
        yield site


def add_styled(site, book):
    """Add three batches of the same captions and seeds, to be drawn in turn: with one LoRA, with another, and
    with the first one again, by other guidance.
    """
    one, other = site.styles
    for turn, (path, guidance) in enumerate([(one, 3), (other, 4), (one, 3.5)]):
        own = {"lora": json.dumps({"path": path}), "guidance_scale": guidance, "priority": -turn}
        ids = range(turn * BATCH, (turn + 1) * BATCH)
        pages = zip(ids, book.prompts(range(BATCH)), strict=True)
        site.add([{**page, **own, "_id": key} for key, page in pages])


class Drawn:
    """The images of an undisturbed run, to compare others with."""

    def __init__(self, site):
        self._pages = {each["_id"]: look(site.image(each["_id"]))[1] for each in site.documents("datasets")}

    def shows(self, prompt, png):
        """Say whether this is that prompt's image, by its pixels."""
        return are_alike(look(png)[1], self._pages[prompt["_id"]])


def _die_switching(site, book, number):
    """The demo model draws, with the second LoRA; the rest is drawn by another process."""
    add_styled(site, book)
    with Worker(site, "killed", engine=product.drawing) as worker:
        worker.reaches(lambda: site.on_device() & set(range(BATCH, 2 * BATCH)))
        worker.lives_on(Random(number).uniform(0, 10 * PER_IMAGE))
        worker.kill()
    finish(site, engine=product.drawing)
    return {"kills": 1}


@contextmanager
def _webhook_site(folder, servers):
    with _site(folder, servers, "--webhook-host", "127.0.0.1") as site:
        yield site


def _die_telling(word, site, book, number):
    """The backend has the request and has not answered."""
    with site.beside.catching(f"/{word}", nth=1 + number % BATCH) as catch:
        _webhooks(site, book, lambda worker: worker.reaches(catch.reached.is_set))
    return {"kills": 1}


def _die_before_telling(site, book, number):
    """The prompts are completed, and their notifications are not saved yet."""
    event = "BEFORE INSERT ON callbacks WHEN NEW.url LIKE '%/complete'"
    with holding(site.file, event, 1 + number % BATCH) as sight:
        _webhooks(site, book, lambda worker: worker.reaches(sight.is_set))
    return {"kills": 1}


def _webhooks(site, book, reached):
    site.add([{**each, "webhook_url": site.beside.url} for each in book.prompts(range(3 * BATCH))])
    with Worker(site, "killed") as worker:
        reached(worker)
        worker.kill()


def _finish_webhooks(attempt, site, book, number):
    """Afterwards each generation's end was told, under one id and with one body, however often."""
    figures = attempt(site, book, number)
    finish(site)
    bodies, ids = {}, defaultdict(set)
    for word, key, body, answered in site.beside.heard:
        if word != "progress":
            assert bodies.setdefault(key, body) == body
            if answered:
                ids[str(json.loads(body)["generation_id"])].add(key)
    assert {name: len(each) for name, each in ids.items()} == {str(n): 1 for n in range(3 * BATCH)}
    return figures


@contextmanager
def _workers_site(folder, servers):
    with _site(folder, servers, "--workers", "2") as site:
        yield site


def _one_of_two_dies(site, book, number):
    """One worker process: the run starts another, and ends well by itself."""
    site.add(book.prompts(range(6 * BATCH)))
    with Worker(site, "crew", holds=2) as run:
        pids = run.reaches(lambda: len(found := _processes(site)) == 2 and found)
        psutil.Process(sorted(pids)[number % 2]).kill()
        site.go()
        assert run.wait() == 0, run.text[-3000:]
    finish(site)
    return {"kills": 1}


def _the_run_of_two_dies(site, book, number):
    """The run itself: its workers end, too, and the next run finishes."""
    site.add(book.prompts(range(6 * BATCH)))
    with Worker(site, "crew", holds=2) as run:
        pids = run.reaches(lambda: len(found := _processes(site)) == 2 and found)
        workers = [psutil.Process(pid) for pid in pids]
        run.kill()
    until(lambda: not any(each.is_running() for each in workers))
    site.go()
    finish(site)
    return {"kills": 1}


def _processes(site):
    """The processes that have prompts on their devices, as their claims name them."""
    there = site.on_device()
    names = {each["claimed_by"] for each in site.documents("datasets") if each["_id"] in there}
    return {int(name.rsplit("-", 2)[1]) for name in names}


POINTS = serving.POINTS | {
    "while a LoRA is fetched, SQLite": Point(_lora_site, _die_fetching),
    "while a LoRA is cached, SQLite": Point(_lora_site, _die_caching),
    "while LoRAs are switched, SQLite": Point(_switching_site, _die_switching),
    "before a webhook is kept, SQLite": Point(_webhook_site, partial(_finish_webhooks, _die_before_telling)),
    "while a webhook's progress is sent, SQLite": Point(
        _webhook_site, partial(_finish_webhooks, partial(_die_telling, "progress"))
    ),
    "while a webhook is sent, SQLite": Point(
        _webhook_site, partial(_finish_webhooks, partial(_die_telling, "complete"))
    ),
    "one worker of two, SQLite": Point(_workers_site, _one_of_two_dies),
    "a run of two workers, SQLite": Point(_workers_site, _the_run_of_two_dies),
}
