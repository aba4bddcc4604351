"""CLIPScore by a CLIP model: a tiny one, built in code, with weights that make the score known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from tests.finished import finished_run, image
from text2img import cli
from text2img.engine.devices import suppress_warnings
from text2img.errors import EvaluationFailed, ModelFailed
from text2img.evaluation.clip import ClipEvaluator
from text2img.images import contact_sheet

RED, BLUE = ((np.zeros((48, 64, 3)) + colour).astype(np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of random weights, saved as such models are."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = [
        "red</w>",
        "blue</w>",
        *(chr(97 + i) for i in range(26)),
        *(f"{chr(97 + i)}</w>" for i in range(26)),
    ]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    text = {**size, "vocab_size": len(vocabulary), "bos_token_id": 54, "eos_token_id": 55}
    config = CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    path = tmp_path_factory.mktemp("clip")
    with suppress_warnings():
        CLIPModel(config).save_pretrained(path)
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
        pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def evaluator(folder):
    made = ClipEvaluator(folder)
    made.check()
    made.load()
    return made


def test_the_score_is_that_of_the_paper(folder, evaluator):
    """The score is 2.5 times the cosine of the two embeddings that the model gives, within 0 … 1."""
    with suppress_warnings():
        model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    for pixels in (RED, BLUE):
        for text in ("red", "blue", "a b c"):
            inputs = processor(text=[text], images=[pixels], return_tensors="pt", padding=True)
            with torch.inference_mode():
                output = model(**inputs)
            cosine = float((output.image_embeds * output.text_embeds).sum())
            found = evaluator.evaluate(pixels, text)
            assert found.score == pytest.approx(min(1.0, max(0.0, 2.5 * cosine)), abs=1e-5)


def test_a_text_beyond_its_window_is_scored_by_its_beginning(evaluator):
    """A long text is no error: it has the score of its first 77 tokens."""
    assert evaluator.evaluate(RED, "a " * 400).score == evaluator.evaluate(RED, "a " * 90).score


def test_a_score_that_is_no_number_is_none(folder):
    """Weights that overflow make no score, where a comparison with NaN would let everything pass."""
    made = ClipEvaluator(folder)
    made.load()
    made._loaded[0].visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationFailed, match="NaN"):
        made.evaluate(RED, "red")


def test_what_is_no_clip_is_found_before_there_is_work(tmp_path):
    """A folder that is not there, and a model of another kind, are told apart and named."""
    with pytest.raises(ModelFailed, match="cannot read the configuration"):
        ClipEvaluator(str(tmp_path / "nowhere")).check()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelFailed, match="type bert"):
        ClipEvaluator(str(tmp_path)).check()


def test_likeness_is_the_cosine_of_the_embeddings(folder, evaluator):
    """Two pictures are as alike as the angle between what the model makes of them; each is its own equal."""
    with suppress_warnings():
        model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["red"], images=[RED, BLUE], return_tensors="pt", padding=True)
    with torch.inference_mode():
        red, blue = model(**inputs).image_embeds
    assert evaluator.similarity(RED, BLUE) == pytest.approx(float(red @ blue), abs=1e-5)
    assert evaluator.similarity(RED, BLUE) < 0.999
    assert evaluator.similarity(RED, RED) == pytest.approx(1.0, abs=1e-6)


def test_compare_asks_the_model_that_is_named(folder, tmp_path, monkeypatch, capsys):
    """``compare --clip MODEL`` says of each pair what the model finds, in table and JSON."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        prompts = {"1": ("red", 100), "2": ("blue", 200)}
        finished_run(f"sqlite:///{name}/text2img.db", str(tmp_path / name), name, prompts)
    assert cli.main(["compare", "a", "b", "--clip", folder, "--json", "all.json"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "all.json").read_text())
    made = ClipEvaluator(folder)
    made.load()
    for pair, level in zip(found["pairs"], (100, 200), strict=True):
        both = [contact_sheet.pixels(image(level, marked=marked)) for marked in (False, True)]
        assert pair["clip"] == pytest.approx(made.similarity(*both), abs=1e-5)
    assert "CLIP     mean" in said
