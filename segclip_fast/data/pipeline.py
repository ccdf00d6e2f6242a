"""From image-text pairs to training batches; every sample is a function of (seed, position) alone.

That makes a run resumable at any step, whatever the number of loader workers: batch s holds the positions
s B to (s + 1) B - 1, and position p shows the source's sample number order(p // len)[p % len].
Workers deliver 8-bit pixels; the training device normalises them, and there the superpixels may be computed
too (`training/prefetch.py`).
Shapes: B batch, S image side in pixels, T tokens, h = w = S / patch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig, SegCLIPConfig
from .pseudo_labels import PatchLabels
from .sample import ImageTextSource, RawSample
from .tokenizer import tokenizer_for
from .transforms import crop_box, resized_crop


@dataclass(frozen=True)
class Sample:
    """One prepared training pair.

    Attributes:
        pixels: (3, S, S) uint8, the training crop.
        tokens: (T,) int64.
        superpixels: (h, w) int64 patch labels, or None where the training device makes them.
        content: concepts known to be in the image.
        mentioned: concepts that the caption names.
        caption: the text.
    """

    pixels: Tensor
    tokens: Tensor
    superpixels: Tensor | None
    content: frozenset[str]
    mentioned: frozenset[str]
    caption: str


@dataclass(frozen=True)
class LoadedBatch:
    """B prepared pairs as the loader delivers them, in host memory.

    Attributes:
        pixels: (B, 3, S, S) uint8.
        tokens: (B, T) int64.
        superpixels: (B, h, w) int64 patch labels, or None where the training device makes them.
        holds: (B, B) bool, caption j is known to hold for image i.
    """

    pixels: Tensor
    tokens: Tensor
    superpixels: Tensor | None
    holds: Tensor

    def pin_memory(self) -> LoadedBatch:
        """The same batch in page-locked memory (called by the loader)."""
        superpixels = None if self.superpixels is None else self.superpixels.pin_memory()
        return LoadedBatch(
            self.pixels.pin_memory(), self.tokens.pin_memory(), superpixels, self.holds.pin_memory()
        )


def make_source(config: DataConfig, model: SegCLIPConfig, split: str = "train") -> ImageTextSource:
    """The image-text source named by `config`, at the model's image size.

    Raises:
        ValueError: an unknown source, or a root that is missing where one is needed.
        FileNotFoundError: the root does not hold the source.
    """
    size = model.vision.image_size
    if config.source == "scenes":
        from .scenes import SceneSource

        return SceneSource(
            config.samples, seed=config.seed, size=size, split="val" if split != "train" else split
        )
    if config.source == "stamps":
        from .stamps import StampSource

        if not config.root:
            raise ValueError("data.root: expected the folder of the stamps, got ''")
        return StampSource(Path(config.root), config.samples, seed=config.seed, size=size, split=split)
    from .folder import FolderSource

    if not config.root:
        raise ValueError("data.root: expected the folder of the pictures, got ''")
    return FolderSource(Path(config.root), segments=config.superpixels.kind == "stored")


def make_held_out(config: DataConfig, model: SegCLIPConfig, samples: int) -> ImageTextSource | None:
    """The `samples` pictures that a run is evaluated on; None for a source without masks."""
    if config.source == "folder":
        return None
    return make_source(dataclasses.replace(config, samples=samples), model, "val")


class PairDataset(Dataset[Sample]):
    """Prepared samples by position in the endless stream of epochs.

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
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._cache: dict[int, Sample] = {}

    def __getitem__(self, position: int) -> Sample:
        epoch, offset = divmod(position, len(self.source))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
        index = int(self._order[offset])
        if not self.data.cache:
            return self.prepare(self.source[index], position)
        if index not in self._cache:
            self._cache[index] = self.prepare(self.source[index], position)
        return self._cache[index]

    def prepare(self, raw: RawSample, position: int) -> Sample:
        """Random crop, patch labels from the pseudo-labels, one caption as tokens."""
        rng = random.Random(f"{self.seed}-{position}")
        height, width = raw.image.shape[:2]
        box = (0, 0, height, width)
        if self.data.crop_area != (1, 1):
            box = crop_box(height, width, self.data.crop_area, rng)
        crop = resized_crop(raw.image, box, self.model.vision.image_size)  # (S, S, 3)
        caption = rng.choice(raw.captions) if raw.captions else raw.caption
        return Sample(
            torch.from_numpy(np.array(crop.transpose(2, 0, 1), order="C")),
            self.tokenize([caption], self.tokens)[0],
            self.labels.of_crop(raw, box, crop) if self.labels else None,
            frozenset(raw.content),
            frozenset(raw.mentioned),
            caption,
        )


def collate(samples: list[Sample]) -> LoadedBatch:
    """Stack samples and find which captions also hold for which images."""
    labels = [sample.superpixels for sample in samples if sample.superpixels is not None]
    return LoadedBatch(
        torch.stack([sample.pixels for sample in samples]),
        torch.stack([sample.tokens for sample in samples]),
        torch.stack(labels) if labels else None,
        caption_holds(samples),
    )


def caption_holds(samples: list[Sample]) -> Tensor:
    """(B, B) bool: caption j equals caption i, or names only concepts that image i is known to contain."""
    names = sorted({name for sample in samples for name in sample.content | sample.mentioned})
    column = {name: index for index, name in enumerate(names)}
    captions: dict[str, int] = {}
    content = np.zeros((len(samples), len(names)), dtype=np.int32)
    mentioned = np.zeros_like(content)
    texts = np.empty(len(samples), dtype=np.int64)
    for row, sample in enumerate(samples):
        content[row, [column[name] for name in sample.content]] = 1
        mentioned[row, [column[name] for name in sample.mentioned]] = 1
        texts[row] = captions.setdefault(sample.caption, len(captions))
    named = mentioned.sum(axis=1)
    contained = (content @ mentioned.T == named) & (named > 0)
    return torch.from_numpy(contained | (texts[:, None] == texts))


def batches(
    dataset: PairDataset, batch_size: int, start: int, stop: int, pin: bool = False
) -> Iterator[LoadedBatch]:
    """The batches of steps `start` to `stop` - 1, prepared by the configured number of workers."""
    workers = dataset.data.workers
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(start * batch_size, stop * batch_size),
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
    )
    return iter(loader)
