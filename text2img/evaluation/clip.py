"""Evaluates by CLIPScore: how near the picture's embedding lies to the text's, in a local CLIP model.

Imports torch and transformers only inside its methods. Knows nothing of how a picture came about; CLIP reads
77 tokens of a text at the most, and so does this score.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import EvaluationFailed, ModelFailed
from text2img.evaluation import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_MODEL: Final = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
_WEIGHT: Final = 2.5
"""Hessel et al., CLIPScore (EMNLP 2021), equation 1: brings what CLIP gives to good pairs near 1."""


class ClipEvaluator:
    """Implements ``text2img.evaluation.Evaluator``; its promises stand there.

    ``model`` is a folder or a hub id. Runs on the CPU in fp32, beside the device that makes the pictures, so
    that neither waits for the other.
    """

    def __init__(self, model: str = DEFAULT_MODEL) -> None:
        self._model = model
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Who judges."""
        return f"clip:{self._model}"

    def check(self) -> None:
        """What can be known without the weights: that the model's configuration is a CLIP's."""
        from transformers import AutoConfig

        try:
            kind = AutoConfig.from_pretrained(self._model, trust_remote_code=False).model_type
        except (OSError, ValueError) as exc:
            raise ModelFailed(f"the evaluator's model {self._model} cannot be had: {_line(exc)}") from exc
        if kind != "clip":
            raise ModelFailed(
                f"the evaluator's model {self._model} is of type {kind}; --evaluator wants a CLIP"
            )

    def load(self) -> None:
        """Read the weights into memory; see Evaluator."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()

    def evaluate(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """``2.5 · max(cos(picture, text), 0)``, at most 1; see Evaluator."""
        import torch

        if self._loaded is None:
            raise RuntimeError("the evaluator is used before load()")
        model, processor = self._loaded
        try:
            inputs = processor(
                text=[text], images=[pixels], return_tensors="pt", padding=True, truncation=True
            )
            with torch.inference_mode():
                output = model(**inputs)
                cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        except (RuntimeError, ValueError) as exc:
            raise EvaluationFailed(f"CLIP failed on this picture: {_line(exc)}") from exc
        score = _WEIGHT * float(cosine[0])
        if math.isnan(score):
            raise EvaluationFailed("CLIP's score of this picture is no number")
        return Evaluation(score=min(1.0, max(0.0, score)), evaluator=self.name)

    def similarity(self, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
        """The cosine, in [-1, 1], of two pictures' embeddings; each uint8 (height, width, 3), RGB.

        Raises EvaluationFailed where the model fails on them.
        """
        import torch

        if self._loaded is None:
            raise RuntimeError("the evaluator is used before load()")
        model, processor = self._loaded
        try:
            with torch.inference_mode():
                seen = [
                    model.visual_projection(
                        model.vision_model(
                            **processor.image_processor(images=[pixels], return_tensors="pt")
                        ).pooler_output
                    )
                    for pixels in (one, other)
                ]
                cosine = float(torch.nn.functional.cosine_similarity(*seen)[0])
        except (RuntimeError, ValueError) as exc:
            raise EvaluationFailed(f"CLIP failed on these pictures: {_line(exc)}") from exc
        if math.isnan(cosine):
            raise EvaluationFailed("CLIP's similarity of these pictures is no number")
        return cosine

    def _load(self) -> tuple[Any, Any]:
        import torch
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(self._model, dtype=torch.float32, use_safetensors=True).eval()
            processor = CLIPProcessor.from_pretrained(self._model)
        except (OSError, ValueError, RuntimeError) as exc:
            raise ModelFailed(f"the evaluator's model {self._model} cannot be loaded: {_line(exc)}") from exc
        return model, processor


def _line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0][:200] if str(exc).strip() else type(exc).__name__
