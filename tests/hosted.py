"""Requests, and the hosted engine that takes them to a service of the tests."""

from __future__ import annotations

import threading

from tests.servers.fal import KEY, MODEL
from text2img.engine.hosted import HostedOptions
from text2img.engine.hosted.engine import HostedEngine
from text2img.prompts import Claim, Prompt, PromptId, Request, RequestedParameters
from text2img.prompts.parameters import resolve_parameters

TEXT = "a small red circle on a blue background"
ASKED = RequestedParameters(num_inference_steps=4, guidance_scale=2.5, width=128, height=64, seed=11)


def request(text=TEXT, name="1", **requested):
    parameters = resolve_parameters((RequestedParameters(**requested), ASKED), seed=0)
    prompt = Prompt(claim=Claim(PromptId("str", name), "worker", 1), text=text)
    return Request(prompt=prompt, text=text, parameters=parameters)


class Clock(threading.local):
    """A clock that waiting moves on at once; ``pauses`` are the seconds that were waited.

    Each request is fetched in a thread of its own, and has a time of its own.
    """

    def __init__(self, pauses):
        self.now, self.pauses = 0.0, pauses

    def read(self):
        return self.now

    def wait(self, gone, seconds):
        self.now += seconds
        if seconds:
            self.pauses.append(seconds)
        return gone.is_set()


def engine(fal, clock=None, **options):
    """The engine, which waits for nothing but the service's answers, and they may take a minute each."""
    defaults = {
        "model": MODEL,
        "key": KEY,
        "url": fal.url,
        "retry_timeout": 2.0,
        "stall_timeout": 2.0,
        "timeout": 60.0,
    }
    clock = clock or Clock([])
    return HostedEngine(HostedOptions(**{**defaults, **options}), clock=clock.read, wait=clock.wait)


def waiting_engine(fal, **options):
    """The engine as the product has it, with a real clock."""
    return HostedEngine(HostedOptions(**{"model": MODEL, "key": KEY, "url": fal.url, **options}))


def generate(fal, *batch, **options):
    return engine(fal, **options).generate(batch or [request()], lambda done, of: None)
