"""Model configurations: what is refused and how it is said; the rest is the database suite's."""

from __future__ import annotations

import pytest

from text2img.databases.configurations import configuration_of, missing_configuration
from text2img.errors import ConfigurationError
from text2img.prompts import PromptId

_ID = PromptId("int", "1")


def test_a_long_wrong_value_is_shortened():
    """An error's sentence stays one line of bearable length."""
    with pytest.raises(ConfigurationError) as caught:
        configuration_of(_ID, {"model_type": "x\n" * 500})
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_nulls_in_a_configuration_ask_for_nothing():
    """A null is as good as an absent field."""
    configuration = configuration_of(_ID, {"_id": 1, "model_path": None, "safety_checker": None})
    assert (configuration.model_path, configuration.safety_checker) == (None, True)


def test_a_missing_configuration_is_named():
    """The sentence says what was asked for, where it was sought, and which option to look at."""
    said = str(missing_configuration("spring", "model_configs"))
    assert said == "model_configs holds no model configuration with the _id 'spring'; check --model-config-id"
