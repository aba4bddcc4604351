"""The CLIPScore evaluator: the similarity of an image's and a text's embeddings in a local CLIP model.

torch and transformers are imported only inside its methods. CLIP reads at most 77 tokens of a text, so the
score covers no more than these.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import EvaluationFailed, ModelFailed
from text2img.evaluation import Evaluation
from text2img.settings import check_hub_cache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_MODEL: Final = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
_WEIGHT: Final = 2.5
"""Hessel et al., CLIPScore (EMNLP 2021), equation 1: scales CLIP's similarity of good pairs to nearly 1."""


class ClipEvaluator:
    """An Evaluator that scores with a CLIP model.

    ``model`` is a folder or a hub id. It runs on the CPU in fp32, so that it and the device that generates
    the images do not wait for each other.
    """

    def __init__(self, model: str = DEFAULT_MODEL) -> None:
        self._model = model
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The evaluator's name; see Evaluator."""
        return f"clip:{self._model}"

    def check(self) -> None:
        """Check, without the weights, that the model's configuration is a CLIP's; see Evaluator."""
        if not Path(self._model).is_dir():
            check_hub_cache()
        from transformers import AutoConfig

        try:
            kind = AutoConfig.from_pretrained(self._model, trust_remote_code=False).model_type
        except (OSError, ValueError) as exc:
            message = f"cannot read the configuration of the evaluator's model {self._model}"
            raise ModelFailed(f"{message}: {_first_line(exc)}") from exc
        if kind != "clip":
            raise ModelFailed(
                f"the evaluator's model {self._model} is of type {kind}; --evaluator needs a CLIP model"
            )

    def try_call(self) -> None:
        """Do nothing: there is no service."""

    def load(self) -> None:
        """Read the weights into memory; see Evaluator."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()

    def evaluate(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """Return ``2.5 · max(cos(image, text), 0)``, at most 1, as the score; see Evaluator."""
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
            raise EvaluationFailed(f"CLIP failed on this image: {_first_line(exc)}") from exc
        score = _WEIGHT * float(cosine[0])
        if math.isnan(score):
            raise EvaluationFailed("CLIP's score of this image is NaN")
        return Evaluation(score=min(1.0, max(0.0, score)), evaluator=self.name)

    def similarity(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        """Return the cosine, in [-1, 1], of two images' embeddings; each uint8 (height, width, 3), RGB.

        Raises EvaluationFailed if the model fails on them.
        """
        import torch

        if self._loaded is None:
            raise RuntimeError("the evaluator is used before load()")
        model, processor = self._loaded
        try:
            with torch.inference_mode():
                embeddings = [
                    model.visual_projection(
                        model.vision_model(
                            **processor.image_processor(images=[pixels], return_tensors="pt")
                        ).pooler_output
                    )
                    for pixels in (first, second)
                ]
                cosine = float(torch.nn.functional.cosine_similarity(*embeddings)[0])
        except (RuntimeError, ValueError) as exc:
            raise EvaluationFailed(f"CLIP failed on these images: {_first_line(exc)}") from exc
        if math.isnan(cosine):
            raise EvaluationFailed("CLIP's similarity of these images is NaN")
        return cosine

    def _load(self) -> tuple[Any, Any]:
        import torch
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(
                self._model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            ).eval()
            processor = CLIPProcessor.from_pretrained(self._model, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as exc:
            raise ModelFailed(
                f"the evaluator's model {self._model} cannot be loaded: {_first_line(exc)}"
            ) from exc
        return model, processor


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0][:200] if str(exc).strip() else type(exc).__name__
