"""A TCP proxy that puts a distance before a server: every byte arrives later, and none waits for another.

Knows neither MongoDB nor HTTP. It delays; it does not narrow: any number of bytes are on their way at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

_CHUNK = 2**16
_FLUSH = 1.0  # seconds for what a side that is gone has not read


@contextmanager
def distance(
    port: int,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Iterator[int]:
    """A loopback port that leads to ``port``, ``seconds`` there and back, half of it each way.

    A connection's own handshake takes no time; whoever keeps connections, as all clients here do, would
    hardly notice. ``clock`` and ``sleep`` are for tests.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="distance", daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(
        _listen(port, _Way(seconds / 2, clock, sleep)), loop
    ).result()
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(frozen=True, slots=True)
class _Way:
    """One of the two ways between client and server, and the clock that it is measured with."""

    seconds: float
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[object]]


async def _listen(port: int, way: _Way) -> asyncio.Server:
    async def connected(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(_carry(client, to_server, way), _carry(server, to_client, way))
        finally:
            for writer in (to_server, to_client):
                writer.close()
                with suppress(OSError, TimeoutError):
                    await asyncio.wait_for(writer.wait_closed(), _FLUSH)

    return await asyncio.start_server(connected, "127.0.0.1", 0)


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, way: _Way) -> None:
    """All that comes from ``source`` to ``target``, each chunk its time later; then the end of it."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    reading = asyncio.ensure_future(_read(source, under_way, way))
    with suppress(OSError):
        while True:
            due, chunk = await under_way.get()
            await way.sleep(due - way.clock())
            if not chunk:
                target.write_eof()
                break
            target.write(chunk)
            await target.drain()
    reading.cancel()


async def _read(
    source: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]], way: _Way
) -> None:
    """Note when each chunk is due at the other end; an empty one is the end, also of a broken connection."""
    chunk = b"more"
    while chunk:
        try:
            chunk = await source.read(_CHUNK)
        except OSError:
            chunk = b""
        under_way.put_nowait((way.clock() + way.seconds, chunk))


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
