"""docs/metrics.md against the code: a metric that is documented wrongly, or not at all, fails here."""

from __future__ import annotations

from pathlib import Path

from text2img.telemetry.metrics import MetricsCollector
from text2img.telemetry.progress import RunStats
from text2img.telemetry.publisher import RECEIVERS, Backlog

DOCS = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_table_of_metrics_is_the_code() -> None:
    """Name, type, labels and meaning of each metric of a run that is over stand there, in its order."""
    figures = MetricsCollector(RunStats(), lambda: {"load": 1.0}, lambda: 0, 0.0)
    nobody = dict.fromkeys(RECEIVERS, 0)
    figures.succeeded = True
    figures.backlog = Backlog(
        claimable=0,
        postponed=0,
        workers=0,
        expired=0,
        undelivered=nobody,
        notifications=nobody,
        refused=nobody,
    )
    declared = [
        [
            family.samples[0].name,
            family.type,
            ", ".join(family.samples[0].labels),
            family.documentation,
        ]
        for family in figures.collect()
    ]
    table = DOCS.split("<!-- metrics:", 1)[1].split("<!-- end of metrics -->", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line[:3] == "| `"
    ]
    documented = [
        [name.strip("`"), kind, labels.partition(":")[0].strip("`"), meaning]
        for name, kind, labels, meaning in rows
    ]
    assert documented == declared
