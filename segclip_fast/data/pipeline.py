"""From image-text pairs to training batches; every sample is a function of (seed, position) alone.

That makes a run resumable at any step, whatever the number of loader workers: batch s holds the positions
s B to (s + 1) B - 1, and position p shows the source's sample number order(p // len)[p % len].
Shapes: B batch, S image side in pixels, T tokens, h = w = S / patch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig, SegCLIPConfig
from ..ops import felzenszwalb, patch_labels
from .sample import ImageTextSource, RawSample
from .tokenizer import tokenizer_for
from .transforms import crop_box, normalise, resized_crop


@dataclass(frozen=True)
class Sample:
    """One prepared training pair.

    Attributes:
        image: (3, S, S) float32, normalised.
        tokens: (T,) int64.
        superpixels: (h, w) int64 patch labels.
        content: concepts known to be in the image.
        mentioned: concepts that the caption names.
        caption: the text.
    """

    image: Tensor
    tokens: Tensor
    superpixels: Tensor
    content: frozenset[str]
    mentioned: frozenset[str]
    caption: str


@dataclass(frozen=True)
class Batch:
    """B prepared pairs.

    Attributes:
        images: (B, 3, S, S) float32, normalised.
        tokens: (B, T) int64.
        superpixels: (B, h, w) int64 patch labels.
        holds: (B, B) bool, caption j is known to hold for image i.
    """

    images: Tensor
    tokens: Tensor
    superpixels: Tensor
    holds: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the tokens stay on the host, where the model packs them."""
        return Batch(
            **{
                name: value if name == "tokens" else value.to(device, non_blocking=True)
                for name, value in vars(self).items()
            }
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the loader)."""
        return Batch(*(value.pin_memory() for value in vars(self).values()))


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
    raise ValueError(f"data.source: expected scenes or stamps, got {config.source!r}")


class PairDataset(Dataset[Sample]):
    """Prepared samples by position in the endless stream of epochs."""

    def __init__(self, source: ImageTextSource, data: DataConfig, model: SegCLIPConfig, seed: int) -> None:
        self.source, self.data, self.model, self.seed = source, data, model, seed
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
        """Crop, superpixels on the crop, patch labels, tokens."""
        vision, data = self.model.vision, self.data
        height, width = raw.image.shape[:2]
        box = (0, 0, height, width)
        if data.crop_area != (1, 1):
            box = crop_box(height, width, data.crop_area, random.Random(f"{self.seed}-{position}"))
        crop = resized_crop(raw.image, box, vision.image_size)
        segments = felzenszwalb(
            crop,
            scale=data.superpixel_scale,
            sigma=data.superpixel_sigma,
            min_size=data.superpixel_min_size,
            threads=1,
        )
        labels = patch_labels(torch.from_numpy(segments)[None], vision.patch_size, how=data.patch_label)[0]
        return Sample(
            normalise(crop),
            self.tokenize([raw.caption], self.tokens)[0],
            labels,
            frozenset(raw.content),
            frozenset(raw.mentioned),
            raw.caption,
        )


def collate(samples: list[Sample]) -> Batch:
    """Stack samples and find which captions also hold for which images."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.stack([sample.tokens for sample in samples]),
        torch.stack([sample.superpixels for sample in samples]),
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
) -> Iterator[Batch]:
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
