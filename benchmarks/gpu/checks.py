"""The GPU's figures against their targets; a figure that was not measured has no check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gpu.models import MODELS
from benchmarks.results import Check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Rows = Mapping[str, Mapping[str, Any]]

_FASTER = {"sd15": 3.0, "sdxl": 1.5}
_OF_ROOF = {"sd15": 0.40, "sdxl": 0.55}


def checks(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """All checks that the rows allow, model by model."""
    found = [check for model in MODELS for check in _of_model(model, rows)]
    return [*found, *_of_chip(rows)]


def _of_model(model: str, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    name = MODELS[model].name
    own: Rows = {row["row"]: row for row in rows if row["model"] == model}
    plain, ours, job = own.get("bare eager diffusers, batch 1"), _fastest(own), own.get("the whole job")
    roof = next((row["tflops"] for row in rows if row["row"] == "roof"), None)
    made: list[Check] = []
    if ours and roof:
        share = ours["tflops"] / roof
        made.append(
            Check(figure=f"{name}: TFLOP/s ÷ measured matrix roof", measured=share, target=_OF_ROOF[model])
        )
    if job and plain:
        made.append(_ratio(f"{name}: job ÷ bare eager diffusers, batch 1", job, plain, _FASTER[model]))
    if job and ours:
        made.append(_ratio(f"{name}: job ÷ its engine alone, steady state", job, ours, 0.97))
    if job:
        made += _busy(name, job, whole=model == "sd15")
    return [*made, *_of_engine(name, ours or {})]


def _fastest(own: Rows) -> Mapping[str, Any] | None:
    return own.get("ours, compiled") or own.get("ours, eager")


def _ratio(figure: str, one: Mapping[str, Any], other: Mapping[str, Any], target: float) -> Check:
    measured = one["images_per_second"] / other["images_per_second"]
    return Check(figure=figure, measured=measured, target=target)


def _busy(name: str, job: Mapping[str, Any], *, whole: bool) -> list[Check]:
    made = [
        Check(figure=f"{name}: device busy, first to last batch", measured=job["device_busy"], target=0.98)
    ]
    if whole:
        figure = f"{name}: device busy, the whole job of {job['completed']}"
        made.append(Check(figure=figure, measured=job["device_busy_of_all"], target=0.90))
    return made


def _of_engine(name: str, ours: Mapping[str, Any]) -> list[Check]:
    """What must hold of every engine's row that says it."""
    made: list[Check] = []
    if "denoise_bytes" in ours:
        figure, measured = (
            f"{name}: peak memory, decoding ÷ denoising",
            ours["decode_bytes"] / ours["denoise_bytes"],
        )
        made.append(Check(figure=figure, measured=measured, target=1.1, at_least=False))
    if "recompilations" in ours:
        figure = f"{name}: recompilations after warm-up"
        made.append(Check(figure=figure, measured=ours["recompilations"], target=0, at_least=False))
    if "bit_equal" in ours:
        made.append(
            Check(figure=f"{name}: a repeated run, bit-equal", measured=int(ours["bit_equal"]), target=1)
        )
    return made


def _of_chip(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """What is asked of one kind of chip alone."""
    chip = next((row["chip"] for row in rows if row["row"] == "roof"), "")
    ours = _fastest({row["row"]: row for row in rows if row["model"] == "sdxl"})
    if "H200" not in chip or not ours:
        return []
    figure = "SDXL, 20 steps, 1024², images/s, lossless"
    return [Check(figure=figure, measured=ours["images_per_second"], target=1.5)]
