"""Model configurations: what is refused and how it is said; the rest is the database suite's."""

from __future__ import annotations

import pytest

from text2img.databases.documents import configuration_of, missing_configuration
from text2img.errors import ConfigurationError
from text2img.prompts import PromptId

_ID = PromptId("int", "1")


def test_a_long_wrong_value_is_shortened():
    """An error's sentence stays one line of bearable length."""
    with pytest.raises(ConfigurationError) as caught:
        configuration_of(_ID, {"model_type": "x\n" * 500})
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_a_configuration_may_sign_and_choose_the_format():
    """Signature and format are a configuration's to wish, and are checked as a prompt's are."""
    style = {"artist_name": "Studio 9", "signature_opacity": 90, "image_format": "webp", "image_quality": 80}
    requested = configuration_of(_ID, style).requested
    assert {name: getattr(requested, name) for name in style} == style
    for wrong in (
        {"image_format": "gif"},
        {"image_quality": 0},
        {"signature_position": "top"},
        {"artist_name": "a\nb"},
    ):
        with pytest.raises(ConfigurationError, match=f": {next(iter(wrong))} "):
            configuration_of(_ID, wrong)


def test_nulls_in_a_configuration_ask_for_nothing():
    """A null is as good as an absent field."""
    configuration = configuration_of(_ID, {"_id": 1, "model_path": None, "safety_checker": None})
    assert (configuration.model_path, configuration.safety_checker) == (None, True)


def test_approximations_of_a_configuration():
    """Both are read, 0 stands for none, and a cache that is no whole number is refused by its name."""
    configuration = configuration_of(_ID, {"feature_cache": 3.0, "autoencoder": "owner/tiny"})
    assert (configuration.feature_cache, configuration.autoencoder) == (3, "owner/tiny")
    assert configuration_of(_ID, {"feature_cache": 0}).feature_cache == 0
    assert configuration_of(_ID, {}).feature_cache is None
    for wrong in (-1, 2.5, "3", 1001, True):
        with pytest.raises(ConfigurationError, match="feature_cache must be"):
            configuration_of(_ID, {"feature_cache": wrong})
    with pytest.raises(ConfigurationError, match="autoencoder must be text"):
        configuration_of(_ID, {"autoencoder": 3})


def test_a_missing_configuration_is_named():
    """The sentence says what was asked for, where it was sought, and which option to look at."""
    said = str(missing_configuration("spring", "model_configs"))
    assert said == "model_configs has no model configuration with the _id 'spring'; check --model-config-id"
