"""Steps and signs of life of pipelines that report none themselves, or those of their last stage only."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    IFPipeline,
    KandinskyV22CombinedPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.engine import models
from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine import steps as engine_steps
from text2img.errors import Stopped

RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": models.HIDDEN,
    "encoder_hid_dim": models.HIDDEN,
    "resnet_time_scale_shift": "scale_shift",
}


def pixart():
    """One call of the transformer a step, and no callback."""
    tokenizer = models.t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=models._t5(len(tokenizer)),
        vae=models._vae(),
        transformer=PixArtTransformer2DModel(
            sample_size=32,
            patch_size=2,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=models.HIDDEN,
            in_channels=4,
            out_channels=8,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def deepfloyd():
    """Pixels in place of latents, and no callback."""
    tokenizer = models.t5_tokenizer()
    return IFPipeline(
        tokenizer=tokenizer,
        text_encoder=models._t5(len(tokenizer)),
        unet=UNet2DConditionModel(
            in_channels=3,
            out_channels=6,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            **RESNETS,
        ),
        scheduler=DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def kandinsky():
    """Two stages: 25 steps of a prior, then those that were asked for."""
    tokenizer, hidden = models.clip_tokenizer(), models.HIDDEN
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=37,
        image_size=32,
        patch_size=8,
        num_attention_heads=4,
        num_hidden_layers=1,
    )
    return KandinskyV22CombinedPipeline(
        unet=UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            attention_head_dim=4,
            addition_embed_type="image",
            encoder_hid_dim_type="image_proj",
            **RESNETS,
        ),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        movq=VQModel(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        prior_prior=PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, embedding_dim=hidden, num_layers=1
        ),
        prior_image_encoder=CLIPVisionModelWithProjection(vision),
        prior_text_encoder=CLIPTextModelWithProjection(
            models._clip_config(len(tokenizer), projection_dim=hidden)
        ),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        prior_image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )


PIPELINES = {"pixart": pixart, "deepfloyd": deepfloyd, "kandinsky": kandinsky}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A loaded engine of each of these pipelines, shared."""
    root, engines = tmp_path_factory.mktemp("stages"), {}

    def engine(name):
        if name not in engines:
            torch.manual_seed(0)
            PIPELINES[name]().save_pretrained(root / name)
            engines[name] = open_engine(root / name)
        return engines[name]

    return engine


def _told(engine, *requests):
    told = []
    pictures = draw(engine, *requests, on_step=lambda *step: told.append(step))
    assert [picture.pixels.shape for picture in pictures] == [(64, 64, 3)] * len(requests)
    return told


@pytest.mark.parametrize("name", ["pixart", "deepfloyd"])
@pytest.mark.parametrize("count", [1, 3])
def test_steps_without_a_callback(opened, name, count):
    """Each step is reported once it is done, up to the last, and the passes between them as signs of life."""
    told = _told(opened(name), *(ask(seed, num_inference_steps=4) for seed in range(count)))
    done = [done for done, _ in told]
    assert {of for _, of in told} == {4}
    assert done == sorted(done)
    assert set(done) == {0, 1, 2, 3, 4}
    assert done.count(1) == 2  # the first step, and the second pass


def test_a_denoiser_that_is_called_twice_a_step(opened):
    """Two passes a step make the progress no faster."""
    engine = opened("pixart")
    pipe = pipe_of(engine)

    def again(module, arguments, named, output):
        if not twice:
            twice.append(module)
            module(*arguments, **named)
            twice.clear()

    twice = []
    hook = pipe.transformer.register_forward_hook(again, with_kwargs=True)
    try:
        told = _told(engine, ask(num_inference_steps=4))
    finally:
        hook.remove()
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done.index(2) > len(done) // 3
    assert (done[-1], done.count(1)) == (4, 3)


def test_the_stages_of_a_pipeline_share_the_progress(opened):
    """The prior's steps count as well: halfway through both stages the progress is a half."""
    told = _told(opened("kandinsky"), ask(num_inference_steps=25))
    done = [done for done, _ in told]
    assert {of for _, of in told} == {25}
    assert done == sorted(done)
    assert set(done) == set(range(26))
    assert abs(done.index(12) - len(done) // 2) < len(done) // 8


def test_a_stop_between_two_steps(opened):
    """What the listener raises in a pass of the text encoder ends the call; the engine stays usable."""
    engine = opened("pixart")

    def stop(_done, _of):
        raise Stopped(15)

    with pytest.raises(Stopped):
        draw(engine, ask(), on_step=stop)
    assert _told(engine, ask())[-1] == (2, 2)
    pipe = pipe_of(engine)
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize(("family", "scheduler"), [("sd1", "ddim"), ("lcm", None)])
def test_other_passes_count_where_steps_take_long(loaded, family, scheduler, monkeypatch):
    """A pipeline that reports its steps gets a sign of life from its text encoder and its decoder as well,
    once there was no step for a while.
    """
    engine = loaded(family)
    assert _told(engine, ask(scheduler=scheduler)) == [(1, 2), (2, 2)]
    monkeypatch.setattr(engine_steps, "_QUIET_SECONDS", 0.0)
    told = _told(engine, ask(text=f"a new text of {family}", scheduler=scheduler))
    assert (told[0], told[-2:]) == ((0, 2), [(2, 2)] * 2)
