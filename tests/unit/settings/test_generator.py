"""Where the generator's key comes from, and what a generator may be called."""

from __future__ import annotations

import pytest

from text2img.errors import ConfigurationError
from text2img.settings.loader import load

BOTH = ("FAL_KEY", "FAL_AI_API_KEY")


@pytest.fixture(autouse=True)
def _bare(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in BOTH:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.mark.parametrize("name", BOTH)
def test_either_variable_gives_the_key(monkeypatch, name):
    """FAL_KEY is what fal's own tools read, FAL_AI_API_KEY what this job's option is called."""
    monkeypatch.setenv(name, "a-key")
    settings = load({})
    assert settings.fal_ai_api_key == "a-key"
    assert "a-key" in settings.secrets
    assert "a-key" not in repr(settings)


@pytest.mark.parametrize("name", BOTH)
def test_either_may_name_a_file(monkeypatch, tmp_path, name):
    """A mounted secret works by both names."""
    (tmp_path / "key").write_text("a-key\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "key"))
    assert load({}).fal_ai_api_key == "a-key"


def test_the_options_own_variable_wins_at_one_level(monkeypatch):
    """Where both are set in one place, FAL_AI_API_KEY is the one."""
    monkeypatch.setenv("FAL_KEY", "the other")
    monkeypatch.setenv("FAL_AI_API_KEY", "a-key")
    assert load({}).fal_ai_api_key == "a-key"
    assert load({"fal_ai_api_key": "the flag's"}).fal_ai_api_key == "the flag's"


def test_the_higher_level_wins_by_either_name(monkeypatch, tmp_path):
    """The environment's FAL_KEY beats a .env file's FAL_AI_API_KEY; an empty one counts as unset."""
    (tmp_path / ".env").write_text("FAL_AI_API_KEY=from the file\n")
    monkeypatch.setenv("FAL_KEY", "")
    assert load({}).fal_ai_api_key == "from the file"
    monkeypatch.setenv("FAL_KEY", "a-key")
    assert load({}).fal_ai_api_key == "a-key"


@pytest.mark.parametrize(
    ("generator", "model"),
    [
        ("local", None),
        ("fal:fal-ai/flux/dev", "fal-ai/flux/dev"),
        ("fal:workflows/me/my-flow", "workflows/me/my-flow"),
        ("fal:fal-ai/flux-pro/v1.1", "fal-ai/flux-pro/v1.1"),
    ],
)
def test_what_a_generator_may_be(generator, model):
    """The local one, or a model of fal's by owner and name."""
    assert load({"generator": generator}).hosted_model == model


@pytest.mark.parametrize(
    "generator",
    [
        "fal",
        "fal:",
        "fal:flux",
        "fal:/a/b",
        "fal:a/../b",
        "fal:a/b?x=1",
        "fal:a/b/",
        "fal:ä/b",
        "other:a/b",
        "fal:a/b\n",
    ],
)
def test_what_no_generator_may_be(generator):
    """What would become another address than the model's is refused, with the option's name."""
    with pytest.raises(ConfigurationError, match=r"--generator \(GENERATOR\)"):
        load({"generator": generator})
