"""What a run leaves to look at, where it cannot be written."""

from __future__ import annotations

import logging
from contextlib import closing
from datetime import UTC, datetime

from text2img.cli import run
from text2img.concurrency.signals import Stop
from text2img.databases import Run
from text2img.settings.loader import load
from text2img.worker import build


def test_a_file_that_is_refused_fails_no_run(tmp_path, caplog):
    """Whatever is in the way of the summary (other runs that write it at once, something that is no file):
    the run has ended well by then, and a warning is all that comes of it.
    """
    (tmp_path / "summary.json").mkdir()
    settings = load({"output_dir": str(tmp_path)})
    with closing(build.database(settings)) as database, caplog.at_level(logging.WARNING):
        write = run.summary_writer(settings, build.build(settings), database, Stop())
        write(Run(id="r", started_at=datetime.now(UTC), host="h", status="completed"))
    assert "could not be written" in caplog.text
