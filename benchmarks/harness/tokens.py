"""CLIP's tokens where its tokenizer's package is missing: those of the benchmarks' own texts, stored."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from harness.captions import CAPTIONS, TOKENS
from segclip_fast.data import pipeline

START, END = 49406, 49407
# The words of which `data.mixture.Synthetic` makes captions; each is one token.
WORDS = {
    **{"red": 736, "old": 896, "small": 2442, "dog": 1929, "street": 2012, "boat": 4440, "tree": 2677},
    **{"house": 1212, "child": 2913, "table": 2175, "river": 2473, "sky": 2390},
}


class StoredTokenizer:
    """Knows CAPTIONS and texts of WORDS, and gives the ids that CLIP's tokenizer gives for them."""

    def __init__(self) -> None:
        self.known = dict(zip(CAPTIONS, TOKENS, strict=True))

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """(B, `length`) int64 ids, 32 of them by default; raises ValueError for another text."""
        table = torch.zeros(len(texts), length or 32, dtype=torch.int64)
        for row, text in zip(table, texts, strict=True):
            ids = self._ids(text)
            row[: len(ids)] = torch.tensor(ids)
        return table

    def _ids(self, text: str) -> tuple[int, ...]:
        if text in self.known:
            return self.known[text]
        unknown = [word for word in text.split() if word not in WORDS]
        if unknown:
            raise ValueError(f"texts: expected captions whose tokens are stored, got {text!r}")
        return START, *(WORDS[word] for word in text.split()), END


@contextlib.contextmanager
def tokenizer_at_hand() -> Iterator[str]:
    """Inside, the training pipeline takes CLIP's tokenizer, or the stored tokens without its package.

    Yields:
        "open_clip" or "stored".
    """
    if importlib.util.find_spec("open_clip") is not None:
        yield "open_clip"
        return
    before = pipeline.tokenizer_for
    pipeline.tokenizer_for = lambda config: StoredTokenizer()
    try:
        yield "stored"
    finally:
        pipeline.tokenizer_for = before
