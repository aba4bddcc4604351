"""Where Prometheus finds a run's figures: in a text file, at a Pushgateway, behind a port.

Knows nothing of the figures. Whatever fails here costs the run a line in the log and no more.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import unquote, urlsplit

from prometheus_client import CollectorRegistry, push_to_gateway, start_http_server, write_to_textfile
from prometheus_client.exposition import basic_auth_handler, default_handler

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from text2img.telemetry.metrics import Figures

log = logging.getLogger(__name__)

_GROUP: Final = "/metrics/job/"


class TextFile:
    """A file for node_exporter's textfile collector; replaced as a whole, so that nobody reads half of it."""

    name = "--metrics-textfile"

    def __init__(self, path: str) -> None:
        folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - no link is followed
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigurationError(f"{self.name} (METRICS_TEXTFILE): {folder} is no folder to write to")
        self._path = path

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Write the file anew; raises OSError."""
        del seconds
        write_to_textfile(self._path, registry)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A Pushgateway, and the group of series there that is this run's. Its credentials are not shown."""

    url: str
    job: str
    group: Mapping[str, str]
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    name = "--pushgateway"

    @classmethod
    def parse(cls, url: str, instance: str) -> Self:
        """The gateway of a URL, which may name the group itself: …/metrics/job/JOB/LABEL/VALUE.

        Else the group is job ``text2img`` and this instance. Raises ConfigurationError, which does not show
        the URL.
        """
        try:
            parts = urlsplit(url)
            port = "" if parts.port is None else f":{parts.port}"
        except ValueError:
            parts, port = urlsplit(""), ""
        base, _, named = parts.path.partition(_GROUP)
        job, *pairs = named.strip("/").split("/")
        if parts.scheme not in {"http", "https"} or not parts.hostname or len(pairs) % 2:
            raise ConfigurationError(
                "--pushgateway (PUSHGATEWAY): it should be http://HOST:PORT or https://HOST:PORT, and may "
                "go on with /metrics/job/JOB and pairs of /LABEL/VALUE"
            )
        names, values = pairs[::2], map(unquote, pairs[1::2])
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(
            f"{parts.scheme}://{host}{port}{base}",
            unquote(job) or "text2img",
            dict(zip(names, values, strict=True)) if job else {"instance": instance},
            unquote(parts.username or ""),
            unquote(parts.password or ""),
        )

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Replace the group at the gateway within ``seconds``; raises OSError."""
        push_to_gateway(self.url, self.job, registry, dict(self.group), seconds, self._send)

    def _send(self, **request: Any) -> Callable[[], None]:
        if not self.user:
            return default_handler(**request)
        return basic_auth_handler(**request, username=self.user, password=self.password)


def registry_of(figures: Figures) -> CollectorRegistry:
    """A registry of these figures alone: what the libraries beside us count is not ours to publish."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(figures)
    return registry


def listen(registry: CollectorRegistry, host: str, port: int) -> Callable[[], None]:
    """Answer at /metrics; returns what ends it. Raises ConfigurationError where the port is not free."""
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or "there is no such port"
        raise ConfigurationError(f"--metrics-port (METRICS_PORT): {host}:{port}: {reason}") from exc
    log.info("metrics at http://%s:%d/metrics", host, server.server_port)

    def close() -> None:
        server.shutdown()
        server.server_close()

    return close
