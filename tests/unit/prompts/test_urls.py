"""URLs of pictures: the public one and the gs:// one say the same place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.prompts.ids import gcs_url, public_gcs_url, quoted


@given(
    st.from_regex(r"[a-z0-9][a-z0-9._-]{1,20}[a-z0-9]", fullmatch=True), st.text(st.characters(codec="utf-8"))
)
def test_public_url_leads_back(bucket, path):
    """Whatever the name holds, the gs:// URL comes out of the public one as it was."""
    assert gcs_url(public_gcs_url(bucket, path)) == f"gs://{bucket}/{path}"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (None, None),
        ("gs://b/p/1.png", "gs://b/p/1.png"),
        ("gs://b/a%20b.png", "gs://b/a%20b.png"),
        ("s3://b/1.png", None),
        ("https://b.s3.amazonaws.com/1.png", None),
        ("https://storage.googleapis.com.example.com/b/1.png", None),
        ("/pictures/1.png", None),
    ],
)
def test_only_cloud_storage_has_a_gcs_url(url, found):
    """A picture elsewhere has none, and a gs:// URL stands as it is."""
    assert gcs_url(url) == found


@given(st.text(st.characters(codec="utf-8")))
def test_quoted_holds_only_what_a_url_may(path):
    """Unreserved characters, slashes and escapes, nothing else; a picture's own name stays as it is."""
    assert all(char.isascii() and (char.isalnum() or char in "/%-._~") for char in quoted(path))
    assert quoted("a/7~str~2F.png") == "a/7~str~2F.png"
