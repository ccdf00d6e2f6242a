"""From image-text pairs to training batches; every sample is a function of (seed, position) alone.

That makes a run resumable at any step, whatever the number of loader workers and processes: positions count
the samples of the endless stream of epochs, and position p shows the source's sample number order(p //
len)[p % len]. Workers deliver 8-bit pixels; the training device normalises them, and there the superpixels
may be computed too (`training/prefetch.py`).
Shapes: B pairs of a process and step, S image side in pixels, T tokens, h = w = S / patch.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig, SegCLIPConfig
from .mixture import Mixture, Permutation, mix
from .opening import sample_name
from .pseudo_labels import PatchLabels
from .sample import ImageTextSource, RawSample, SampleError
from .tokenizer import tokenizer_for
from .transforms import crop_box, resized_crop

STAGES = ("read", "crop", "superpixels", "tokens")
_NO_SECONDS = (0.0,) * len(STAGES)
RETRIES = 50  # damaged samples in a row, as in the release
_LARGE = 1 << 20  # samples, from which on a table of the order would weigh on every worker


class Facts(NamedTuple):
    """What is known of a pair: concepts in the image, concepts that the caption names, the caption."""

    content: frozenset[str]
    mentioned: frozenset[str]
    caption: str


class Damage(NamedTuple):
    """A sample that cannot be used: its name, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One prepared training pair.

    Attributes:
        pixels: (3, S, S) uint8, the training crop.
        tokens: (T,) int64.
        superpixels: (h, w) int64 patch labels, or None where the training device makes them.
        facts: what is known of it.
        damaged: samples that were to stand here and cannot be used.
        seconds: time spent on each of STAGES.
    """

    pixels: Tensor
    tokens: Tensor
    superpixels: Tensor | None
    facts: Facts
    damaged: tuple[Damage, ...] = ()
    seconds: tuple[float, ...] = _NO_SECONDS


@dataclass(frozen=True)
class LoadedBatch:
    """B prepared pairs as the loader delivers them, in host memory.

    Attributes:
        pixels: (B, 3, S, S) uint8.
        tokens: (B, T) int64.
        superpixels: (B, h, w) int64 patch labels, or None where the training device makes them.
        facts: what is known of each pair.
        damaged: samples that others stand in for.
        seconds: a worker's time for the batch by STAGES.
    """

    pixels: Tensor
    tokens: Tensor
    superpixels: Tensor | None
    facts: tuple[Facts, ...]
    damaged: tuple[Damage, ...]
    seconds: tuple[float, ...]

    def pin_memory(self) -> LoadedBatch:
        """The same batch in page-locked memory (called by the loader)."""
        superpixels = None if self.superpixels is None else self.superpixels.pin_memory()
        pixels, tokens = self.pixels.pin_memory(), self.tokens.pin_memory()
        return LoadedBatch(pixels, tokens, superpixels, self.facts, self.damaged, self.seconds)


class PairDataset(Dataset[Sample]):
    """Prepared samples by position in the endless stream of epochs.

    A sample that cannot be used is replaced by the next one that can.

    Args:
        source: the pairs.
        data: how they are prepared.
        model: sizes of pictures, patches and captions.
        seed: of order, crops and the choice among several captions.
        superpixels: make the patch labels here; False leaves them to the training device.
    """

    def __init__(
        self,
        source: ImageTextSource,
        data: DataConfig,
        model: SegCLIPConfig,
        seed: int,
        superpixels: bool = True,
    ) -> None:
        self.source, self.data, self.model, self.seed = source, data, model, seed
        self.labels = PatchLabels(data.superpixels, model.vision.patch_size) if superpixels else None
        self.tokenize = tokenizer_for(model.text)
        # The paper's runs read captions of 32 tokens, evaluation 77.
        self.tokens = min(model.text.context_length, 32)
        self._epoch, self._order = -1, _Order(source, seed, 0)
        self._cache: dict[int, Sample] = {}

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position`.

        Raises:
            ValueError: too many samples in a row cannot be used; names one.
            OSError, RuntimeError: the source itself fails.
        """
        order, offset = self._locate(position)
        damaged: list[Damage] = []
        for attempt in range(RETRIES + 1):
            index = order.index((offset + attempt) % len(self.source))
            if index in self._cache:
                return self._cache[index]
            try:
                sample = self._prepare_at(order, index, position, tuple(damaged))
            except SampleError as error:
                damaged.append(Damage(error.key, error.reason))
                continue
            if self.data.cache:  # what comes from here costs nothing and replaces nothing
                self._cache[index] = dataclasses.replace(sample, damaged=(), seconds=_NO_SECONDS)
            return sample
        last = damaged[-1]
        got = f"none, the last of them {last.key}: {last.reason}"
        raise ValueError(f"data.train_data: expected a usable sample among {len(damaged)}, got {got}")

    def name(self, position: int) -> str:
        """Where the sample at `position` comes from (or the damaged one that another stands in for)."""
        order, offset = self._locate(position)
        return sample_name(order.source, order.index(offset))

    def prepare(self, raw: RawSample, position: int) -> Sample:
        """Random crop, patch labels from the pseudo-labels, one caption as tokens."""
        started = time.perf_counter()
        rng = random.Random(f"{self.seed}-{position}")
        height, width = raw.image.shape[:2]
        box = (0, 0, height, width)
        if self.data.crop_area != (1, 1):
            box = crop_box(height, width, self.data.crop_area, rng)
        crop = resized_crop(raw.image, box, self.model.vision.image_size)  # (S, S, 3)
        pixels = torch.from_numpy(np.array(crop.transpose(2, 0, 1), order="C"))
        cropped = time.perf_counter()
        labels = self.labels.of_crop(raw, box, crop) if self.labels else None
        segmented = time.perf_counter()
        caption = rng.choice(raw.captions) if raw.captions else raw.caption
        tokens = self.tokenize([caption], self.tokens)[0]
        spent = (0.0, cropped - started, segmented - cropped, time.perf_counter() - segmented)
        facts = Facts(frozenset(raw.content), frozenset(raw.mentioned), caption)
        return Sample(pixels, tokens, labels, facts, seconds=spent)

    def _locate(self, position: int) -> tuple[_Order, int]:
        epoch, offset = divmod(position, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _Order(self.source, self.seed, epoch)
        return self._order, offset

    def _prepare_at(self, order: _Order, index: int, position: int, damaged: tuple[Damage, ...]) -> Sample:
        started = time.perf_counter()
        raw = order.source[index]
        read = time.perf_counter() - started
        sample = self.prepare(raw, position)
        return dataclasses.replace(sample, damaged=damaged, seconds=(read, *sample.seconds[1:]))


class _Order:
    """The order of one epoch. A mixture brings its own."""

    def __init__(self, source: ImageTextSource, seed: int, epoch: int) -> None:
        self.source = source.at_epoch(epoch) if isinstance(source, Mixture) else source
        self._at: np.ndarray | Permutation | None = None
        if isinstance(source, Mixture):
            return
        if len(source) >= _LARGE:
            self._at = Permutation(len(source), mix(seed, epoch))
        else:
            self._at = np.random.default_rng([seed, epoch]).permutation(len(source))

    def index(self, offset: int) -> int:
        """The sample at an offset from the epoch's beginning."""
        if self._at is None:
            return offset
        return self._at(offset) if isinstance(self._at, Permutation) else int(self._at[offset])


def collate(samples: list[Sample]) -> LoadedBatch:
    """Stack samples."""
    labels = [sample.superpixels for sample in samples if sample.superpixels is not None]
    return LoadedBatch(
        torch.stack([sample.pixels for sample in samples]),
        torch.stack([sample.tokens for sample in samples]),
        torch.stack(labels) if labels else None,
        tuple(sample.facts for sample in samples),
        tuple(damage for sample in samples for damage in sample.damaged),
        tuple(sum(spent) for spent in zip(*(sample.seconds for sample in samples), strict=True)),
    )


def caption_holds(images: Sequence[Facts], captions: Sequence[Facts]) -> Tensor:
    """Which captions are known to hold for which images.

    Args:
        images: B pairs.
        captions: C pairs.

    Returns:
        (B, C) bool: caption j equals that of image i, or names only concepts that image i is known to
        contain.
    """
    names = sorted({name for pair in (*images, *captions) for name in pair.content | pair.mentioned})
    column = {name: index for index, name in enumerate(names)}
    content = np.zeros((len(images), len(names)), dtype=np.int32)
    mentioned = np.zeros((len(captions), len(names)), dtype=np.int32)
    for row, pair in enumerate(images):
        content[row, [column[name] for name in pair.content]] = 1
    for row, pair in enumerate(captions):
        mentioned[row, [column[name] for name in pair.mentioned]] = 1
    numbers: dict[str, int] = {}
    own, texts = (
        np.array([numbers.setdefault(pair.caption, len(numbers)) for pair in pairs], dtype=np.int64)
        for pairs in (images, captions)
    )
    named = mentioned.sum(axis=1)
    contained = (content @ mentioned.T == named) & (named > 0)
    return torch.from_numpy(contained | (texts == own[:, None]))


class Positions:
    """The positions that a process takes: of every step's share a block of its own (a sampler).

    Args:
        first: position of the first step.
        steps: number of steps.
        share: samples of one process and step.
        rank: number of the process.
        world: number of processes.
    """

    def __init__(self, first: int, steps: int, share: int, rank: int = 0, world: int = 1) -> None:
        self.first, self.steps, self.share, self.rank, self.world = first, steps, share, rank, world

    def __len__(self) -> int:
        return self.steps * self.share

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            yield from self.of(step)

    def of(self, step: int) -> range:
        """The positions of a step, counted from 0."""
        start = self.first + (step * self.world + self.rank) * self.share
        return range(start, start + self.share)


def batches(dataset: PairDataset, positions: Positions, pin: bool = False) -> Iterator[LoadedBatch]:
    """One batch of `positions.share` samples per step, prepared by the configured number of workers."""
    workers = dataset.data.workers
    loader = DataLoader(
        dataset,
        batch_size=positions.share,
        sampler=positions,
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
    )
    return _told_plainly(iter(loader))


def _told_plainly(loaded: Iterator[LoadedBatch]) -> Iterator[LoadedBatch]:
    """The batches; an error of a worker has its own message, as without workers, not a whole traceback."""
    try:
        yield from loaded
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):  # how PyTorch begins the tale of a worker's error
            raise
        text = str(error).strip().splitlines()[-1].partition(": ")[2]
        # PyTorch's frames hold the error that holds them: left to the garbage collector, the loader would
        # wait five seconds for each of its workers.
        error.__traceback__ = None
        raise type(error)(text or str(error)) from error
