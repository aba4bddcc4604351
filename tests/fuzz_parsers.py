"""Search, guided by coverage, for bytes that break a parser: ``python -m tests.fuzz_parsers NAME [MINUTES]``.

NAME is ``message``, ``image``, ``lora`` or a format of prompt files. Needs atheris, which is no dependency:
install it into an environment of its own, on top of the project's. A find is printed with its traceback, and
its bytes are kept in ``crash-…`` in the working directory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["text2img"]):
    from text2img.engine.loras.sources import check_header
    from text2img.errors import Text2ImgError
    from text2img.images import FORMATS, encode, read_parameters
    from text2img.images.contact_sheet import thumbnail
    from text2img.intake.entries import FIELDS as NAMES
    from text2img.intake.entries import MessageReader
    from text2img.intake.files import read_prompts

LONGEST = 4_096  # bytes of an input
FIELDS = {
    "prompt": "a cat",
    "seed": 7,
    "width": 64,
    "lora": {"path": "x", "weight": 0.5},
    "guidance_scale": 4.5,
}
SEEDS = {
    "message": [json.dumps({"generation_id": 1, "webhook_url": "https://x/y", **FIELDS}).encode()],
    "json": [json.dumps([{"id": 1, **FIELDS}]).encode(), b'{"prompts": [{"text": "a"}]}'],
    "jsonl": [json.dumps({"id": 1, **FIELDS}).encode()],
    "yaml": [b"- &a {text: a cat, seed: 7}\n- {<<: *a, id: '2'}\n", b"prompts:\n- text: |\n    a\n"],
    "csv": [b'id,text,seed\n1,"a ""cat""",7.0\n', b"sep=;\nid;text\n1;a\n"],
    "txt": [b'a cat\n--prompt "a" --steps 3\n'],
    "image": [],
    "lora": [b"\x40\0\0\0\0\0\0\0" + json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
             .encode().ljust(64) + bytes(4)],
}  # fmt: skip

TOKENS = [
    *(*NAMES, "generation_id", "prompt_tags", "lora_model_url", "sha256", '"$oid"', "__metadata__"),
    *(
        "&a",
        "*a",
        "<<: *a",
        "!!binary",
        "---",
        "sep=;",
        "12:30",
        "0x1F",
        "2026-11-28T00:00:00Z",
        "data_offsets",
    ),
    *("1e999", "NaN", "-0", "1" + "0" * 400, "[" * 300, "{" * 300, "\\ud800", "\u202e", "null", "true"),
    *("IHDR", "iTXt", "zTXt", "iCCP", "Exif"),
]
"""Words to put into inputs: names, and what has a meaning in one of the formats."""


def message(data):
    """Reading a message returns a prompt or short reasons; it never raises."""
    prompt, reasons = MessageReader()(data)
    assert (prompt is None) == bool(reasons)
    assert all(len(reason) < 2_000 and reason.isprintable() for reason in reasons), reasons


def prompt_file(kind, folder):
    """Reading a file raises a Text2ImgError whose lines are short, or returns prompts."""
    path = folder / f"prompts.{kind}"

    def parse(data):
        path.write_bytes(data)
        try:
            list(read_prompts(str(path)))
        except Text2ImgError as exc:
            assert all(len(line) < 2_000 and line.isprintable() for line in exc.lines), exc.lines  # noqa: PT017

    return parse


def image(data):
    """Reading an image raises ValueError or returns."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(ValueError):
        read_parameters(data)
    with contextlib.suppress(ValueError):
        thumbnail(data, 32)


def lora(folder):
    """Checking the header of a LoRA raises ValueError or returns."""
    path = folder / "x.safetensors"

    def parse(data):
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            check_header(path)

    return parse


def _quoted(token):
    """Return the token as libFuzzer's dictionaries have it: every byte in hexadecimal."""
    return "".join(f"\\x{byte:02x}" for byte in token.encode())


def main():
    """Search for as long as asked."""
    from PIL import Image

    name, minutes = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 10
    seeds = list(SEEDS[name])
    if name == "image":
        seeds = [encode(Image.new("RGB", (8, 8)), {"prompt": "a"}, kind, None) for kind in FORMATS.values()]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place), Path(place) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        words = folder / "words"
        words.write_text("".join(f'"{_quoted(token)}"\n' for token in TOKENS))
        others = {"message": message, "image": image, "lora": lora(folder)}
        limits = {"max_total_time": round(60 * minutes), "max_len": LONGEST, "timeout": 20}
        flags = {**limits, "rss_limit_mb": 2_048, "dict": words, "print_final_stats": 1}
        given = [sys.argv[0], *(f"-{flag}={value}" for flag, value in flags.items()), str(corpus)]
        atheris.Setup(given, others.get(name) or prompt_file(name, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
