"""Fetch a LoRA from a web server, the Hugging Face hub or a bucket, and check what its file declares."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from text2img import __version__
from text2img.concurrency.timeouts import timeout_in
from text2img.engine.loras import SUFFIX, SourceTooSlow
from text2img.errors import ErrorCode, PromptFailed
from text2img.storage import StorageOptions, open_bucket
from text2img.storage.bucket import PermanentError, TransientError

if TYPE_CHECKING:
    import requests

    from text2img.engine.loras import LoraLocation
    from text2img.engine.loras.cache import DownloadWriter


_TIMEOUT: Final = (10, 30)
"""Seconds for connecting, and between two received bytes."""
_STREAM_CHUNK_BYTES: Final = 2**20


def fetch_from_web(location: LoraLocation, known_version: str | None, writer: DownloadWriter) -> str | None:
    """Download a LoRA and return its version (the ETag); return None if ``known_version`` is current.

    Raises PromptFailed (``lora_failed``) for a permanent error, TransientError for one worth a retry.
    """
    import requests

    from text2img.concurrency.http_limits import LimitedAdapter, MinimumRate

    headers = {"Accept-Encoding": "identity", "User-Agent": f"text2img/{__version__}"}
    if known_version:
        headers["If-None-Match"] = known_version
    url = f"{location.kind}://{location.root}/{location.path}{location.query}"
    try:
        with requests.Session() as session:
            session.mount(f"{location.kind}://", LimitedAdapter(MinimumRate()))
            # A no-op for auth: without it requests would read the host's password from the user's .netrc.
            with session.get(
                url,
                headers=headers,
                timeout=_TIMEOUT,
                stream=True,
                allow_redirects=False,
                auth=lambda request: request,
            ) as response:
                if response.status_code == 304 and known_version:
                    return None
                _check_status(response)
                length = response.headers.get("Content-Length", "")
                writer.check_size(int(length) if re.fullmatch("[0-9]{1,18}", length) else None)
                for chunk in response.iter_content(_STREAM_CHUNK_BYTES):
                    writer.write(chunk)
                return response.headers.get("ETag") or ""
    except requests.exceptions.SSLError as exc:
        raise _fetch_failed("its server's certificate is not trusted") from exc
    except requests.RequestException as exc:
        if timeout := timeout_in(exc):
            raise SourceTooSlow(f"its server is too slow ({timeout})") from exc
        raise TransientError(f"its server cannot be reached ({type(exc).__name__})") from exc


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status in {408, 425, 429} or status >= 500:
        raise TransientError(f"its server keeps answering {status}")
    if 300 <= status < 400:
        raise _fetch_failed("its server redirects, and redirects are not followed; use the final URL")
    if status != 200:
        raise _fetch_failed(f"its server answers {status}")


def _fetch_failed(reason: str) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: {reason}")


def refuse_peft_file(name: str) -> None:
    """Raise PromptFailed for the file of peft's own folder: its scale is in another file of the folder."""
    if name.rpartition("/")[2] == "adapter_model.safetensors":
        raise _fetch_failed(
            "it is peft's own file, whose scale is in the adapter_config.json beside it; copy both into a"
            " folder of this machine, or save the LoRA with diffusers"
        )


_HUB_TIMEOUT: Final = 10.0
"""Seconds for the hub to answer one request."""
_DEFAULT_FILE: Final = "pytorch_lora_weights.safetensors"


def fetch_from_hub(location: LoraLocation, known_version: str | None, writer: DownloadWriter) -> str | None:
    """Download a LoRA like ``fetch_from_web``; the version is the commit and the file's name.

    Offline, a known version counts as current.
    """
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(_HUB_TIMEOUT)))
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        if known_version:
            return None
        raise _fetch_failed("HF_HUB_OFFLINE is set and this machine has no copy of it")
    try:
        return _fetch_from_repository(location, known_version, writer)
    except errors.LocalEntryNotFoundError as exc:
        raise TransientError("the hub cannot be reached") from exc
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as exc:
        raise _fetch_failed("it is not on the hub, or is private or gated") from exc
    except (errors.HfHubHTTPError, OSError) as exc:
        raise TransientError(f"the hub cannot be reached ({type(exc).__name__})") from exc
    except PromptFailed:
        raise
    except Exception as exc:
        if type(exc).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests"}:
            raise TransientError(f"the hub cannot be reached ({type(exc).__name__})") from exc
        raise


