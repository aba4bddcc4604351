"""What one measuring process is asked to do, and the engine and requests it does it with.

Options that this version of the engine or the command line does not have are left out, and ``missing``
names them, so that a row that needs one can be skipped instead of measuring something else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text2img.engine import EngineOptions
from text2img.prompts import Claim, Parameters, Prompt, PromptId, Request
from text2img.settings import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``model`` is a key of ``models.MODELS``, saved in ``folder``; ``engine`` is further engine options.

    ``seconds`` is how long a figure is measured at least, ``pictures`` how many the whole job makes.
    """

    model: str
    folder: str
    device: str = "cuda"
    dtype: str = "float16"
    rehearsal: bool = False
    steps: int = 20
    guidance: float = 7.5
    batch: int = 8
    seconds: float = 10.0
    pictures: int = 500
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """The pictures' pixels a side: the model's own."""
        from benchmarks.gpu.models import MODELS, tiny

        model = MODELS[self.model]
        return tiny(model).side if self.rehearsal else model.side

    def teraflop(self) -> float:
        """Operations (10¹²) of one picture."""
        from benchmarks.gpu.models import MODELS

        return MODELS[self.model].gflop(self.steps, self.guidance) / 1000

    def unopened(self) -> Engine:
        """The product's engine on the model, nothing loaded."""
        from text2img.engine.diffusers import DiffusersEngine

        given = {name: value for name, value in self.engine.items() if name not in missing(self.engine)}
        dtype = {"float16": "fp16", "float32": "fp32"}[self.dtype]
        chosen: Any = {"model": self.folder, "device": self.device, "dtype": dtype, **given}
        return DiffusersEngine(EngineOptions(**chosen))

    def open(self) -> Engine:
        """The same, loaded."""
        engine = self.unopened()
        engine.inspect()
        engine.load()
        return engine

    def requests(self, engine: Engine, first: int, count: int) -> list[Request]:
        """So many requests, their numbers their seeds."""
        return [engine.prepare(self._request(number)) for number in range(first, first + count)]

    def arguments(self) -> list[str]:
        """What the job's command line is given to make the same pictures in the same way."""
        known = {option.name for option in options()}
        flags = {
            "model_id": self.folder,
            "device": self.device,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "batch_size": self.batch,
            **self.engine,
        }
        return [
            word
            for name, value in flags.items()
            if name in known
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def _request(self, number: int) -> Request:
        wanted = Parameters(
            negative_prompt="blurry, dark",
            seed=number,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            width=self.side,
            height=self.side,
            scheduler=None,
        )
        claim = Claim(PromptId("int", str(number)), "nobody", 1)
        return Request(prompt=Prompt(claim=claim, text=TEXT), text=TEXT, parameters=wanted)


TEXT = "a red boat on a quiet lake, early in the morning"


def missing(engine: Mapping[str, Any]) -> list[str]:
    """Those of the engine's options that this version does not have."""
    known = {each.name for each in dataclasses.fields(EngineOptions)}
    return [name for name in engine if name not in known]


def kept_pictures(task: Task) -> Path:
    """Where the eager engine's pictures are kept, for the compiled one's to be compared with."""
    return Path(task.folder).with_suffix(".npy")
