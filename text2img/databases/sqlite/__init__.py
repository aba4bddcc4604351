"""Prompts and results in one SQLite file, for one machine, through the Protocols of text2img.databases.

The tables can be filled and read in the sqlite3 shell. Network file systems do not work: their locks are
unreliable.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from text2img.errors import ConfigurationError, DatabaseMissing


def check_folder(path: Path) -> None:
    """Raise DatabaseMissing if the file's folder does not exist."""
    if not path.parent.is_dir():
        raise DatabaseMissing(f"{path.parent} is not a folder; create it, or check the path in --database")


def check_file(path: Path) -> None:
    """Raise DatabaseMissing if the file does not exist."""
    if not path.exists():
        raise DatabaseMissing(f"{path} does not exist; create it by enqueue, or check the path in --database")


def check_exists(url: str) -> None:
    """Raise DatabaseMissing if the file that a URL names does not exist."""
    path = path_of(url)
    check_folder(path)
    check_file(path)


def path_of(url: str) -> Path:
    """Return the file that a URL names; raise ConfigurationError if it names none."""
    _, _, rest = url.partition(":")
    location = unquote(rest.partition("?")[0])
    if not location.startswith("///") or location in {"///", "////"}:
        raise ConfigurationError(
            "write the SQLite file as sqlite:///prompts.db, or sqlite:////data/prompts.db from the root"
        )
    name = location[3:]
    if name == ":memory:":
        raise ConfigurationError("a SQLite database in memory is lost at exit; name a file in --database")
    return Path(name)
