"""How many tokens a tokenizer's folder knows, and whether that fits the text encoder beside it. No torch.

A tokenizer without its vocabulary loads without an error and reads every text as nothing, so that the
pictures ignore their prompts: it must be found here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from text2img.engine.model_folder import Component, Kind, read_json
from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def check_vocabularies(components: Mapping[str, Component]) -> None:
    """Check each tokenizer that has a text encoder of its number; raises ModelFailed."""
    for name, tokenizer in components.items():
        if tokenizer.kind is not Kind.TOKENIZER:
            continue
        size = vocabulary_size(tokenizer.folder)
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        embedded = encoder.config.get("vocab_size") if encoder else None
        if isinstance(embedded, int):
            check_size(name, size, embedded, exact=tokenizer.class_name.startswith("CLIP"))


def check_size(name: str, size: int, embedded: int, *, exact: bool) -> None:
    """Whether ``size`` tokens fit an embedding of ``embedded`` rows.

    CLIP's agree exactly. T5's embedding is padded to a multiple of 128 (32,128 rows for 32,100 tokens), so
    that others may have up to a fifth fewer tokens than rows, never more.
    """
    if size == embedded or (not exact and embedded * 0.8 <= size <= embedded):
        return
    raise ModelFailed(
        f"the model's {name} knows {size:,} tokens and its text encoder {embedded:,}: they do not belong"
        " together; fetch the model again"
    )


def vocabulary_size(folder: Path) -> int:
    """The tokens that a tokenizer's folder knows, added ones included; ModelFailed where it has none.

    Knows ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, BERT's ``vocab.txt``, and sentencepiece's
    models (T5's ``spiece.model``).
    """
    whole = folder / "tokenizer.json"
    try:
        if whole.is_file():
            tokens = _fast_tokens(read_json(whole))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokens = set(read_json(folder / "vocab.json"))
        elif (folder / "vocab.txt").is_file():
            tokens = set((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
        else:
            return _pieces(folder)
        return len(tokens | _added(folder))
    except (LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(f"the vocabulary in {folder} cannot be read; fetch the model again") from exc


def _fast_tokens(content: dict[str, Any]) -> set[str]:
    vocab = content["model"]["vocab"]  # a dictionary of pieces, or with Unigram a list of (piece, score)
    pieces = vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab)
    return {*pieces, *(token["content"] for token in content.get("added_tokens") or ())}


def _added(folder: Path) -> set[str]:
    """Tokens that were added to a vocabulary afterwards, which two files may name."""
    decoder: dict[str, Any] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            content = read_json(file)
            decoder |= content if name == "added_tokens.json" else {}
            listed = content.get("added_tokens_decoder") or {}
            decoder |= {token["content"]: number for number, token in listed.items()}
    return set(decoder)


def _pieces(folder: Path) -> int:
    """The size of a sentencepiece vocabulary, with the 100 extra tokens that T5's tokenizer appends."""
    from sentencepiece import SentencePieceProcessor

    file = next(iter(sorted(folder.glob("*.model"))), None)
    if file is None:
        raise ModelFailed(
            f"{folder} holds no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model);"
            " fetch the model again"
        )
    try:
        pieces = int(SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (RuntimeError, OSError) as exc:
        raise ModelFailed(f"{file} is no sentencepiece vocabulary; fetch the model again") from exc
    return pieces + (_extra_ids(folder) if file.name == "spiece.model" else 0)


def _extra_ids(folder: Path) -> int:
    config = folder / "tokenizer_config.json"
    extra = json.loads(config.read_text(encoding="utf-8")).get("extra_ids", 100) if config.is_file() else 100
    return int(extra)
