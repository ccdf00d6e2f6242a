"""What a data source yields: one image, its caption, and what is known about both; or why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE_LABEL = 255


class SampleError(ValueError):
    """One sample cannot be used, its source can: a training loop may count it and go on.

    Attributes:
        key: which sample.
        reason: why.
    """

    # PyTorch rebuilds an exception of a loader worker from one string, hence the default.
    def __init__(self, key: str, reason: str = "") -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.reason else self.key


@dataclass(frozen=True)
class RawSample:
    """One image-text pair as stored or generated, before any augmentation.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        caption: the text that goes with the image.
        mask: (H, W) int64 ground truth, an index into the source's `class_names` (255 = ignore), or None.
            Training never reads it; evaluation does.
        content: every concept known to be visible in the image (empty when unknown).
        mentioned: the concepts that the caption names (empty when unknown). A caption also holds for another
            image when all concepts it mentions are in that image's content.
        segments: (H, W) integers stored with the image, which pixels belong together (made elsewhere, without
            annotation), or None. The superpixel loss can take them in place of superpixels.
        captions: all captions where there are several; training draws one of them each time.
    """

    image: np.ndarray
    caption: str
    mask: np.ndarray | None = None
    content: tuple[str, ...] = ()
    mentioned: tuple[str, ...] = ()
    segments: np.ndarray | None = None
    captions: tuple[str, ...] = ()


class ImageTextSource(Protocol):
    """A finite, indexable source of image-text pairs; the same index always gives the same sample."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


class Segmenter(Protocol):
    """Cuts a picture into segments."""

    def __call__(self, picture: RawSample) -> np.ndarray:
        """(H, W) integers for `picture.image` (H, W, 3) uint8; equal numbers belong together."""
        ...
