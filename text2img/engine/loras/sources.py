"""Fetch a LoRA from a web server, the Hugging Face hub or a bucket."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img import __version__
from text2img.engine.loras import ENDING
from text2img.errors import ErrorCode, PromptFailed
from text2img.storage import StorageOptions, open_bucket
from text2img.storage.bucket import PermanentError, TransientError

if TYPE_CHECKING:
    import requests

    from text2img.engine.loras import LoraLocation
    from text2img.engine.loras.cache import DownloadWriter


_TIMEOUT: Final = (10, 30)
"""Seconds to connect, and to be silent."""
_PIECE: Final = 2**20


def fetch_from_web(place: LoraLocation, known: str | None, sink: DownloadWriter) -> str | None:
    """Write it into the sink and return its version; None where the known version is still it.

    Raises PromptFailed (``lora_failed``) for an answer that stays, Faltered for what may go better.
    """
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": f"text2img/{__version__}"}
    if known:
        headers["If-None-Match"] = known
    url = f"{place.kind}://{place.root}/{place.path}{place.query}"
    try:
        # A no-op for auth: else requests would look for the host's password in the user's .netrc.
        with requests.get(
            url,
            headers=headers,
            timeout=_TIMEOUT,
            stream=True,
            allow_redirects=False,
            auth=lambda asked: asked,
        ) as answer:
            if answer.status_code == 304 and known:
                return None
            _check(answer)
            length = answer.headers.get("Content-Length", "")
            sink.expect(int(length) if length.isdigit() else None)
            for piece in answer.iter_content(_PIECE):
                sink.write(piece)
            return answer.headers.get("ETag") or ""
    except requests.exceptions.SSLError as exc:
        raise _refused_by_web("its server's certificate cannot be trusted") from exc
    except requests.RequestException as exc:
        raise TransientError(f"its server cannot be reached ({type(exc).__name__})") from exc


def _check(answer: requests.Response) -> None:
    status = answer.status_code
    if status in {408, 425, 429} or status >= 500:
        raise TransientError(f"its server keeps answering {status}")
    if 300 <= status < 400:
        raise _refused_by_web("its server sends elsewhere, which is not followed; name the place itself")
    if status != 200:
        raise _refused_by_web(f"its server answers {status}")


def _refused_by_web(why: str) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: {why}")


_HUB_PATIENCE: Final = 10.0
"""Seconds for the hub to answer one request."""
_USUAL: Final = "pytorch_lora_weights.safetensors"


def fetch_from_hub(place: LoraLocation, known: str | None, sink: DownloadWriter) -> str | None:
    """As ``web.fetch``; the version is the commit and the file. Offline, what is known is still it."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(_HUB_PATIENCE)))
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        if known:
            return None
        raise _refused_by_hub("HF_HUB_OFFLINE is set and this machine has no copy of it")
    try:
        return _fetch(place, known, sink)
    except errors.LocalEntryNotFoundError as exc:
        raise TransientError("the hub cannot be reached") from exc
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as exc:
        raise _refused_by_hub("it is not on the hub, or is private or gated") from exc
    except (errors.HfHubHTTPError, OSError) as exc:
        raise TransientError(f"the hub cannot be reached ({type(exc).__name__})") from exc
    except PromptFailed:
        raise
    except Exception as exc:
        if type(exc).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests"}:
            raise TransientError(f"the hub cannot be reached ({type(exc).__name__})") from exc
        raise


def _fetch(place: LoraLocation, known: str | None, sink: DownloadWriter) -> str | None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    repository = "/".join(place.parts[:2])
    info = HfApi().model_info(repository, timeout=_HUB_PATIENCE, files_metadata=True)
    sizes = {str(file.rfilename): file.size for file in info.siblings or ()}
    name = "/".join(place.parts[2:]) or _only(list(sizes))
    if name not in sizes:
        raise _refused_by_hub(f"{repository} has no {name[:100]}")
    version = f"{info.sha} {name}"
    if version == known:
        return None
    sink.expect(sizes[name])
    with tempfile.TemporaryDirectory(prefix="text2img-") as folder:
        file = hf_hub_download(
            repository, name, revision=info.sha, local_dir=folder, etag_timeout=_HUB_PATIENCE
        )
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
        raise _refused_by_hub(
            f"its repository has {len(found)} {ENDING} files; name one: OWNER/NAME/FILE{ENDING}"
        )
    return found[0]


def _refused_by_hub(why: str) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: {why}")


_PART: Final = 8 * 2**20
_PATIENCE: Final = 2.0
"""Seconds for one request's own tries; whoever fetches tries again."""


def fetch_from_bucket(
    place: LoraLocation, known: str | None, sink: DownloadWriter, s3_endpoint: str | None
) -> str | None:
    """As ``web.fetch``; the version is the object's generation or ETag."""
    try:
        bucket = open_bucket(place.kind, place.root, StorageOptions(s3_endpoint=s3_endpoint), _PATIENCE)
        found = bucket.look(place.path)
        if known and known == found.version:
            return None
        sink.expect(found.size)
        for start in range(0, found.size or 0, _PART):
            end = min(start + _PART, found.size or 0)
            sink.write(bucket.read(place.path, found.version, start, end))
    except PermanentError as exc:
        raise PromptFailed(
            ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: its bucket answers {_meaning(exc)}"
        ) from exc
    return found.version or ""


def _meaning(exc: PermanentError) -> str:
    words = {
        404: "that it is not there",
        403: "that this account may not read it",
        412: "that it has changed",
    }
    return words.get(exc.status, str(exc))
