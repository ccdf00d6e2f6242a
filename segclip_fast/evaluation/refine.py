"""Superpixel snapping: every superpixel of the photo takes the label with the best mean score inside it.

Region borders come from a 14 x 14 patch grid; superpixels follow the photo's edges. An addition of this
library, off by default and named in the result when used.

Shape legend: C labels, S superpixels, H W the photo's own size, K distinct score rows of a `ScoreMap`.
"""

from __future__ import annotations

import numpy as np
import torch

from .windows import MAX_FLOATS, ScoreMap

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


def snap_to_superpixels(scores: np.ndarray | torch.Tensor, superpixels: np.ndarray) -> np.ndarray:
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
    scores: ScoreMap, superpixels: np.ndarray, max_floats: int = MAX_FLOATS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the resized score map inside each superpixel, without building (C, H, W).

    The resize is linear, so the mean is (share of every score row in the superpixel) @ (score rows).

    Args:
        scores: the photo's score map, at its resized size.
        superpixels: (H, W) integers from 0, at the photo's own size.
        max_floats: most floats in a temporary of the resize.

    Returns:
        Means (S, C) float32, and the superpixels as (H, W) int64.
    """
    ids = _superpixel_ids(superpixels, None)
    rows, S = scores.palette.shape[0], int(ids.max()) + 1
    shares = torch.zeros(S * rows, dtype=torch.float64)
    for band, corners, weights in scores.bands(ids.shape[0], ids.shape[1], max_floats):
        for corner, weight in zip(corners, weights, strict=True):
            shares.index_add_(0, (ids[band] * rows + corner).flatten(), weight.flatten().double())
    area = torch.bincount(ids.flatten(), minlength=S).clamp(min=1)
    shares = shares.view(S, rows) / area[:, None]
    return (shares @ scores.palette.double()).float(), ids


def _superpixel_ids(superpixels: np.ndarray, size: tuple[int, int] | None) -> torch.Tensor:
    ids = torch.as_tensor(np.ascontiguousarray(superpixels)).long()
    if ids.ndim != 2 or (size is not None and ids.shape != size):
        raise ValueError(f"superpixels: expected shape {size or '(H, W)'}, got {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise ValueError(f"superpixels: expected numbers from 0, got {int(ids.min())}")
    return ids
