"""A LoRA from a web server: one GET, asked whether what is known is still it; no redirect, no credentials.

Knows requests and HTTP; which servers may be asked it does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from text2img import __version__
from text2img.errors import ErrorCode, PromptFailed
from text2img.storage.bucket import Faltered

if TYPE_CHECKING:
    import requests

    from text2img.engine.loras.allowlist import Place
    from text2img.engine.loras.cache import Sink

_TIMEOUT: Final = (10, 30)
"""Seconds to connect, and to be silent."""
_PIECE: Final = 2**20


def fetch(place: Place, known: str | None, sink: Sink) -> str | None:
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
        raise _failed("its server's certificate cannot be trusted") from exc
    except requests.RequestException as exc:
        raise Faltered(f"its server cannot be reached ({type(exc).__name__})") from exc


def _check(answer: requests.Response) -> None:
    status = answer.status_code
    if status in {408, 425, 429} or status >= 500:
        raise Faltered(f"its server keeps answering {status}")
    if 300 <= status < 400:
        raise _failed("its server sends elsewhere, which is not followed; name the place itself")
    if status != 200:
        raise _failed(f"its server answers {status}")


def _failed(why: str) -> PromptFailed:
    return PromptFailed(ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: {why}")
