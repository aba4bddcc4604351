"""What a run asks of every picture: what cannot be done is found before a prompt is claimed."""

from __future__ import annotations

import pytest

from tests.painter import CARD
from text2img.errors import ConfigurationError
from text2img.prompts import ModelConfiguration, RequestedParameters
from text2img.settings.loader import load
from text2img.worker.build import build, run_defaults, validate_defaults


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """A folder without .env files."""
    monkeypatch.chdir(tmp_path)


def wanted(configuration, **flags):
    settings = load({"output": "images", **flags})
    return validate_defaults(build(settings), CARD, run_defaults(settings, CARD, configuration))


def test_a_loop_and_several_pictures_exclude_each_other():
    """A model configuration that wants several of every prompt would have each end in error; a flag helps."""
    several = ModelConfiguration(requested=RequestedParameters(num_images=2))
    loop = {"iterations": "2", "evaluator": "demo"}
    assert wanted(several).num_images == 2
    with pytest.raises(ConfigurationError, match="num_images is 2"):
        wanted(several, **loop)
    assert wanted(several, **loop, num_images="1").num_images == 1


def test_a_loop_without_scores_is_found_by_whoever_looks():
    """Doctor asks here, and so says what a run would refuse."""
    with pytest.raises(ConfigurationError, match="--evaluator"):
        wanted(None, candidates="2")


def test_a_run_whose_own_parameters_exceed_its_limits_is_refused():
    """No prompt without parameters of its own would succeed, so that the operator has to choose."""
    large = ModelConfiguration(requested=RequestedParameters(width=1024, height=1024))
    with pytest.raises(ConfigurationError, match="--max-pixels"):
        wanted(large, max_pixels=str(512 * 512))
    assert wanted(large, max_pixels=str(512 * 512), width="512", height="512").width == 512
