"""The table of docs/pipelines.md: what each pipeline's call takes, and how it was tried.

``python -m tests.engine.pipeline_table`` prints it. Needs no torch.
"""

from __future__ import annotations

from text2img.engine.pipelines import CALLS, Call

TRIED = {
    "AmusedPipeline": "amused",
    "AuraFlowPipeline": "aura flow",
    "ChromaPipeline": "chroma",
    "Flux2KleinKVPipeline": "klein kv",
    "Flux2KleinPipeline": "klein",
    "FluxPipeline": "flux",
    "IFPipeline": "if",
    "LatentConsistencyModelPipeline": "lcm",
    "Lumina2Pipeline": "lumina 2",
    "OvisImagePipeline": "ovis",
    "PixArtSigmaPipeline": "pixart",
    "QwenImagePipeline": "qwen",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana sprint",
    "StableDiffusion3PAGPipeline": "sd3 pag",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPAGPipeline": "sd1 pag",
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionXLPAGPipeline": "sdxl pag",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z-image",
}
"""The pipelines that ``test_matrix`` runs, with the name of the tiny model."""


def table() -> str:
    """Return the table's rows, in Markdown."""
    head = ["pipeline", "steps", "guidance", "negative prompt", "own size", "multiple", "tried"]
    rows = [head, ["---"] * len(head), *(_row(name, call) for name, call in sorted(CALLS.items()))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, call: Call) -> list[str]:
    named = "" if call.guidance_name == "guidance_scale" else f" (`{call.guidance_name}`)"
    guidance = "–" if call.guidance is None else f"{call.guidance:g}{named}"
    above = call.negative_above
    negative = "–" if above is None else "always" if above < 0 else f"above {above:g}"
    size = "the model's" if call.size is None else f"{call.size[0]}×{call.size[1]}"
    if call.latent_side is not None:
        size = f"{call.latent_side} latent pixels"
    multiple = str(call.multiple) if call.multiple else f"{call.patch} latent pixels"
    tried = f"`{TRIED[name]}`" if name in TRIED else "by its call's signature alone"
    return [f"`{name.removesuffix('Pipeline')}`", str(call.steps), guidance, negative, size, multiple, tried]


if __name__ == "__main__":
    print(table())  # noqa: T201 - it is what the command is for
