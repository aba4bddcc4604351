"""What a try came to: an answer's status or a fault, as told, refused or for later. Knows HTTP's numbers."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import StrEnum

from text2img.concurrency import backoff

_LONGEST_WAIT = 60.0  # seconds between tries of our own accord
_LONGEST_ASKED = 3600.0  # seconds for which a receiver may put us off
_AGAIN = frozenset({408, 429})


class Result(StrEnum):
    """How a try went."""

    TOLD = "told"  # 2xx: the receiver has it
    REFUSED = "refused"  # it will never take it: 3xx, 410, other 4xx
    LATER = "later"  # 408, 429, 5xx, or nobody answered


@dataclass(frozen=True, slots=True)
class Verdict:
    """A try's result; ``detail`` says why, without anything secret.

    For LATER, in seconds: ``wait`` is what we would wait, ``asked`` what the receiver has asked for
    (Retry-After; 0 where it has not). The next try is due after the longer of the two.
    """

    result: Result
    detail: str
    wait: float = 0.0
    asked: float = 0.0


def judge(shown: str, status: int, retry_after: str | None, tries: int) -> Verdict:
    """What the answer of ``shown`` to so many tries means."""
    detail = f"{shown} answered {status}"
    if 200 <= status < 300:
        return Verdict(Result.TOLD, detail)
    if status in _AGAIN or status >= 500:
        return Verdict(Result.LATER, detail, growing(tries), backoff.asked(retry_after, _LONGEST_ASKED))
    if 300 <= status < 400:
        detail += "; redirects are not followed, give the final address"
    return Verdict(Result.REFUSED, detail)


def fault(shown: str, exc: Exception, timeout: float) -> str:
    """What went wrong, by kind: the libraries' own words hold the whole URL."""
    import requests

    if isinstance(exc, (TimeoutError, requests.Timeout)):
        return f"{shown} did not answer within {timeout:g} s"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, AddressRefused):
            return f"{shown} {cause}"
        if isinstance(cause, socket.gaierror):
            return f"{shown} has no address: the name is not known"
        if isinstance(cause, ConnectionRefusedError):
            return f"{shown} refuses connections"
        cause = cause.__cause__ or cause.__context__
    kinds = (
        (requests.exceptions.ProxyError, "the proxy fails"),
        (requests.exceptions.SSLError, "TLS fails"),
    )
    reason = next((words for kind, words in kinds if isinstance(exc, kind)), type(exc).__name__)
    return f"{shown} cannot be reached ({reason})"


class AddressRefused(OSError):  # noqa: N818 - it says what happened
    """A name leads to an address that it must not have."""


def growing(tries: int) -> float:
    """Seconds to the next try: 1, 2, 4 … 60, less up to a quarter."""
    return backoff.growing(tries, _LONGEST_WAIT)
