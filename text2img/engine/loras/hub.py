"""A LoRA from the hub: one safetensors file of a repository, of the commit that its main branch is at."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img.engine.loras.allowlist import ENDING
from text2img.errors import ErrorCode, PromptFailed
from text2img.storage.bucket import Faltered

if TYPE_CHECKING:
    from text2img.engine.loras.allowlist import Place
    from text2img.engine.loras.cache import Sink

_PATIENCE: Final = 10.0
"""Seconds for the hub to answer one request."""
_PIECE: Final = 2**20
_USUAL: Final = "pytorch_lora_weights.safetensors"


def fetch(place: Place, known: str | None, sink: Sink) -> str | None:
    """As ``web.fetch``; the version is the commit and the file. Offline, what is known is still it."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(_PATIENCE)))
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        if known:
            return None
        raise _failed("HF_HUB_OFFLINE is set and this machine has no copy of it")
    try:
        return _fetch(place, known, sink)
    except errors.LocalEntryNotFoundError as exc:
        raise Faltered("the hub cannot be reached") from exc
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as exc:
        raise _failed("it is not on the hub, or is private or gated") from exc
    except (errors.HfHubHTTPError, OSError) as exc:
        raise Faltered(f"the hub cannot be reached ({type(exc).__name__})") from exc
    except PromptFailed:
        raise
    except Exception as exc:
        if type(exc).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests"}:
            raise Faltered(f"the hub cannot be reached ({type(exc).__name__})") from exc
        raise


def _fetch(place: Place, known: str | None, sink: Sink) -> str | None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    repository = "/".join(place.parts[:2])
    info = HfApi().model_info(repository, timeout=_PATIENCE, files_metadata=True)
    sizes = {str(file.rfilename): file.size for file in info.siblings or ()}
    name = "/".join(place.parts[2:]) or _only(list(sizes))
    if name not in sizes:
        raise _failed(f"{repository} has no {name[:100]}")
    version = f"{info.sha} {name}"
    if version == known:
        return None
    sink.expect(sizes[name])
    with tempfile.TemporaryDirectory(prefix="text2img-") as folder:
        file = hf_hub_download(repository, name, revision=info.sha, local_dir=folder, etag_timeout=_PATIENCE)
        with Path(file).open("rb") as opened:
            while piece := opened.read(_PIECE):
                sink.write(piece)
    return version


def _only(files: list[str]) -> str:
    """The repository's LoRA: the file of the usual name, or the only one of its kind."""
    found = [file for file in files if file.endswith(ENDING) and "/" not in file]
    if _USUAL in found:
        return _USUAL
    if len(found) != 1:
        raise _failed(f"its repository has {len(found)} {ENDING} files; name one: OWNER/NAME/FILE{ENDING}")
    return found[0]


def _failed(why: str) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: {why}")
