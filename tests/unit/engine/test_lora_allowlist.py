"""Which paths of documents lead to a source that the operator allows: hostile ones above all."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from text2img.engine.loras import LoraLocation, SourceAllowlist
from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

ALL = "gs://art/loras/,s3://art/,https://good.example/loras/,http://127.0.0.1:8000/,hub:artist/"


def allowed(sources, path):
    try:
        return SourceAllowlist.parse(sources).check(path)
    except PromptFailed as exc:
        return None if exc.code is ErrorCode.LORA_FAILED else exc


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (
            "gs://art/loras/a b.safetensors".replace(" ", ""),
            LoraLocation("gs", "art", ("loras", "ab.safetensors")),
        ),
        ("s3://art/x/y", LoraLocation("s3", "art", ("x", "y"))),
        ("https://good.example/loras/x", LoraLocation("https", "good.example:443", ("loras", "x"))),
        (
            "HTTPS://GOOD.example:443/loras/x?sig=1",
            LoraLocation("https", "good.example:443", ("loras", "x"), "?sig=1"),
        ),
        ("http://127.0.0.1:8000/x", LoraLocation("http", "127.0.0.1:8000", ("x",))),
        ("artist/style", LoraLocation("hub", "", ("artist", "style"))),
        ("artist/style/a.safetensors", LoraLocation("hub", "", ("artist", "style", "a.safetensors"))),
    ],
)
def test_what_lies_below_a_source_is_allowed(path, place):
    """A path below one of the prefixes is taken apart into what is fetched."""
    assert allowed(ALL, path) == place


@pytest.mark.parametrize(
    "path",
    [
        "gs://art/lorasx/a",  # not at a slash
        "gs://art/other/a",
        "gs://artx/loras/a",
        "gs://art/loras/../secret",
        "gs://art/loras//a",
        "s3://loras/a",
        "https://good.example/lorasx/a",
        "https://good.example/loras/../private/a",
        "https://good.example/loras/%2e%2e/private/a",
        "https://good.example/loras/%252e%252e/private/a",
        "https://good.example/loras/..%2fprivate/a",
        "https://good.example/loras/%5c..%5cprivate/a",
        "https://good.example/loras/\\..\\private",
        "https://good.example/loras/",
        "https://good.example@evil.example/loras/a",
        "https://user:secret@good.example/loras/a",
        "https://good.example:8443/loras/a",
        "https://good.example.evil.example/loras/a",
        "https://evil.example/https://good.example/loras/a",
        "https://evil.example#@good.example/loras/a",
        "https://evil.example?@good.example/loras/a",
        "https://good.example\\@evil.example/loras/a",
        "https://good.example\t/loras/a",
        "https://gооd.example/loras/a",  # with two letters of another script
        "https:/good.example/loras/a",
        "https:good.example/loras/a",
        "//good.example/loras/a",
        "http://good.example/loras/a",
        "http://127.0.0.1:8001/a",
        "http://169.254.169.254/latest/meta-data",
        "ftp://good.example/loras/a",
        "file:///etc/passwd.safetensors",
        "javascript://good.example/loras/a",
        "artistx/style",
        "artist/../other/style",
        "artist",
        "artist/style/a.bin",
        "artist/style/../../x.safetensors",
        "other/style",
        "/etc/passwd",
        "/etc/a.safetensors",
        "models/../a.safetensors",
        "~/a.safetensors",
        "",
        "://",
        "https://",
        "https://[::1",
        "https://good.example:port/loras/a",
    ],
)
def test_nothing_else_is(path):
    """Whatever leads elsewhere, or could be read in two ways, is refused as the prompt's failure."""
    assert allowed(ALL, path) is None
    assert allowed(None, path) is None


def test_what_is_not_allowed_is_said_so():
    """The sentence names the option, and does not repeat a path that may hold a secret."""
    with pytest.raises(PromptFailed, match="--lora-source") as caught:
        SourceAllowlist.parse("hub:artist/").check("https://evil.example/x?sig=hush")
    assert "hush" not in str(caught.value)


@given(st.text(alphabet="./%2eEfF5cC\\@:?#a ", max_size=30))
@example("..%2f..%2fx")
@example("a/%2E%2E/b")
def test_no_path_leaves_its_prefix(rest):
    """Whatever follows an allowed prefix is refused, or is the prefix's parts and more of them, none of them
    dots however it is unquoted.
    """
    place = allowed("https://good.example/loras/", f"https://good.example/loras/{rest}")
    if place is not None:
        assert (place.kind, place.root, place.parts[0]) == ("https", "good.example:443", "loras")
        assert len(place.parts) > 1
        assert not {".", "..", ""} & set(place.parts)
        assert "%2e%2e" not in place.path.lower().replace("%25", "%")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(path):
    """No text makes the check fail in another way; nothing is allowed where nothing is a source."""
    assert allowed(None, path) is None
    allowed(ALL, path)


def test_links_out_of_a_folder_are_refused(tmp_path):
    """A file below the folder is allowed; one that a symbolic link, or two dots, lead to elsewhere is not."""
    folder, outside = tmp_path / "loras", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "x.safetensors").touch()
    (folder / "own.safetensors").touch()
    (folder / "link.safetensors").symlink_to(outside / "x.safetensors")
    (folder / "door").symlink_to(outside)
    (tmp_path / "alias").symlink_to(folder)
    for source in (str(folder), f"{folder}/", str(tmp_path / "alias")):
        assert allowed(source, f"{folder}/own.safetensors")
        assert allowed(source, f"{tmp_path}/alias/own.safetensors")
        for path in ("link.safetensors", "door/x.safetensors", "../outside/x.safetensors", "own.bin"):
            assert allowed(source, f"{folder}/{path}") is None
    assert allowed(str(folder), f"{folder}x/own.safetensors") is None


@pytest.mark.parametrize(
    "text",
    ["loras", "hub:a/b/c", "hub:../x", "https://a@b/", "http://host/", "https://h/../", "ftp://x/", "gs://"],
)
def test_a_source_that_is_none_is_wrong_usage(text):
    """What cannot be a prefix ends a run before anything is claimed, with the option's name."""
    with pytest.raises(ConfigurationError, match="--lora-source"):
        SourceAllowlist.parse(text)


def test_whole_places_may_be_sources():
    """A bucket, a host, the hub as a whole: a prefix without a path."""
    assert allowed("gs://art", "gs://art/x")
    assert allowed("https://good.example", "https://good.example/x")
    assert allowed("hub:", "anyone/thing")
    assert allowed("/", "/any/where.safetensors")
