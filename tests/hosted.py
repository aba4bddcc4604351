"""Requests, and the hosted engine that takes them to a service of the tests."""

from __future__ import annotations

from tests.servers.fal import KEY, MODEL
from text2img.engine.hosted import HostedOptions
from text2img.engine.hosted.engine import HostedEngine
from text2img.prompts import Claim, Prompt, PromptId, Request, Wishes
from text2img.prompts.parameters import settle

TEXT = "a small red circle on a blue background"
ASKED = Wishes(num_inference_steps=4, guidance_scale=2.5, width=128, height=64, seed=11)


def request(text=TEXT, name="1", **wishes):
    parameters = settle((Wishes(**wishes), ASKED), seed=0)
    prompt = Prompt(claim=Claim(PromptId("str", name), "worker", 1), text=text)
    return Request(prompt=prompt, text=text, parameters=parameters)


def engine(fal, **options):
    defaults = {
        "model": MODEL,
        "key": KEY,
        "url": fal.url,
        "patience": 2.0,
        "stall_timeout": 2.0,
        "timeout": 5.0,
    }
    return HostedEngine(HostedOptions(**{**defaults, **options}))


def generate(fal, *batch, **options):
    return engine(fal, **options).generate(batch or [request()], lambda done, of: None)
