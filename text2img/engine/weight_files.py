"""Weight files as they lie in a folder: which set there is, and whether each file is whole.

Reads the headers of safetensors files and none of the weights. The format is 8 bytes with the header's
length (little endian), the header in JSON, then the tensors at the offsets that the header names
(safetensors' own documentation, "Format").
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Final

from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

_LONGEST_HEADER: Final = 100_000_000  # bytes; the format's own limit
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def choose_variant(names: Iterable[str], stem: str, wanted: str | None, where: str) -> str | None:
    """The set of weight files to load among a folder's file ``names``: a variant's name, or None for plain.

    ``stem`` is what such files' names begin with. A variant that is not there gives way to the plain files,
    and plain files that are not there to the only variant, with a word in the log; neither changes what is
    drawn but for rounding. Raises ModelFailed where nothing fits. ``where`` names the folder in messages.
    """
    names = list(names)
    there = _variants(names, stem)
    if wanted in there:
        return wanted
    if wanted is not None and None in there:
        logger.warning("%s has no variant %s; its plain weights are used", where, wanted)
        return None
    if wanted is None and len(there) == 1:
        (only,) = there
        logger.info("%s has no plain weights; its variant %s is used", where, only)
        return only
    raise ModelFailed(_nothing_fits(names, there, wanted, where))


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files of one set: one file, or the shards its index names.

    Raises ModelFailed where the index cannot be read or names a shard that is not there.
    """
    dot = f".{variant}" if variant else ""
    single = folder / f"{stem}{dot}.safetensors"
    index = folder / f"{stem}.safetensors.index{dot}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelFailed(f"{folder} holds neither {single.name} nor {index.name}; fetch the model again")
    shards = sorted(set(_weight_map(index).values()))
    for name in shards:
        if not (folder / name).is_file():
            raise ModelFailed(f"{index} names {name}, which is not there; fetch the model again")
    return [folder / name for name in shards]


def check_whole(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name.

    Raises ModelFailed where the file is shorter or longer than its header says, or has no such header.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ModelFailed(_broken(file, f"of its {size} bytes none are a whole header"))
            header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(_broken(file, "its header cannot be read")) from exc
    promised = 8 + length + max(ends, default=0)
    if size != promised:
        raise ModelFailed(_broken(file, f"it has {size} bytes and its header promises {promised}"))
    if not shapes:
        raise ModelFailed(_broken(file, "it holds no weights"))
    return shapes


def _variants(names: Iterable[str], stem: str) -> set[str | None]:
    """The variants that files named ``stem[.variant][-shard].safetensors`` belong to; None is plain."""
    pattern = re.compile(rf"{re.escape(stem)}(?:\.([A-Za-z0-9_-]+?))?\.safetensors")
    found = (pattern.fullmatch(_SHARD.sub("", name)) for name in names)
    return {match[1] for match in found if match}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weights.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(f"{index} cannot be read; fetch the model again") from exc
    if not names or any("/" in name or "\\" in name for name in names.values()):
        raise ModelFailed(f"{index} names no weight files of its own folder; fetch the model again")
    return names


def _nothing_fits(names: list[str], there: set[str | None], wanted: str | None, where: str) -> str:
    variants = ", ".join(sorted(name for name in there if name))
    if variants:
        missing = f"no variant {wanted} and no plain weights" if wanted else "no plain weights"
        return f"{where} has {missing}, only the variants {variants}: ask for one of them"
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{where} has pickled weights only (such as .bin), and reading those can run code: use a model"
            " that comes as .safetensors"
        )
    return f"{where} has no weights (.safetensors); fetch the model again"


def _broken(file: Path, why: str) -> str:
    return f"{file} is truncated or no safetensors file ({why}); fetch the model again"
