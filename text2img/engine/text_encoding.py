"""What was worked out once and is wanted again: tensors by key, within a bound of bytes.

Knows nothing of texts: whoever asks says what the key is and how to make what it stands for.
"""

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
    """Tuples of tensors (or None), of which the least recently used go beyond ``room`` bytes in all.

    Used from one thread at a time; nobody may change the tensors.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._known: OrderedDict[Hashable, Tensors] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What is known by ``key``, else what ``make`` gives."""
        if key not in self._known:
            made = self._known[key] = make()
            self._bytes += _size(made)
        self._known.move_to_end(key)
        found = self._known[key]
        while self._bytes > self._room:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)
        return found


def _size(tensors: Tensors) -> int:
    return sum(one.nbytes for one in tensors if one is not None)


Window = tuple[int, ...]

ROOM: Final = 128 * 2**20
"""Bytes of embeddings kept on the device: 500 texts of XL's in fp32, 15 of Flux's."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One CLIP tokenizer with its text encoder. ``length``: the tokens of a window, 77 with CLIP."""

    tokenizer: Any
    encoder: Any
    length: int

    @classmethod
    def of(cls, tokenizer: Any, encoder: Any) -> TextEncoder:
        """A reader with a tokenizer of its own, whose state nobody else changes."""
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        return cls(copy.deepcopy(tokenizer), encoder, int(length))

    def windows(self, text: str) -> list[Window]:
        """The text as windows of ``length`` token ids; at least one, the last one padded."""
        ids = tokens(self.tokenizer, text)
        inside = self.length - 2
        return [self.window(ids[start : start + inside]) for start in range(0, max(len(ids), 1), inside)]

    def window(self, ids: Sequence[int]) -> Window:
        """Beginning, ids, end, and padding up to ``length``."""
        marks = (self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id)
        return marks + (self.tokenizer.pad_token_id,) * (self.length - len(marks))


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The text's token ids without marks, however many; no warning for many."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


class ChunkedText:
    """Reads prompts for Stable Diffusion 1, 2 and XL. ``count`` may be called from any thread.

    ``voice``: what decides, beside a text, how the encoders read it at the moment.
    """

    def __init__(self, pipe: Any, text_lora_key: Callable[[], Hashable] = tuple) -> None:
        second = getattr(pipe, "text_encoder_2", None)
        self._readers = [TextEncoder.of(pipe.tokenizer, pipe.text_encoder)]
        if second is not None:
            self._readers.append(TextEncoder.of(pipe.tokenizer_2, second))
        self._pooled = second is not None
        self._zeros = bool(pipe.config.get("force_zeros_for_empty_prompt")) and self._pooled
        self._lock = threading.Lock()
        self._known, self._voice = TensorLRUCache(ROOM), text_lora_key

    def count(self, *texts: str) -> int:
        """The most windows that one of the texts fills."""
        return max(len(windows) for text in texts for windows in self._windows(text))

    def encode(self, texts: Sequence[str], negatives: Sequence[str] | None, chunks: int) -> dict[str, Any]:
        """The keyword arguments that stand for the texts in a pipeline's call.

        ``prompt_embeds`` is (n, length·chunks, d), XL's ``pooled_prompt_embeds`` (n, p) is that of the first
        window; ``negatives`` None leaves out the negative ones, for a call without guidance. Each window
        goes through the encoder alone, so that a text's embeddings do not depend on its neighbours and are,
        bit by bit, those of the pipeline's own ``encode_prompt`` where the text fits into one window. A
        window that was read before, such as a negative prompt's, is not read again.
        """
        import torch

        with torch.no_grad():
            embeds, pooled = self._read(texts, chunks)
            arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if negatives is not None:
                embeds, pooled = self._read(negatives, chunks)
                if self._zeros:
                    empty = torch.tensor([not text for text in negatives], device=embeds.device)
                    embeds, pooled = _zeroed(embeds, empty), _zeroed(pooled, empty)
                arguments |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return {key: value for key, value in arguments.items() if value is not None}

    def _read(self, texts: Sequence[str], chunks: int) -> tuple[Any, Any]:
        """Embeddings (n, length·chunks, d) and pooled ones (n, p) or None."""
        import torch

        rows, pooled = [], []
        for text in texts:
            columns = []
            for number, windows in enumerate(self._windows(text)):
                reader = self._readers[number]
                padded = windows + [reader.window(())] * (chunks - len(windows))
                states = [self._encoded(number, window) for window in padded]
                columns.append(torch.cat([hidden for hidden, _ in states], dim=1))
                last = states[0][1]
            rows.append(torch.cat(columns, dim=-1))
            pooled.append(last)
        return torch.cat(rows), torch.cat(pooled) if self._pooled else None

    def _encoded(self, number: int, window: Window) -> tuple[Any, ...]:
        """What the reader of that number makes of a window; see ``_encode``."""
        reader = self._readers[number]
        key = self._voice(), number, window
        return self._known.get(key, lambda: _encode(reader, window, penultimate=self._pooled))

    def _windows(self, text: str) -> list[list[Window]]:
        with self._lock:
            return [reader.windows(text) for reader in self._readers]


def _encode(reader: TextEncoder, window: Window, *, penultimate: bool) -> tuple[Any, Any]:
    """A window's hidden states (1, length, d), XL's from the layer before the last, and what it pools."""
    import torch

    device = running_device(reader.encoder)
    ids = torch.tensor([window], device=device)
    if penultimate:
        output = reader.encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]
    return reader.encoder(ids, attention_mask=_mask(reader, window, device))[0], None


def _mask(reader: TextEncoder, window: Window, device: Any) -> Any:
    """Ones for what is read, where the encoder was trained to be told (few were): up to the first end."""
    import torch

    if not getattr(reader.encoder.config, "use_attention_mask", False):
        return None
    read = window.index(reader.tokenizer.eos_token_id) + 1
    return torch.tensor([[1] * read + [0] * (len(window) - read)], device=device)


def _zeroed(values: Any, empty: Any) -> Any:
    """The values, zero in the rows that ``empty`` (n) marks: what XL was trained to see for no prompt."""
    return values.masked_fill(empty.view(-1, *([1] * (values.ndim - 1))), 0)


class PipelineText:
    """Reads prompts by the pipeline's own ``encode_prompt``, text by text, for Stable Diffusion 3 and Flux.

    ``longest``: the tokens that the encoder which reads the most is told to read; ``voice`` as ChunkedText's.
    """

    FAMILIES: ClassVar = {"sd3": 2, "flux": 1}
    """Where among what ``encode_prompt`` returns the pooled text is; the embeddings come first."""

    def __init__(
        self, pipe: Any, family: Family, longest: int, text_lora_key: Callable[[], Hashable] = tuple
    ) -> None:
        self._pipe = pipe
        self._pooled = self.FAMILIES[family.name]
        takes = inspect.signature(pipe.encode_prompt).parameters
        fixed = {
            "prompt_2": None,
            "prompt_3": None,
            "do_classifier_free_guidance": False,
            "max_sequence_length": longest,
        }
        self._fixed = {name: value for name, value in fixed.items() if name in takes}
        self._known, self._voice = TensorLRUCache(ROOM), text_lora_key

    def encode(self, texts: Sequence[str], negatives: Sequence[str] | None, _chunks: int) -> dict[str, Any]:
        """As ``ChunkedText.encode``, whatever the chunks; a text that was read before is not read again."""
        import torch

        with torch.no_grad():
            embeds, pooled = self._read(texts)
            arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if negatives is not None:
                embeds, pooled = self._read(negatives)
                arguments |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return arguments

    def _read(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """Embeddings (n, tokens, d) and pooled ones (n, p)."""
        import torch

        text_lora_key = self._voice()
        rows = [self._known.get((text_lora_key, text), partial(self._encode, text)) for text in texts]
        return torch.cat([row for row, _ in rows]), torch.cat([pooled for _, pooled in rows])

    def _encode(self, text: str) -> tuple[Any, Any]:
        read = self._pipe.encode_prompt(prompt=text, **self._fixed)
        return read[0], read[self._pooled]


class WholeText:
    """For pipelines that read prompts themselves and cut what is too long (Stable Diffusion 3, Flux, …).

    ``limit``: the tokens that the encoder which reads the most can read.
    """

    def __init__(self, pipe: Any, longest: int) -> None:
        known = [part for name, part in sorted(pipe.components.items()) if name.startswith("tokenizer")]
        limits = [(longest if _is_long(one) else int(one.model_max_length), one) for one in known if one]
        self.limit, best = max(limits, key=lambda pair: pair[0], default=(longest, None))
        self._tokenizer = copy.deepcopy(best)
        self._lock = threading.Lock()

    def truncated(self, text: str) -> bool:
        """Whether no encoder reads the whole text."""
        if self._tokenizer is None:
            return False
        with self._lock:
            read = self._tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return len(read) > self.limit


def _is_long(tokenizer: Any) -> bool:
    """Whether how much is read is for the pipeline to say, rather than CLIP's fixed window."""
    return not type(tokenizer).__name__.startswith("CLIP")
