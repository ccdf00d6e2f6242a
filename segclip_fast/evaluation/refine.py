"""Refinements at inference: superpixel snapping and PAMR; any model's scores can be refined.

Region borders come from a 14 x 14 patch grid; superpixels and PAMR follow the photo's edges. Both are
additions to the protocol, off by default and named in the result when used.

Shape legend: C labels, S superpixels, h w the resized photo, H W the photo's own size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .pamr import pamr
from .score_map import MAX_FLOATS, Scores

# Felzenszwalb at the photo's own size: finer than in training, as a superpixel must not cross objects.
SNAP_SCALE = 100.0
SNAP_SIGMA = (0.5, 0.8)  # pixels of pre-smoothing: less for a small picture, whose every pixel counts
SNAP_SIDE = 224  # short side from which the larger smoothing applies
SNAP_MIN_SIZE = 20
SNAP_MAX_COUNT = 2500  # the smallest superpixel covers at least this fraction of the photo


def photo_superpixels(image: np.ndarray) -> np.ndarray:
    """Felzenszwalb superpixels of a (H, W, 3) uint8 photo, (H, W) int64 from 0; at most 2,500 of them."""
    from ..ops.felzenszwalb import felzenszwalb

    min_size = max(SNAP_MIN_SIZE, image.shape[0] * image.shape[1] // SNAP_MAX_COUNT)
    low, high = SNAP_SIGMA
    sigma = max(low, high * min(1.0, min(image.shape[:2]) / SNAP_SIDE))
    return felzenszwalb(image, scale=SNAP_SCALE, sigma=sigma, min_size=min_size)


def snap_to_superpixels(scores: np.ndarray | Tensor, superpixels: np.ndarray) -> np.ndarray:
    """Label every superpixel by its best mean score.

    Args:
        scores: (C, H, W) float, a score for each label and pixel.
        superpixels: (H, W) integers from 0.

    Returns:
        (H, W) int64 labels, constant inside each superpixel.

    Raises:
        ValueError: shapes differ or a superpixel is negative.
    """
    scores = torch.as_tensor(scores)
    ids = _superpixel_ids(superpixels, (scores.shape[1], scores.shape[2]))
    sums = torch.zeros(scores.shape[0], int(ids.max()) + 1, dtype=torch.float64)  # (C, S)
    for label, plane in enumerate(scores):  # one plane at a time keeps the float64 copy small
        sums[label].index_add_(0, ids.flatten(), plane.flatten().double())
    return sums.argmax(dim=0)[ids].numpy()  # a sum ranks the labels of one superpixel as the mean does


def superpixel_scores(
    scores: Scores, superpixels: np.ndarray | Tensor, max_floats: int = MAX_FLOATS
) -> tuple[Tensor, Tensor]:
    """Mean of the resized score map inside each superpixel, without building (C, H, W).

    Args:
        scores: the photo's score map, at its resized size.
        superpixels: (H, W) integers from 0, at the photo's own size.
        max_floats: most floats in a temporary of the resize.

    Returns:
        Means (S, C) float32, and the superpixels as (H, W) int64, both on the scores' device.
    """
    ids = _superpixel_ids(superpixels, None).to(scores.regions.device)
    return scores.superpixel_means(ids, max_floats), ids


def _superpixel_ids(superpixels: np.ndarray | Tensor, size: tuple[int, int] | None) -> Tensor:
    if not isinstance(superpixels, Tensor):
        superpixels = torch.from_numpy(np.ascontiguousarray(superpixels))
    ids = superpixels.long()
    if ids.ndim != 2 or (size is not None and ids.shape != size):
        raise ValueError(f"superpixels: expected shape {size or '(H, W)'}, got {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise ValueError(f"superpixels: expected numbers from 0, got {int(ids.min())}")
    return ids


@dataclass(frozen=True, eq=False)
class PamrScores(Scores):
    """Scores refined by PAMR at the resized photo's size, computed as they are asked for.

    Attributes:
        base: the scores before.
        photo: (h, w, 3) uint8, the resized photo.
    """

    base: Scores
    photo: np.ndarray | Tensor

    @property
    def count(self) -> int:
        """C."""
        return self.base.count

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.base.size

    @property
    def regions(self) -> Tensor:
        """(h, w) int64, those of the scores before."""
        return self.base.regions

    def planes(self, start: int, stop: int) -> Tensor:
        """Refined scores of the labels from `start` to `stop`; what is zero everywhere stays so."""
        planes = self.base.planes(start, stop)
        live = planes.flatten(1).any(dim=1).nonzero().flatten()
        if len(live):
            planes[live] = pamr(self.photo, planes[live])
        return planes


def label_pixels(
    scores: Scores,
    height: int,
    width: int,
    *,
    superpixels: np.ndarray | Tensor | None = None,
    photo: np.ndarray | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step 6 with whatever refinement is asked for: the label of every pixel at the photo's own size.

    Args:
        scores: of the resized photo.
        height: H.
        width: W.
        superpixels: (H, W) integers from 0: each of them takes one label (snapping).
        photo: (h, w, 3) uint8, the resized photo: scores are refined by PAMR first.

    Returns:
        labels (H, W) int64 and their scores (H, W) float32, on the scores' device.
    """
    if photo is not None:
        scores = PamrScores(scores, photo)
    if superpixels is None:
        return scores.arg_max(height, width)
    means, ids = superpixel_scores(scores, superpixels)  # (S, C), (H, W)
    best, winner = means.max(dim=1)
    return winner[ids], best[ids]
