"""Text encoding: prompts to embeddings, in chunks or whole, and the LRU cache that keeps them."""

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from text2img.engine.loading import running_device

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from text2img.engine.model_folder import Family


if TYPE_CHECKING:
    Tensors = tuple[Any, ...]


class TensorLRUCache:
    """An LRU cache of tuples of tensors (or None), limited to ``max_bytes`` in total.

    Used from one thread at a time; callers must not change the tensors.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._cache: OrderedDict[Hashable, Tensors] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """Return the cached tensors for ``key``, else cache and return those of ``make``."""
        if key not in self._cache:
            tensors = self._cache[key] = make()
            self._bytes += _size(tensors)
        self._cache.move_to_end(key)
        tensors = self._cache[key]
        while self._bytes > self._max_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= _size(oldest)
        return tensors


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


Window = tuple[int, ...]

MAX_CACHE_BYTES: Final = 128 * 2**20
"""Bytes of embeddings kept on the device: 500 texts of XL's in fp32, 15 of Flux's."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One CLIP tokenizer with its text encoder. ``length``: the tokens of a window, 77 with CLIP."""

    tokenizer: Any
    model: Any
    length: int

    @classmethod
    def of(cls, tokenizer: Any, model: Any) -> TextEncoder:
        """Create a text encoder with its own copy of the tokenizer, whose state no other code changes."""
        length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        return cls(copy.deepcopy(tokenizer), model, int(length))

    def windows(self, text: str) -> list[Window]:
        """Split the text into windows of ``length`` token ids; at least one, the last one padded."""
        ids = tokens(self.tokenizer, text)
        capacity = self.length - 2
        return [self.window(ids[start : start + capacity]) for start in range(0, max(len(ids), 1), capacity)]

    def window(self, ids: Sequence[int]) -> Window:
        """Return start token, ids, end token, and padding up to ``length``."""
        unpadded = (self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id)
        return unpadded + (self.tokenizer.pad_token_id,) * (self.length - len(unpadded))


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Return all token ids of the text, without start and end tokens; no warning for long texts."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


class ChunkedText:
    """Encodes prompts for Stable Diffusion 1, 2 and XL. ``count`` may be called from any thread.

    ``text_lora_key`` returns what the embeddings of a text depend on besides the text.
    """

    def __init__(self, pipe: Any, text_lora_key: Callable[[], Hashable] = tuple) -> None:
        second = getattr(pipe, "text_encoder_2", None)
        self._text_encoders = [TextEncoder.of(pipe.tokenizer, pipe.text_encoder)]
        if second is not None:
            self._text_encoders.append(TextEncoder.of(pipe.tokenizer_2, second))
        self._pooled = second is not None
        self._zero_empty_prompts = bool(pipe.config.get("force_zeros_for_empty_prompt")) and self._pooled
        self._lock = threading.Lock()
        self._cache, self._text_lora_key = TensorLRUCache(MAX_CACHE_BYTES), text_lora_key

    def count(self, *texts: str) -> int:
        """Return the maximum number of windows that one of the texts fills."""
        return max(len(windows) for text in texts for windows in self._windows(text))

    def encode(self, texts: Sequence[str], negatives: Sequence[str] | None, chunks: int) -> dict[str, Any]:
        """Return the keyword arguments that pass the texts to a pipeline's call.

        ``prompt_embeds`` is (n, length·chunks, d); XL's ``pooled_prompt_embeds`` (n, p) is that of the first
        window. ``negatives`` None leaves out the negative ones, for a call without guidance. Each window
        goes through the encoder alone, so a text's embeddings do not depend on its neighbours. Where the
        text fits into one window they are, bit by bit, those of the pipeline's own ``encode_prompt``. A
        window that was encoded before, such as a negative prompt's, is taken from the cache.
        """
        import torch

        with torch.no_grad():
            embeds, pooled = self._embed(texts, chunks)
            arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if negatives is not None:
                embeds, pooled = self._embed(negatives, chunks)
                if self._zero_empty_prompts:
                    empty = torch.tensor([not text for text in negatives], device=embeds.device)
                    embeds, pooled = _zero_rows(embeds, empty), _zero_rows(pooled, empty)
                arguments |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return {key: value for key, value in arguments.items() if value is not None}

    def _embed(self, texts: Sequence[str], chunks: int) -> tuple[Any, Any]:
        """Return embeddings (n, length·chunks, d) and pooled ones (n, p) or None."""
        import torch

        rows, pooled = [], []
        for text in texts:
            columns = []
            for number, windows in enumerate(self._windows(text)):
                text_encoder = self._text_encoders[number]
                padded = windows + [text_encoder.window(())] * (chunks - len(windows))
                states = [self._encode_window(number, window) for window in padded]
                columns.append(torch.cat([hidden for hidden, _ in states], dim=1))
                last = states[0][1]
            rows.append(torch.cat(columns, dim=-1))
            pooled.append(last)
        return torch.cat(rows), torch.cat(pooled) if self._pooled else None

    def _encode_window(self, number: int, window: Window) -> tuple[Any, ...]:
        """Return a window's output of the text encoder with that number, cached; see ``_encode``."""
        text_encoder = self._text_encoders[number]
        key = self._text_lora_key(), number, window
        return self._cache.get(key, lambda: _encode(text_encoder, window, penultimate=self._pooled))

    def _windows(self, text: str) -> list[list[Window]]:
        with self._lock:
            return [text_encoder.windows(text) for text_encoder in self._text_encoders]


