"""The pipelines of diffusers that draw from a text alone: what calls take and return, and their defaults.

Mostly data, read from the sources of diffusers 0.42.1; ``tests/engine/test_pipelines.py`` compares it with
the installed version. Only a pipeline that is in no table is looked up in diffusers, which imports torch.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from text2img.errors import ErrorCode, ModelUnusable, PromptFailed
from text2img.prompts.parameters import RequestedParameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from text2img.prompts import Parameters, Request

    Configs = Mapping[str, Mapping[str, Any]]
    """The configurations of a model's components, by name."""

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a pipeline's call takes.

    ``steps`` and ``guidance`` are the call's own defaults. ``guidance_name`` is the argument that takes the
    guidance, at least ``least_guidance``; without ``guidance`` the call takes none. A negative prompt takes
    effect with a guidance above ``negative_above``; None: the call takes none. With ``true_cfg`` the call has
    a second guidance beside the first, ``true_cfg_scale``, above 1 of which it takes effect as well.
    ``blank`` is passed in place of an empty one. With ``blank_apart`` the call treats a negative prompt that
    is left out otherwise than an empty one: requests with and without one need calls of their own.

    The own size is ``size`` in pixels, or ``latent_side`` in latent pixels, or the denoiser's
    ``sample_size``. A side is a multiple of ``multiple`` pixels or, where that is 0, of ``patch`` latent
    pixels. ``sizes`` are all sizes that the pipeline draws; with ``fixed_area`` it draws only sizes of about
    as many pixels as its own.

    ``one_by_one``: the call takes a single prompt. ``arguments`` are passed in every call. The argument
    ``only_default_steps`` suits the default number of steps only. ``packages`` are Python packages that the
    pipeline needs.
    """

    steps: int
    guidance: float | None
    guidance_name: str = "guidance_scale"
    least_guidance: float = 0.0
    true_cfg: bool = False
    negative_above: float | None = 1.0
    blank: str = ""
    blank_apart: bool = False
    size: Size | None = None
    latent_side: int | None = None
    multiple: int = 0
    patch: int = 2
    sizes: tuple[Size, ...] = ()
    fixed_area: bool = False
    one_by_one: bool = False
    arguments: Mapping[str, object] = field(default_factory=dict)
    only_default_steps: str = ""
    packages: tuple[str, ...] = ()

    def is_guided(self, parameters: Parameters) -> bool:
        """Return True if the call runs the model with the negative prompt, or an empty one, as well."""
        if self.true_cfg and (parameters.true_cfg_scale or 0.0) > 1:
            return True
        return self.negative_above is not None and (parameters.guidance_scale or 0.0) > self.negative_above

    def passed(self, part: Sequence[Request], output_type: str) -> dict[str, Any]:
        """Return what is passed for the part beside its texts: what is recorded, and fixed arguments.

        Every request has a generator of its own, on the CPU.
        """
        import torch

        parameters = part[0].parameters
        generators = [torch.Generator("cpu").manual_seed(request.parameters.seed) for request in part]
        arguments = {
            "width": parameters.width,
            "height": parameters.height,
            "num_inference_steps": parameters.num_inference_steps,
            "generator": generators[0] if self.one_by_one else generators,
            "output_type": output_type,
            **self.arguments,
        }
        if parameters.guidance_scale is not None:
            arguments[self.guidance_name] = parameters.guidance_scale
        if parameters.true_cfg_scale is not None:
            arguments["true_cfg_scale"] = parameters.true_cfg_scale
        if self.only_default_steps and parameters.num_inference_steps != self.steps:
            arguments[self.only_default_steps] = None
        return arguments

    def texts(self, part: Sequence[Request]) -> dict[str, Any]:
        """Return the arguments that pass the part's texts."""
        negatives = [request.parameters.negative_prompt for request in part]
        arguments: dict[str, list[str]] = {"prompt": [request.text for request in part]}
        if self.is_guided(part[0].parameters) and (any(negatives) or not self.blank_apart):
            arguments["negative_prompt"] = [text or self.blank for text in negatives]
        return {name: texts[0] if self.one_by_one else texts for name, texts in arguments.items()}

    def groups(self, part: Sequence[Request]) -> list[list[int]]:
        """Return the indices of the part's requests, in groups that may share a call."""
        if self.one_by_one:
            return [[index] for index in range(len(part))]
        if not self.blank_apart:
            return [list(range(len(part)))]
        groups: dict[bool, list[int]] = {}
        for index, request in enumerate(part):
            groups.setdefault(bool(request.parameters.negative_prompt), []).append(index)
        return list(groups.values())


