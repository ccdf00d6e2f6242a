"""Text to token ids: CLIP's byte-pair encoding (from open_clip), or the words of a closed vocabulary."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..config import TextConfig


class Tokenizer(Protocol):
    """Callable from texts to ids; the end token is the largest id, 0 pads."""

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """(B, T) int64 ids; T = `length` or the context length."""
        ...


def tokenizer_for(config: TextConfig) -> Tokenizer:
    """The tokenizer of a text tower: words if it has a closed vocabulary, else CLIP's."""
    if config.vocabulary:
        return _words(config.vocabulary, config.context_length)
    return _clip(config.context_length)


class WordTokenizer:
    """One id per word of a closed vocabulary: 0 pads, 1 to V the words, then start and end."""

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        self.ids = {word: index + 1 for index, word in enumerate(vocabulary)}
        self.start, self.end = len(vocabulary) + 1, len(vocabulary) + 2
        self.context_length = context_length

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """(B, T) int64 ids.

        Raises:
            ValueError: a word outside the vocabulary.
        """
        words = [re.findall(r"[^\W_]+", text.lower()) for text in texts]
        unknown = sorted({word for text in words for word in text} - set(self.ids))
        if unknown:
            raise ValueError(
                f"texts: expected words of the model's vocabulary "
                f"({len(self.ids)} words), got unknown {unknown}"
            )
        encoded = [[self.ids[word] for word in text] for text in words]
        return _pack(encoded, self.start, self.end, length or self.context_length)


class CLIPTokenizer:
    """CLIP's byte-pair encoding, lower-cased and cleaned as in the release; open_clip has its merge table."""

    def __init__(self, context_length: int) -> None:
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ImportError as error:
            raise ImportError(
                "CLIP's tokenizer needs the package open_clip_torch: pip install open_clip_torch"
            ) from error
        self.bpe = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """(B, T) int64 ids, 49406 starts, 49407 ends."""
        encoded = [self.bpe.encode(text) for text in texts]
        return _pack(encoded, self.bpe.sot_token_id, self.bpe.eot_token_id, length or self.context_length)


def _pack(encoded: Sequence[Sequence[int]], start: int, end: int, length: int) -> Tensor:
    """[start] ids [end], cut to `length` with the end token kept, zero-padded."""
    tokens = torch.zeros(len(encoded), length, dtype=torch.int64)
    for row, ids in zip(tokens, encoded, strict=True):
        sequence = [start, *ids[: length - 2], end]
        row[: len(sequence)] = torch.tensor(sequence)
    return tokens


@functools.lru_cache(maxsize=8)
def _words(vocabulary: tuple[str, ...], context_length: int) -> WordTokenizer:
    return WordTokenizer(vocabulary, context_length)


@functools.lru_cache(maxsize=8)
def _clip(context_length: int) -> CLIPTokenizer:
    return CLIPTokenizer(context_length)
