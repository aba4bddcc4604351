"""A CLIP tokenizer whose merges make each word of the demo's captions one token.

Any other text still tokenises, byte by byte, as with the real CLIP's.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from text2img.demo.scenes import all_scenes

Pair = tuple[str, str]

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # as with the real CLIP


def build_tokenizer() -> CLIPTokenizer:
    """The demo model's tokenizer: 256 bytes, each inside or at the end of a word, the merges, two marks."""
    words = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    merges = learn_merges(words)
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(letter + END_OF_WORD for letter in letters)]
    entries += [left + right for left, right in merges]
    entries += [START, END]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def learn_merges(words: list[str]) -> list[Pair]:
    """Byte-pair merges, in the order they are to be applied, after which each word is one token."""
    spelled = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges: list[Pair] = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # the pair itself breaks ties, always alike
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def _merged(word: list[str], pair: Pair) -> list[str]:
    """The word with each occurrence of the pair made one piece."""
    pieces: list[str] = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces
