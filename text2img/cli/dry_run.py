"""``run --dry-run``: what a run would do, batch by batch. Writes nothing and loads no model."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from text2img.errors import DatabaseMissing, PromptFailed
from text2img.prompts import Claim, Prompt, Wishes, request
from text2img.prompts.batching import Batcher, FixedSize
from text2img.settings import DEFAULT_MODEL, DEFAULTS
from text2img.worker import build

if TYPE_CHECKING:
    from text2img.databases import NewPrompt
    from text2img.intake import Prompts
    from text2img.prompts import ModelConfiguration, Request
    from text2img.settings import Settings

_SHOWN = 1_000
_OWN_SIZE = Wishes(width=2040, height=2040)
"""A stand-in: which size it is, only the model knows. On so large a one no signature is too long, and no
aspect ratio of it is too large. Nobody asks for this very size."""


def show(settings: Settings, new: Prompts | None) -> int:
    """Print it; the exit status. ``new`` prompts of a file are planned as if none of them were there yet."""
    waiting, prompts, configuration = _found(settings, may_be_missing=bool(new))
    if new:
        waiting += _add(new, prompts)
        print(
            f"{len(new)} prompts of {settings.input_file} would be added, or made again, where they are new"
        )
    configured = configuration.wishes if configuration else Wishes()
    model = settings.model_id or (configuration and configuration.model_path) or DEFAULT_MODEL
    own = Wishes()
    hosted = build.hosted(settings, configuration) if settings.hosted_model else None
    if hosted:  # of which all that can be known is known without asking
        card = hosted.inspect()
        model, own = card.name, card.wishes
    total = min(waiting, settings.limit or waiting)
    prompts = prompts[: min(total, _SHOWN)]
    print(f"{total} prompts would be made by {model} → {settings.output_url}")
    batcher, encoder = Batcher(FixedSize(settings.batches.most)), build.encoder(settings)
    hosts, loras, loop = build.webhook_hosts(settings), build.loras(settings), settings.loop
    for prompt in prompts:
        try:
            if prompt.webhook_url is not None:
                hosts.check(prompt.webhook_url)
            asked = request(prompt, (settings.wishes, configured, own, DEFAULTS, _OWN_SIZE))
            asked = loop.next(asked) if loop else asked
            encoder.check(asked.parameters)
            if hosted:
                hosted.prepare(asked)
            for lora in asked.parameters.loras:
                loras.check(lora)
            batcher.add(asked.each())
        except PromptFailed as exc:
            print(f"  {prompt.id} would fail: {exc} ({exc.code})")
    _print_batches(batcher)
    if total > len(prompts):
        print(f"  … and {total - len(prompts)} more")
    return 0


def _found(
    settings: Settings, *, may_be_missing: bool
) -> tuple[int, list[Prompt], ModelConfiguration | None]:
    """How many prompts wait, the first of them, and the model configuration."""
    try:
        with closing(build.database(settings, create=False)) as database:
            waiting = database.pending(build.selection(settings))
            prompts = database.peek(min(settings.limit or _SHOWN, _SHOWN), build.selection(settings))
            return waiting, prompts, database.model_configuration(settings.model_config_id)
    except DatabaseMissing:
        if may_be_missing:
            return 0, [], None
        raise


def _add(new: Prompts, prompts: list[Prompt]) -> int:
    """Add the first of the new ones to those that wait already; how many all of them are."""
    there = {prompt.id for prompt in prompts}
    added = 0
    for each in new:
        if each.id not in there:
            added += 1
            if len(prompts) < _SHOWN:
                prompts.append(_prompt(each))
    return added


def _prompt(new: NewPrompt) -> Prompt:
    """The prompt as it would be claimed."""
    claim = Claim(new.id, "", 0)
    return Prompt(claim=claim, text=new.text, wishes=new.wishes, webhook_url=new.webhook_url)


def _print_batches(batcher: Batcher) -> None:
    number = 0
    while batch := batcher.take():
        number += 1
        ids = ", ".join(_picture(request) for request in batch)
        print(f"  batch {number}: {len(batch)} × {_described(batch[0])}: {ids}")


def _picture(request: Request) -> str:
    """The prompt's id, and which picture of it, where it has several."""
    several = request.pictures > 1
    return f"{request.prompt.id} (picture {request.number + 1})" if several else str(request.prompt.id)


def _described(request: Request) -> str:
    wanted = request.parameters
    own = (wanted.width, wanted.height) == (_OWN_SIZE.width, _OWN_SIZE.height)
    size = "the model's own size" if own else f"{wanted.width}×{wanted.height}"
    size = f"{wanted.aspect_ratio} of the model's own size" if wanted.aspect_ratio else size
    scheduler = wanted.scheduler or "the model's own scheduler"
    loras = "".join(f", LoRA {lora.shown} × {lora.weight:g}" for lora in wanted.loras)
    steps = f"{wanted.num_inference_steps} steps, guidance {wanted.guidance_scale:g}"
    return f"{size}, {steps}, {scheduler}{loras}"
