"""Pseudo-labels: which pixels of a picture belong together, without anybody's annotation (paper Eq. 5-6).

The paper takes Felzenszwalb's superpixels and names better pseudo-labels as future work. Whatever gives a
picture integer segments is a `Segmenter`; the superpixel loss then sees one label per patch.
Shapes: B batch, H W pixels, S side of the training crop, h = w = S / patch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from ..ops import felzenszwalb, patch_labels
from .sample import RawSample, Segmenter
from .settings import SuperpixelConfig
from .transforms import cut_segments


@dataclass(frozen=True)
class Felzenszwalb:
    """Graph-based superpixels, as in the paper; see `segclip_fast.ops.felzenszwalb` for the settings."""

    scale: float
    sigma: float
    min_size: int
    precision: str = "float64"

    def __call__(self, picture: RawSample) -> np.ndarray:
        """(H, W) int32 of one picture, on one thread."""
        image = np.require(picture.image, requirements="W")  # PyTorch warns of others
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # of an array the labels would be int64
        return felzenszwalb(pixels, **dataclasses.asdict(self), threads=1)[0].numpy()

    def of_batch(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, H, W) int32 on the same device; on the CPU with every core."""
        return felzenszwalb(pixels, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Slic:
    """SLIC superpixels (Achanta et al., PAMI 2012), scikit-image's, grown from `segments` seeds."""

    segments: int
    compactness: float

    def __call__(self, picture: RawSample) -> np.ndarray:
        """(H, W) int64 of one picture."""
        from skimage.segmentation import slic

        return slic(picture.image, n_segments=self.segments, compactness=self.compactness, start_label=0)


@dataclass(frozen=True)
class StoredMasks:
    """The label map that came with the picture, such as masks that SAM made beforehand."""

    def __call__(self, picture: RawSample) -> np.ndarray:
        """(H, W) integers as stored.

        Raises:
            ValueError: the picture has none, or of another size.
        """
        size = picture.image.shape[:2]
        if picture.segments is None or picture.segments.shape != size:
            got = None if picture.segments is None else picture.segments.shape
            raise ValueError(
                f"picture: expected stored segments (H, W) = {size}, got {got} ({picture.caption!r})"
            )
        return picture.segments


def make_segmenter(config: SuperpixelConfig) -> Segmenter:
    """The segmenter that `config` names; with `config.cache` one that keeps its label maps there."""
    if config.kind == "stored":
        return StoredMasks()
    if config.kind == "slic":
        slic = Slic(config.segments, config.compactness)
        return _cached(slic, config.cache, f"{slic} of scikit-image {version('scikit-image')}")
    graph = Felzenszwalb(config.scale, config.sigma, config.min_size, config.precision)
    return _cached(graph, config.cache, str(graph))


def _cached(segmenter: Segmenter, folder: str, settings_key: str) -> Segmenter:
    if not folder:
        return segmenter
    from .superpixel_cache import CachedSegmenter

    return CachedSegmenter(segmenter, folder, settings_key)


class PatchLabels:
    """Patch labels of training crops, of one in a loader worker or of a whole batch on its device.

    Args:
        config: the pseudo-labels.
        patch: patch side in pixels.
    """

    def __init__(self, config: SuperpixelConfig, patch: int) -> None:
        self.segmenter, self.order, self.how = make_segmenter(config), config.order, config.patch_label
        self.patch = patch

    def of_crop(self, raw: RawSample, box: tuple[int, int, int, int], crop: np.ndarray) -> Tensor:
        """Labels of one training crop.

        Args:
            raw: the stored picture.
            box: (top, left, height, width) of the crop in it.
            crop: (S, S, 3) uint8, the crop at training size.

        Returns:
            (h, w) int64.
        """
        segments = self._segments(raw, box, crop)  # (S, S)
        return patch_labels(torch.from_numpy(segments)[None], self.patch, how=self.how)[0]

    def of_batch(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 crops to (B, h, w) int64 labels, the same as `of_crop` one by one."""
        assert isinstance(self.segmenter, Felzenszwalb)  # SuperpixelConfig.fits_device
        return patch_labels(self.segmenter.of_batch(pixels), self.patch, how=self.how)

    def _segments(self, raw: RawSample, box: tuple[int, int, int, int], crop: np.ndarray) -> np.ndarray:
        size = crop.shape[0]
        if self.order == "segment_first":
            return cut_segments(self.segmenter(raw), box, size)
        stored = None if raw.segments is None else cut_segments(raw.segments, box, size)
        return self.segmenter(RawSample(crop, raw.caption, segments=stored))


def labels_on_device(config: SuperpixelConfig, device: torch.device) -> bool:
    """Whether the trainer makes the labels on `device`, one call a batch, instead of the loader's workers.

    Raises:
        NotImplementedError: asked for on a device that felzenszwalb has no kernel for.
    """
    if config.where == "workers" or not config.fits_device:
        return False
    if config.where == "auto" and device.type != "cuda":
        return False
    try:
        felzenszwalb(torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device=device))
    except NotImplementedError:  # an extension that was built without CUDA
        if config.where == "device":
            raise
        return False
    return True