def _encode(text_encoder: TextEncoder, window: Window, *, penultimate: bool) -> tuple[Any, Any]:
    """Return a window's hidden states (1, length, d) and its pooled text.

    XL's hidden states are those of the layer before the last.
    """
    import torch

    device = running_device(text_encoder.model)
    ids = torch.tensor([window], device=device)
    if penultimate:
        output = text_encoder.model(ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]
    return text_encoder.model(ids, attention_mask=_attention_mask(text_encoder, window, device))[0], None


def _attention_mask(text_encoder: TextEncoder, window: Window, device: Any) -> Any:
    """Return ones up to the first end token, or None where the encoder was trained without a mask (most)."""
    import torch

    if not getattr(text_encoder.model.config, "use_attention_mask", False):
        return None
    read = window.index(text_encoder.tokenizer.eos_token_id) + 1
    return torch.tensor([[1] * read + [0] * (len(window) - read)], device=device)


def _zero_rows(values: Any, empty: Any) -> Any:
    """Return the values, zero in the rows that ``empty`` (n) marks: XL was trained so for empty prompts."""
    return values.masked_fill(empty.view(-1, *([1] * (values.ndim - 1))), 0)


class PipelineText:
    """Encodes prompts with the pipeline's own ``encode_prompt``, text by text (Stable Diffusion 3, Flux).

    ``max_length``: the tokens that the encoder with the longest input reads. ``text_lora_key`` is that of
    ChunkedText.
    """

    POOLED_INDEX: ClassVar = {"sd3": 2, "flux": 1}
    """Index of the pooled text in the result of ``encode_prompt``, by family; the embeddings come first."""

    def __init__(
        self, pipe: Any, family: Family, max_length: int, text_lora_key: Callable[[], Hashable] = tuple
    ) -> None:
        self._pipe = pipe
        self._pooled_index = self.POOLED_INDEX[family.name]
        parameters = inspect.signature(pipe.encode_prompt).parameters
        fixed = {
            "prompt_2": None,
            "prompt_3": None,
            "do_classifier_free_guidance": False,
            "max_sequence_length": max_length,
        }
        self._fixed_arguments = {name: value for name, value in fixed.items() if name in parameters}
        self._cache, self._text_lora_key = TensorLRUCache(MAX_CACHE_BYTES), text_lora_key

    def encode(self, texts: Sequence[str], negatives: Sequence[str] | None, _chunks: int) -> dict[str, Any]:
        """Return the same as ``ChunkedText.encode``, whatever the chunks; known texts come from the cache."""
        import torch

        with torch.no_grad():
            embeds, pooled = self._embed(texts)
            arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if negatives is not None:
                embeds, pooled = self._embed(negatives)
                arguments |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return arguments

    def _embed(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """Return embeddings (n, tokens, d) and pooled ones (n, p)."""
        import torch

        text_lora_key = self._text_lora_key()
        rows = [self._cache.get((text_lora_key, text), partial(self._encode, text)) for text in texts]
        return torch.cat([row for row, _ in rows]), torch.cat([pooled for _, pooled in rows])

    def _encode(self, text: str) -> tuple[Any, Any]:
        encoded = self._pipe.encode_prompt(prompt=text, **self._fixed_arguments)
        return encoded[0], encoded[self._pooled_index]


class WholeText:
    """Checks lengths for pipelines that truncate long prompts themselves (Stable Diffusion 3, Flux, …).

    ``limit``: the tokens that the encoder with the longest input can read.
    """

    def __init__(self, pipe: Any, max_length: int) -> None:
        components = sorted(pipe.components.items())
        tokenizers = [
            getattr(component, "tokenizer", component)  # of a processor of texts and images
            for name, component in components
            if name.startswith("tokenizer") and component is not None
        ]
        limits = [
            (max_length if _reads_max_length(tokenizer) else int(tokenizer.model_max_length), tokenizer)
            for tokenizer in tokenizers
        ]
        self.limit, longest_tokenizer = max(limits, key=lambda pair: pair[0], default=(max_length, None))
        self._tokenizer = copy.deepcopy(longest_tokenizer)
        self._lock = threading.Lock()

    def truncated(self, text: str) -> bool:
        """Return True if no encoder reads the whole text."""
        if self._tokenizer is None:
            return False
        with self._lock:
            ids = self._tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return len(ids) > self.limit


def _reads_max_length(tokenizer: Any) -> bool:
    """Return True if the pipeline sets the length to read; CLIP's window is fixed."""
    return not type(tokenizer).__name__.startswith("CLIP")