class DecodedImages(NamedTuple):
    """Images that their pipeline decoded itself, and whether its safety checker flagged each.

    An image is (height, width, 3), in [0, 1].
    """

    images: Sequence[NDArray[Any]]
    flagged: Sequence[bool]

    @classmethod
    def of(cls, output: Any, count: int) -> DecodedImages:
        """Return the first ``count`` images of a pipeline's output."""
        names = ("nsfw_content_detected", "nsfw_detected")
        flags = next((found for name in names if (found := getattr(output, name, None))), [False] * count)
        return cls(list(output.images)[:count], [bool(flag) for flag in flags][:count])

    def pixels(self, size: Size) -> list[NDArray[np.uint8] | PromptFailed]:
        """Return the pixels of each image, or what is wrong with it; ``size`` is the requested one."""
        return [_checked_pixels(*image, size) for image in zip(*self, strict=True)]


def _checked_pixels(
    image: NDArray[Any],
    flagged: bool,  # noqa: FBT001 - one of DecodedImages
    size: Size,
) -> NDArray[np.uint8] | PromptFailed:
    """Return the pixels of an image that its pipeline decoded, rounded as in diffusers, or what is wrong."""
    import numpy as np

    height, width = image.shape[:2]
    if (width, height) != size:
        return PromptFailed(
            ErrorCode.INVALID_PARAMETERS,
            f"width and height are {size[0]}×{size[1]}, and this model draws {width}×{height}; use that",
        )
    if flagged:
        return PromptFailed(ErrorCode.SAFETY, "the model's safety checker flagged the image")
    if not np.isfinite(image).all():
        return PromptFailed(
            ErrorCode.NOT_FINITE, "the image is not finite; another dtype (bf16, fp32) may help"
        )
    return (image.astype(np.float32) * 255).round().astype(np.uint8)


_NO_BINNING: Final = {"use_resolution_binning": False}
"""Without it these pipelines draw at the nearest of some fixed sizes, and then scale the image."""
_KANDINSKY_5: Final = (
    *((1024, 1024), (640, 1408), (1408, 640), (768, 1280)),
    *((1280, 768), (896, 1152), (1152, 896)),
)
_SD: Final = Call(steps=50, guidance=7.5, patch=1)
_SDXL: Final = Call(steps=50, guidance=5.0, patch=1)
_XL_PAG: Final = Call(steps=50, guidance=5.0, patch=1, blank_apart=True)
_SD3: Final = Call(steps=28, guidance=7.0)
_PIXART: Final = Call(steps=20, guidance=4.5, arguments=_NO_BINNING)
_SANA: Final = Call(steps=20, guidance=4.5, multiple=32, arguments=_NO_BINNING)
_HUNYUAN_DIT: Final = Call(steps=50, guidance=5.0, multiple=16, arguments=_NO_BINNING)
_KANDINSKY: Final = Call(steps=100, guidance=4.0, size=(512, 512), multiple=64)
_CASCADE: Final = Call(
    steps=12, guidance=4.0, guidance_name="prior_guidance_scale", size=(512, 512), multiple=128
)
_Z_IMAGE: Final = Call(steps=50, guidance=5.0, negative_above=0.0, size=(1024, 1024))

