"""Several sources as one, and a source that costs nothing.

Everything is a function of (seed, epoch, position), found without tables, whatever the length.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .._checks import require
from .sample import ImageTextSource, RawSample
from .shard_index import checked_index

_MASK = 2**64 - 1
_ROUNDS = 6
_WORDS = ("red", "old", "small", "dog", "street", "boat", "tree", "house", "child", "table", "river", "sky")


def mix(*values: int) -> int:
    """64 well mixed bits of some non-negative integers (splitmix64's finalizer after each)."""
    state = 0
    for value in values:
        state = (state ^ value) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


class Permutation:
    """A pseudo-random order of 0 to length - 1 in constant memory: permutation(i) takes every value once.

    A Feistel network permutes the numbers of 2 h bits, the fewest that hold the length; a result that is too
    large is put in again until one fits, which at most four tries do on average.

    Args:
        length: at least 1.
        key: of the order.
    """

    def __init__(self, length: int, key: int) -> None:
        require(length >= 1, "length", "at least 1", length)
        self.length, self.key = length, key
        self._half = max(1, ((length - 1).bit_length() + 1) // 2)

    def __call__(self, index: int) -> int:
        """The value at `index`, which must be 0 to length - 1."""
        half, low = self._half, (1 << self._half) - 1
        while True:
            left, right = index >> half, index & low
            for number in range(_ROUNDS):
                left, right = right, left ^ mix(self.key, number, right) & low
            index = left << half | right
            if index < self.length:
                return index


class Mixture:
    """A weighted mix of sources (an ImageTextSource).

    Of `length` samples each source gives its share, exact up to rounding, and spread evenly: the stretches
    that repeated halving leads to have each source's share of them to within two samples. Walking through
    positions 0 to `length` - 1, a source repeats nothing before all of it was shown, then goes on in another
    order; `at_epoch` continues where the epoch before stopped.

    Masks are left out unless all sources have the same classes.

    Args:
        sources: pairs (source, weight); weights are positive and need not sum to 1.
        length: samples per epoch.
        seed: non-negative.
        epoch: which epoch's samples; non-negative.

    Attributes:
        counts: how many of the samples come from each source.

    Raises:
        ValueError: no sources, an empty source, or an unusable weight, length, seed or epoch.
    """

    def __init__(
        self, sources: Sequence[tuple[ImageTextSource, float]], length: int, seed: int = 0, epoch: int = 0
    ) -> None:
        require(len(sources) > 0, "sources", "at least one", sources)
        require(length >= 1, "length", "at least 1", length)
        require(seed >= 0, "seed", "a non-negative number", seed)
        require(epoch >= 0, "epoch", "a non-negative number", epoch)
        for number, (source, weight) in enumerate(sources):
            good = math.isfinite(weight) and weight > 0
            require(good, f"sources[{number}]", "a finite positive weight", weight)
            require(len(source) > 0, f"sources[{number}]", "at least one sample", len(source))
        self.sources = tuple(source for source, _ in sources)
        self.length, self.seed, self.epoch = length, seed, epoch
        self.counts = _shares([weight for _, weight in sources], length)
        names = {tuple(source.class_names) for source in self.sources}
        self.class_names: Sequence[str] = names.pop() if len(names) == 1 else ()

    def at_epoch(self, epoch: int) -> Mixture:
        """The same mixture with the samples of another epoch; shares the sources."""
        require(epoch >= 0, "epoch", "a non-negative number", epoch)
        other = copy.copy(self)
        other.epoch = epoch
        return other

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RawSample:
        """Sample number `index`; raises IndexError if there is none, and whatever its source raises."""
        source, within = self.locate(index)
        sample = self.sources[source][within]
        return sample if self.class_names else dataclasses.replace(sample, mask=None)

    def locate(self, index: int) -> tuple[int, int]:
        """Which source sample number `index` comes from, and its index there."""
        source, before = self._draw(checked_index(index, self.length))
        length = len(self.sources[source])
        turn, offset = divmod(self.epoch * self.counts[source] + before, length)
        return source, Permutation(length, mix(self.seed, 1, source, turn))(offset)

    def _draw(self, index: int) -> tuple[int, int]:
        """The source of a position, and how many positions before it have the same source.

        Halves the stretch of positions until only `index` is left. The first half gets each source's share
        rounded down or up: up with the probability of the remainder, by systematic sampling.
        """
        counts, before = list(self.counts), [0] * len(self.counts)
        start, size = 0, self.length
        while size > 1:
            half = size // 2
            total = mix(self.seed, 2, self.epoch, start, size) % size
            first = []
            for count in counts:
                whole, remainder = divmod(count * half, size)
                up = (total + remainder) // size - total // size
                total += remainder
                first.append(whole + up)
            if index < start + half:
                counts, size = first, half
            else:
                before = [old + new for old, new in zip(before, first, strict=True)]
                counts = [count - new for count, new in zip(counts, first, strict=True)]
                start, size = start + half, size - half
        source = counts.index(1)
        return source, before[source]


class Synthetic:
    """Random pictures and captions from memory, to time a training step without reading (an ImageTextSource).

    Pictures are smooth colours with some noise, so that superpixels find segments in them.

    Args:
        length: samples per epoch.
        size: side of the square pictures in pixels.
        captions: what to draw from; empty makes captions of 4 to 12 words.
        seed: non-negative.
        pool: how many different pictures are made and kept, 3 `size`^2 bytes each.

    Raises:
        ValueError: a length, size, seed or pool out of range, or an empty caption.
    """

    class_names: Sequence[str] = ()

    def __init__(
        self, length: int, size: int, captions: Sequence[str] = (), *, seed: int = 0, pool: int = 64
    ) -> None:
        for name, value in (("length", length), ("size", size), ("pool", pool)):
            require(value >= 1, name, "at least 1", value)
        require(seed >= 0, "seed", "a non-negative number", seed)
        good = not isinstance(captions, str) and all(text.strip() for text in captions)
        require(good, "captions", "a sequence of non-empty strings", captions)
        self.length, self.seed, self.captions = length, seed, tuple(captions)
        rng = np.random.default_rng(seed)
        self._pictures = np.stack([_picture(rng, size) for _ in range(pool)])  # (pool, size, size, 3)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RawSample:
        """Sample number `index`; raises IndexError if there is none."""
        index = checked_index(index, self.length)
        drawn = mix(self.seed, 3, index)
        image = self._pictures[drawn % len(self._pictures)].copy()
        if self.captions:
            return RawSample(image, self.captions[mix(drawn) % len(self.captions)])
        words = [_WORDS[mix(drawn, word) % len(_WORDS)] for word in range(4 + mix(drawn) % 9)]
        return RawSample(image, " ".join(words))


def _picture(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    from .images import resize_bilinear_uint8

    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    noise = rng.integers(-8, 9, (size, size, 3), dtype=np.int16)
    return np.clip(resize_bilinear_uint8(coarse, (size, size)) + noise, 0, 255).astype(np.uint8)


def _shares(weights: Sequence[float], length: int) -> list[int]:
    """`length` in proportion to the weights: rounded down, what is left goes to the largest remainders."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    parts = [weight * length / total for weight in exact]
    counts = [math.floor(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda number: counts[number] - parts[number])
    for number in order[: length - sum(counts)]:
        counts[number] += 1
    return counts
