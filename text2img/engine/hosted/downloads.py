"""A hosted picture: whether its address may be asked, and what its bytes show. All of it is hostile at first.

Knows no protocol and fetches nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from text2img.engine.hosted.responses import malformed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HOSTS: Final = ("fal.media", "fal.ai", "fal.run")
"""Where fal keeps what its models have made: these hosts and those below them."""
_BUCKET: Final = ("storage.googleapis.com", "/falserverless/")
_MOST_PIXELS: Final = 2**26
_DATA = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


def inside(url: str) -> bytes | None:
    """The bytes that a ``data:`` URL holds; None for another kind of address."""
    start = _DATA.match(url)
    if start is None:
        return None
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise malformed("a picture that is no base64") from None


def check_address(url: str, origin: str | None) -> None:
    """Raise PromptFailed unless the address is https:// at one of fal's own hosts.

    ``origin`` is where the operator has sent the requests instead; then what is there may be fetched as well.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise malformed("an address that cannot be read") from None
    if re.search(r"[\x00-\x20\x7f\\@]", url):
        raise malformed("an address that cannot be read")
    if origin is not None and _origin(url) == _origin(origin):
        return
    ours = any(host == name or host.endswith(f".{name}") for name in _HOSTS)
    ours = ours or (host == _BUCKET[0] and parts.path.startswith(_BUCKET[1]))
    if parts.scheme != "https" or port not in {None, 443} or not ours:
        raise malformed("a picture at an address that is not fal's")


def decode(data: bytes) -> NDArray[np.uint8]:
    """The pixels: uint8, (height, width, 3), RGB. PromptFailed for what is no picture, or too large."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height <= _MOST_PIXELS:
                return np.asarray(picture.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except Exception:  # noqa: BLE001 - whatever a hostile file does to its decoder, only its prompt fails
        raise malformed("what should be a picture is none") from None
    raise malformed("a picture that is too large")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
