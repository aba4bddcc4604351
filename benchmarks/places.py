"""Where a job's prompts and pictures are while it is measured: real servers on the wire, or files.

MongoDB's place is taken by SecantusDB, Cloud Storage's by gcp-storage-emulator, each a process of its own,
as the tests start them; between the job and them can lie a distance.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.distance import distance
from text2img.databases import Collections, NewPrompt, open_database
from text2img.prompts import PromptId, RequestedParameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DATABASES = ("sqlite", "mongodb")
STORAGES = ("folder", "bucket")
_BUCKET = "pictures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An empty database and an empty place for pictures; ``near`` is the database past any distance."""

    folder: Path
    near: str
    database: str
    output: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """What the job is started with to work here."""
        return ["--database", self.database, "--output", self.output]

    def add(self, prompts: int) -> None:
        """Let so many prompts wait; each has its number as id and seed."""
        add_prompts(self.near, prompts)


def add_prompts(url: str, prompts: int) -> None:
    """Let so many prompts wait in that database; each has its number as id and seed."""
    with closing(open_database(url, Collections())) as database:
        database.runs.enqueue(
            NewPrompt(id=PromptId("int", str(n)), text=f"picture {n}", requested=RequestedParameters(seed=n))
            for n in range(prompts)
        )


@contextmanager
def places(
    database: str, storage: str, *, database_seconds: float = 0.0, storage_seconds: float = 0.0
) -> Iterator[Callable[[], Place]]:
    """What makes new places of one kind; servers and files are gone when the block is left.

    ``database`` is one of DATABASES, ``storage`` of STORAGES. The seconds are what the way there and back
    takes longer than on this machine; to files there is no way. What the tests need is imported only for
    servers.
    """
    with ExitStack() as servers:
        folder = Path(servers.enter_context(tempfile.TemporaryDirectory(prefix="text2img-")))
        near = far = host = ""
        if database == "mongodb":
            from tests.servers.mongodb import mongodb_in

            near = servers.enter_context(mongodb_in(folder / "mongodb"))
            far = _away(servers, near, database_seconds)
        if storage == "bucket":
            from tests.servers.gcs import gcs_in

            bucket = servers.enter_context(gcs_in(folder / "gcs"))
            host = _away(servers, bucket.host, storage_seconds)
        numbers = itertools.count()
        yield lambda: _place(folder, next(numbers), (near, far), host)


def _away(servers: ExitStack, address: str, seconds: float) -> str:
    """The address behind its distance, if it has one."""
    scheme, _, port = address.rpartition(":")
    return f"{scheme}:{servers.enter_context(distance(int(port), seconds))}" if seconds else address


def _place(folder: Path, number: int, uris: tuple[str, str], host: str) -> Place:
    name = f"place_{number}"
    own = folder / name
    own.mkdir()
    file = f"sqlite:///{own}/prompts.db"
    near, far = (f"{uri}/{name}?directConnection=true" if uri else file for uri in uris)
    return Place(
        folder=own,
        near=near,
        database=far,
        output=f"gs://{_BUCKET}/{name}" if host else str(own / "pictures"),
        variables={"STORAGE_EMULATOR_HOST": host} if host else {},
    )
