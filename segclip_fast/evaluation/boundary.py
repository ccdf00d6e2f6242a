"""Boundary F-score: how well the outlines of the classes agree, which mean IoU hardly sees.

Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013.

Shape legend: C classes (the background is one of them), H W pixels of an image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..data.sample import IGNORE_LABEL

TOLERANCE = 0.0075  # of the image's diagonal: the paper's choice, 4 pixels for a photo of PASCAL VOC


def boundary_f_score(
    prediction: Any,
    truth: Any,
    classes: int,
    tolerance: float = TOLERANCE,
    ignore: int = IGNORE_LABEL,
) -> float:
    """Mean of `boundary_f_scores` over the classes that the prediction or the truth has; NaN if none.

    Args:
        prediction: (H, W) integers in 0..C-1, array or CPU tensor.
        truth: (H, W) integers in 0..C-1 or `ignore`.
        classes: C.
        tolerance: distance at which boundaries still match, as a share of the diagonal; at least one pixel.
        ignore: pixels with this true label belong to no class.

    Raises:
        ValueError: as `boundary_f_scores`.
    """
    scores = boundary_f_scores(prediction, truth, classes, tolerance, ignore)
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")


def boundary_f_scores(
    prediction: Any,
    truth: Any,
    classes: int,
    tolerance: float = TOLERANCE,
    ignore: int = IGNORE_LABEL,
) -> np.ndarray:
    """F-measure of each class's boundary in one image (Csurka et al., BMVC 2013).

    The boundary of a class is its pixels with a neighbour (above, below, left or right) outside the class;
    the image's border makes none. Precision is the share of the predicted boundary within the tolerance of
    the true one, recall the share of the true boundary within the tolerance of the predicted one, by the
    Euclidean distance of pixel centres; that is what dilation by a disk gives (DAVIS, Perazzi et al., CVPR
    2016), but the radius is not rounded up here. F = 2 * precision * recall / (precision + recall).

    - One boundary is empty: 0.
    - Both are empty: 1 if the class fills the image in both, 0 if only in one (where DAVIS has 1).
    - Ignored pixels are outside every class in both, whatever was predicted there (as the void of DAVIS): a
      class ends at them in the prediction as in the truth.

    Args:
        prediction: (H, W) integers in 0..C-1, array or CPU tensor; anything where the truth is `ignore`.
        truth: (H, W) integers in 0..C-1 or `ignore`.
        classes: C.
        tolerance: distance at which boundaries still match, as a share of the diagonal (0 <= tolerance < 1);
            the distance used is never below one pixel.
        ignore: pixels with this true label belong to no class.

    Returns:
        (C,) float64 in 0..1; NaN for classes in neither.

    Raises:
        ValueError: shapes differ or are not (H, W), an empty image, labels that are no integers or out of
            range, no class, `ignore` is one of the classes, a tolerance out of range.
    """
    predicted, actual = np.asarray(prediction), np.asarray(truth)
    counted = _check(predicted, actual, classes, tolerance, ignore)
    radius = max(1.0, tolerance * math.hypot(*actual.shape))
    scores = np.full(classes, np.nan)
    for label in np.union1d(predicted[counted], actual[counted]):
        scores[label] = _f_measure((predicted == label) & counted, (actual == label) & counted, radius)
    return scores


def _f_measure(predicted: np.ndarray, actual: np.ndarray, radius: float) -> float:
    """F-measure of two (H, W) bool masks, of which at least one has a pixel."""
    outlines = _outline(predicted), _outline(actual)
    if not any(outline.any() for outline in outlines):
        return float(np.array_equal(predicted, actual))  # no outline: a mask is the whole image, or nothing
    rows, columns = (np.flatnonzero((outlines[0] | outlines[1]).any(axis=axis))[[0, -1]] for axis in (1, 0))
    box = slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1)  # distances need no more
    guess, target = outlines[0][box], outlines[1][box]
    precision, recall = _share_near(guess, target, radius), _share_near(target, guess, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a (H, W) bool mask with one of their four neighbours outside it."""
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask, border_value=1)


def _share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """Share of the pixels of `points` that have one of `others` within `radius`; 0 if either is empty."""
    if not points.any() or not others.any():
        return 0.0
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(~others)
    return float((distance[points] <= radius).mean())


def _check(
    predicted: np.ndarray, actual: np.ndarray, classes: int, tolerance: float, ignore: int
) -> np.ndarray:
    """The pixels that are not ignored, (H, W) bool, or ValueError."""
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")
    if 0 <= ignore < classes:
        raise ValueError(f"ignore: expected a number outside the {classes} classes, got {ignore}")
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance: expected a share of the diagonal, 0 <= tolerance < 1, got {tolerance}")
    if actual.ndim != 2 or actual.size == 0:
        raise ValueError(f"truth: expected non-empty (H, W), got shape {actual.shape}")
    if predicted.shape != actual.shape:
        raise ValueError(f"prediction: expected the shape of truth {actual.shape}, got {predicted.shape}")
    for name, labels in (("prediction", predicted), ("truth", actual)):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integer labels, got {labels.dtype}")
    counted = actual != ignore
    for name, labels in (("prediction", predicted[counted]), ("truth", actual[counted])):
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"{name}: expected labels 0 to {classes - 1}, got {wrong}")
    return counted