CALLS: Final[dict[str, Call]] = {
    "AmusedPipeline": Call(steps=12, guidance=10.0, multiple=16, one_by_one=True),
    "AuraFlowPipeline": Call(steps=50, guidance=3.5, size=(1024, 1024)),
    "BriaFibo2Pipeline": Call(steps=30, guidance=5.0, latent_side=128, blank_apart=True),
    "BriaFiboPipeline": Call(steps=30, guidance=5.0, size=(1024, 1024), multiple=16),
    "BriaPipeline": Call(steps=30, guidance=5.0, size=(1024, 1024), patch=4),
    "ChromaPipeline": Call(steps=35, guidance=5.0, latent_side=128),
    "CogView3PlusPipeline": Call(steps=50, guidance=5.0),
    "CogView4Pipeline": Call(steps=50, guidance=5.0),
    "Cosmos2TextToImagePipeline": Call(
        steps=35,
        guidance=7.0,
        size=(1360, 768),
        multiple=16,
        blank_apart=True,
        packages=("cosmos_guardrail",),
    ),
    "DreamLiteMobilePipeline": Call(
        steps=4, guidance=None, negative_above=None, latent_side=128, one_by_one=True
    ),
    "DreamLitePipeline": Call(steps=30, guidance=3.5, negative_above=-1.0, latent_side=128, one_by_one=True),
    "ErnieImagePipeline": Call(steps=50, guidance=4.0, size=(1024, 1024)),
    "Flux2KleinKVPipeline": Call(steps=4, guidance=None, negative_above=None, latent_side=128),
    "Flux2KleinPipeline": Call(steps=50, guidance=4.0, negative_above=None, latent_side=128),
    "Flux2Pipeline": Call(steps=50, guidance=4.0, negative_above=None, latent_side=128),
    "FluxPipeline": Call(steps=28, guidance=3.5, true_cfg=True, negative_above=None, latent_side=128),
    "GlmImagePipeline": Call(
        steps=50, guidance=1.5, negative_above=None, latent_side=128, patch=4, one_by_one=True
    ),
    "HiDreamImagePipeline": Call(steps=50, guidance=5.0, latent_side=128, fixed_area=True),
    "HunyuanDiTPAGPipeline": _HUNYUAN_DIT,
    "HunyuanDiTPipeline": _HUNYUAN_DIT,
    "HunyuanImagePipeline": Call(
        steps=50, guidance=3.25, guidance_name="distilled_guidance_scale", negative_above=None, latent_side=64
    ),
    "IFPipeline": Call(steps=100, guidance=7.0, multiple=8),
    "Ideogram4Pipeline": Call(
        steps=48,
        guidance=7.0,
        negative_above=None,
        size=(2048, 2048),
        arguments={"guidance_schedule": None},
    ),
    "Kandinsky3Pipeline": Call(steps=25, guidance=3.0, size=(1024, 1024), multiple=64),
    "Kandinsky5T2IPipeline": Call(
        steps=50, guidance=3.5, size=(1024, 1024), multiple=128, sizes=_KANDINSKY_5
    ),
    "KandinskyCombinedPipeline": _KANDINSKY,
    "KandinskyV22CombinedPipeline": _KANDINSKY,
    "KolorsPAGPipeline": _XL_PAG,
    "KolorsPipeline": _XL_PAG,
    "Krea2Pipeline": Call(steps=28, guidance=4.5, negative_above=0.0, size=(1024, 1024)),
    "LDMTextToImagePipeline": Call(steps=50, guidance=1.0, negative_above=None, patch=1),
    "LatentConsistencyModelPipeline": Call(steps=4, guidance=8.5, negative_above=None, patch=1),
    "LongCatImagePipeline": Call(steps=50, guidance=4.5, latent_side=128),
    "Lumina2Pipeline": Call(steps=30, guidance=4.0, multiple=16),
    "LuminaPipeline": Call(steps=30, guidance=4.0, multiple=16),
    "NucleusMoEImagePipeline": Call(steps=50, guidance=4.0, latent_side=128),
    "OmniGenPipeline": Call(
        steps=50, guidance=2.5, negative_above=None, latent_side=128, packages=("torchvision",)
    ),
    "OvisImagePipeline": Call(steps=50, guidance=5.0, latent_side=128),
    "PRXPipeline": Call(steps=28, guidance=4.0, least_guidance=1.0, arguments=_NO_BINNING),
    "PRXPixelPipeline": Call(steps=28, guidance=4.0, least_guidance=1.0, arguments=_NO_BINNING),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPAGPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "QwenImage21Pipeline": Call(
        steps=40, guidance=1.0, guidance_name="true_cfg_scale", blank=" ", size=(1024, 1024), multiple=32
    ),
    "QwenImagePipeline": Call(
        steps=50, guidance=4.0, guidance_name="true_cfg_scale", blank=" ", latent_side=128
    ),
    "SanaPAGPipeline": _SANA,
    "SanaPipeline": _SANA,
    "SanaSprintPipeline": Call(
        steps=2,
        guidance=4.5,
        negative_above=None,
        multiple=32,
        arguments=_NO_BINNING,
        only_default_steps="intermediate_timesteps",
    ),
    "StableCascadeCombinedPipeline": _CASCADE,
    "StableDiffusion3PAGPipeline": _SD3,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusionPAGPipeline": _SD,
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPAGPipeline": _XL_PAG,
    "StableDiffusionXLPipeline": _SDXL,
    "WuerstchenCombinedPipeline": _CASCADE,
    "ZImageOmniPipeline": _Z_IMAGE,
    "ZImagePipeline": _Z_IMAGE,
}
"""The pipelines that are run, by class."""