def _fetch_from_repository(
    location: LoraLocation, known_version: str | None, writer: DownloadWriter
) -> str | None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    repository = "/".join(location.parts[:2])
    info = HfApi().model_info(repository, timeout=_HUB_TIMEOUT, files_metadata=True)
    sizes = {str(file.rfilename): file.size for file in info.siblings or ()}
    name = "/".join(location.parts[2:]) or _lora_file(list(sizes))
    if name not in sizes:
        raise _fetch_failed(f"{repository} has no {name[:100]}")
    refuse_peft_file(name)
    version = f"{info.sha} {name}"
    if version == known_version:
        return None
    writer.check_size(sizes[name])
    with tempfile.TemporaryDirectory(prefix="text2img-") as folder:
        file = hf_hub_download(
            repository, name, revision=info.sha, local_dir=folder, etag_timeout=_HUB_TIMEOUT
        )
        with Path(file).open("rb") as opened:
            while chunk := opened.read(_STREAM_CHUNK_BYTES):
                writer.write(chunk)
    return version


def _lora_file(files: list[str]) -> str:
    """Return the repository's LoRA: the file with the default name, or the only safetensors file."""
    candidates = [file for file in files if file.endswith(SUFFIX) and "/" not in file]
    if _DEFAULT_FILE in candidates:
        return _DEFAULT_FILE
    if len(candidates) != 1:
        raise _fetch_failed(
            f"its repository has {len(candidates)} {SUFFIX} files; name one: OWNER/NAME/FILE{SUFFIX}"
        )
    return candidates[0]


_CHUNK_BYTES: Final = 8 * 2**20
_BUCKET_RETRY_TIMEOUT: Final = 2.0
"""Seconds for which one request is retried; LoraCache retries the whole download."""


def fetch_from_bucket(
    location: LoraLocation, known_version: str | None, writer: DownloadWriter, s3_endpoint: str | None
) -> str | None:
    """Download a LoRA like ``fetch_from_web``; the version is the object's generation or ETag."""
    try:
        bucket = open_bucket(
            location.kind, location.root, StorageOptions(s3_endpoint=s3_endpoint), _BUCKET_RETRY_TIMEOUT
        )
        stored = bucket.lookup(location.path)
        if known_version and known_version == stored.version:
            return None
        writer.check_size(stored.size)
        for start in range(0, stored.size or 0, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, stored.size or 0)
            writer.write(bucket.read(location.path, stored.version, start, end))
    except PermanentError as exc:
        raise _fetch_failed(_describe_error(exc)) from exc
    except TransientError as exc:
        if timeout := timeout_in(exc):
            raise SourceTooSlow(f"its bucket is too slow ({timeout})") from exc
        raise
    return stored.version or ""


def _describe_error(exc: PermanentError) -> str:
    reasons = {
        404: "it is not in its bucket",
        403: "this account may not read it",
        412: "it has changed during the download",
    }
    return reasons.get(exc.status, f"its bucket answers {exc}")


_MAX_HEADER_BYTES: Final = 10_000_000
"""Maximum size of a header. Real ones have less than a tenth of it; parsed, it takes many times its size."""


def check_header(file: Path) -> None:
    """Raise ValueError with a reason if the file is not a complete safetensors file."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"it is not a safetensors file, but {_describe_content(start)}")
        header = _parse_header(opened.read(length))
    spans = sorted(_span(name, tensor) for name, tensor in header.items() if name != "__metadata__")
    bounds = [(0, 0), *spans, (size - 8 - length, size - 8 - length)]
    if any(first[1] != second[0] for first, second in pairwise(bounds)):
        raise ValueError("it is corrupt: its tensors do not fill the file")


def _parse_header(data: bytes) -> dict[str, object]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict) or len(header.keys() - {"__metadata__"}) == 0:
        raise ValueError("it contains no tensors")
    return header


def _span(name: str, tensor: object) -> tuple[int, int]:
    """Return a tensor's start and end offsets, counted from the end of the header."""
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise ValueError(f"its header has no valid offsets for {name[:60]!r}")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"its header has impossible offsets for {name[:60]!r}")
    return offsets[0], offsets[1]


def _describe_content(start: bytes) -> str:
    if start[:1] == b"<":
        return "a web page"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickle, which could run code and is never loaded"
    return "another format, or too short"
