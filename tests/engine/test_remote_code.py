"""A model's folder may hold code and name it in its configuration: it is never run."""

from __future__ import annotations

import json

from tests.engine.conftest import ask, open_engine

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import CLIPTextConfig as Config, CLIPTextModel as Model, CLIPTokenizer as Tokenizer
"""
NAMED = {
    "AutoConfig": "own.Config",
    "AutoModel": "own.Model",
    "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"],
    "AutoImageProcessor": "own.Config",
}


def test_a_model_s_own_code_is_not_run(copy, tmp_path) -> None:
    """A model whose every configuration names code of its own is drawn by the library's classes."""
    marker, folder = tmp_path / "ran", copy("sd1")
    for part in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        (part / "own.py").write_text(CODE.format(marker=str(marker)))
        for file in (*part.glob("*config.json"), *part.glob("model_index.json")):
            file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": NAMED}))
    (image,) = open_engine(folder).generate([ask()], lambda done, of: None)
    assert image.pixels.shape == (64, 64, 3)
    assert not marker.exists()