_WANT_AN_IMAGE: Final = "needs an image beside the text"
_MAKE_VIDEO: Final = "makes videos, not images"
_NO_SIZE: Final = "takes no width and height"
DENIED: Final = {
    "AnimateDiffPAGPipeline": _MAKE_VIDEO,
    "FluxKontextPipeline": _WANT_AN_IMAGE,
    "HeliosPipeline": _MAKE_VIDEO,
    "HeliosPyramidPipeline": _MAKE_VIDEO,
    "HunyuanImageRefinerPipeline": _WANT_AN_IMAGE,
    "MusicLDMPipeline": "makes sound, not images",
    "QwenImageLayeredPipeline": _WANT_AN_IMAGE,
    "StableDiffusionLDM3DPipeline": "makes images with depth maps, of which only the images could be kept",
    "UnCLIPPipeline": _NO_SIZE,
    "UniDiffuserPipeline": "makes texts and images in one",
    "VQDiffusionPipeline": _NO_SIZE,
}
"""Pipelines that take a prompt and are not run, with what is wrong with them."""
_MARKS: Final = {
    "Control": "needs a control image beside the text",
    "Pix2Pix": _WANT_AN_IMAGE,
    "Inpaint": _WANT_AN_IMAGE,
    "Img2Img": _WANT_AN_IMAGE,
    "Image2Image": _WANT_AN_IMAGE,
    "ImageToImage": _WANT_AN_IMAGE,
    "Upscale": _WANT_AN_IMAGE,
    "Edit": _WANT_AN_IMAGE,
    "Adapter": "needs an image beside the text",
    "GLIGEN": "needs boxes beside the text",
    "Video": _MAKE_VIDEO,
    "Audio": "makes sound, not images",
    "Modular": "is a modular pipeline, which text2img does not run",
}
"""Parts of class names, with what such a pipeline wants or makes."""
_REQUIRED: Final = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")
_IMAGES: Final = ("image", "control_image")


def call_of(pipeline: str) -> Call:
    """Return what the call of a pipeline class takes; raise ModelUnusable if the class is not run."""
    if pipeline in CALLS:
        return CALLS[pipeline]
    reason = DENIED.get(pipeline) or next((why for mark, why in _MARKS.items() if mark in pipeline), None)
    if reason is None:
        return _introspected(pipeline)
    raise ModelUnusable(f"{pipeline} {reason}; use a text-to-image model")


def _introspected(pipeline: str) -> Call:
    """Return what the call of a class that is in no table takes, from its signature; see ``call_of``."""
    from text2img.engine.devices import silence_libraries, suppress_warnings

    with suppress_warnings():
        silence_libraries()
        import diffusers

        try:
            found = getattr(diffusers, pipeline, None)
        except (ImportError, RuntimeError):  # a library that this class needs is not installed
            found = None
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ModelUnusable(
            f"the installed diffusers {diffusers.__version__} has no pipeline {pipeline}, or lacks a library"
            " for it: install a newer version, or use another model"
        )
    parameters = inspect.signature(found.__call__).parameters
    if any(name in parameters for name in _IMAGES):
        raise ModelUnusable(f"{pipeline} {_WANT_AN_IMAGE}; use a text-to-image model")
    if missing := [name for name in _REQUIRED if name not in parameters]:
        raise ModelUnusable(f"{pipeline} takes no {missing[0]}; use a text-to-image model")
    if not _returns_images(found):
        raise ModelUnusable(f"{pipeline} does not return images; use a text-to-image model")
    return _call_from(parameters)


def _call_from(parameters: Mapping[str, inspect.Parameter]) -> Call:
    def number(name: str) -> float | None:
        value = parameters[name].default if name in parameters else None
        return float(value) if isinstance(value, int | float) else None

    name = "guidance_scale" if number("guidance_scale") is not None else "true_cfg_scale"
    sides = number("width"), number("height")
    binning = _NO_BINNING if "use_resolution_binning" in parameters else {}
    return Call(
        steps=int(number("num_inference_steps") or 50),
        guidance=number(name),
        guidance_name=name,
        negative_above=1.0 if "negative_prompt" in parameters else None,
        blank=" " if name == "true_cfg_scale" else "",
        size=(int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None,
        arguments=binning,
    )


def _returns_images(pipeline: type) -> bool:
    """Return True if the pipeline's annotated output, or the only one that its module names, has images."""
    annotated = inspect.signature(pipeline.__call__).return_annotation
    module = sys.modules[pipeline.__module__]
    named = [value for name, value in vars(module).items() if name.endswith("Output")]
    unknown = annotated is inspect.Signature.empty or isinstance(annotated, str)
    outputs = named if unknown else get_args(annotated) or [annotated]
    return any("images" in getattr(output, "__annotations__", {}) for output in outputs)


def guidance_works(pipeline: str, configs: Configs, flags: Mapping[str, Any]) -> bool:
    """Return True if the call's guidance changes the image; ``flags`` are those of model_index.json."""
    if CALLS.get(pipeline, _SD).guidance is None:
        return False
    if pipeline in {"FluxPipeline", "HunyuanImagePipeline"}:
        return bool(configs.get("transformer", {}).get("guidance_embeds"))
    if pipeline == "Flux2KleinPipeline":
        return not flags.get("is_distilled")
    if pipeline == "LatentConsistencyModelPipeline":
        return _embeds_guidance(configs)
    return True


def negative_above(pipeline: str, call: Call, configs: Configs) -> float | None:
    """Return the guidance above which a negative prompt takes effect; None if it never does."""
    if pipeline == "HunyuanImagePipeline" and "guider" in configs:
        return -1.0  # its guider guides, whatever the call's guidance
    return None if _embeds_guidance(configs) else call.negative_above


def _embeds_guidance(configs: Configs) -> bool:
    """Return True if the UNet takes the guidance as an input, as UNets distilled for few steps do."""
    return configs.get("unet", {}).get("time_cond_proj_dim") is not None


def _defaults(
    steps: int | None = None, guidance: float | None = None, size: Size | None = None
) -> RequestedParameters:
    width, height = size or (None, None)
    return RequestedParameters(num_inference_steps=steps, guidance_scale=guidance, width=width, height=height)


PUBLISHED: Final = {
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": _defaults(2, 4.5),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": _defaults(2, 4.5),
    "HiDream-ai/HiDream-I1-Dev": _defaults(28, 0.0),
    "HiDream-ai/HiDream-I1-Fast": _defaults(16, 0.0),
    "HiDream-ai/HiDream-I1-Full": _defaults(50, 5.0),
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": _defaults(4, 0.0),
    "Qwen/Qwen-Image": _defaults(50, 4.0),
    "Qwen/Qwen-Image-2.1": _defaults(40, 1.0),
    "Qwen/Qwen-Image-2512": _defaults(50, 4.0),
    "SimianLuo/LCM_Dreamshaper_v7": _defaults(4, 8.0),
    "Tongyi-MAI/Z-Image-Turbo": _defaults(8, 0.0),
    "black-forest-labs/FLUX.1-Krea-dev": _defaults(28, 4.5),
    "black-forest-labs/FLUX.1-dev": _defaults(28, 3.5),
    "black-forest-labs/FLUX.1-schnell": _defaults(4),
    "black-forest-labs/FLUX.2-klein-4B": _defaults(4),
    "black-forest-labs/FLUX.2-klein-9B": _defaults(4),
    "black-forest-labs/FLUX.2-klein-base-4B": _defaults(50, 4.0),
    "black-forest-labs/FLUX.2-klein-base-9B": _defaults(50, 4.0),
    "playgroundai/playground-v2.5-1024px-aesthetic": _defaults(50, 3.0),
    "stabilityai/sd-turbo": _defaults(1, 0.0),
    "stabilityai/sdxl-turbo": _defaults(1, 0.0, (512, 512)),
    "stabilityai/stable-cascade": _defaults(10, 4.0, (1024, 1024)),
    "stabilityai/stable-diffusion-3.5-large": _defaults(28, 3.5),
    "stabilityai/stable-diffusion-3.5-large-turbo": _defaults(4, 0.0),
    "stabilityai/stable-diffusion-3.5-medium": _defaults(40, 4.5),
    "warp-ai/wuerstchen": _defaults(12, 4.0, (1024, 1024)),
}
"""Steps, guidance and size that models' own cards give, by hub id, where the pipeline's call has others."""
_FEW_STEPS: Final = {"LCMScheduler": 1.0, "TCDScheduler": 0.0}
"""Guidance of models whose own scheduler is one of those that distilled models come with."""


def defaults_of(
    names: tuple[str, ...], pipeline: str, configs: Configs, flags: Mapping[str, Any]
) -> tuple[RequestedParameters, str]:
    """Return the steps, guidance and size that suit a model, and where they come from.

    First by the flags in its folder, then by its published id, which is one of ``names`` or the end of one,
    as in ``/models/owner/name``, then the call's own.
    """
    call = call_of(pipeline)
    if (flagged := _by_flags(pipeline, configs, flags)) is not None:
        return flagged, "the model's own"
    for name in names:
        if published := PUBLISHED.get("/".join(name.rstrip("/").split("/")[-2:])):
            return published, "the model's own"
    return _defaults(call.steps, call.guidance), "the pipeline's own"


def _by_flags(pipeline: str, configs: Configs, flags: Mapping[str, Any]) -> RequestedParameters | None:
    scheduler = configs.get("scheduler", {})
    if flags.get("is_distilled"):
        return _defaults(4) if pipeline == "Flux2KleinPipeline" else _defaults(8, 0.0)
    if pipeline == "FluxPipeline" and not configs.get("transformer", {}).get("guidance_embeds"):
        return None if scheduler.get("use_dynamic_shifting") else _defaults(4)
    class_name = scheduler.get("_class_name")
    if pipeline.startswith("StableDiffusion") and class_name in _FEW_STEPS:
        return _defaults(4, 8.0 if _embeds_guidance(configs) else _FEW_STEPS[class_name])
    return None
