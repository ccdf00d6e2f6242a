"""Mean intersection over union by mmseg's definition, from integer counts that can be streamed and merged.

Shape legend: C classes (the background is one of them), H W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.sample import IGNORE_LABEL, ImageTextSource, RawSample
from .vocabularies import BACKGROUND

if TYPE_CHECKING:
    from ..model.segclip import SegCLIP


@dataclass(frozen=True, eq=False)
class MetricResult:
    """Segmentation quality over a data set, as fractions of 1.

    Attributes:
        iou: (C,) float64 intersection over union; NaN for classes in neither the truth nor the predictions.
        miou: mean of `iou` over the other classes (protocol step 9).
        pixel_accuracy: share of the counted pixels that are right.
        mean_accuracy: mean over the classes of the truth of the share of their pixels that are right.
        names: the C class names; empty if they were not given.
    """

    iou: np.ndarray
    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    names: tuple[str, ...] = ()


class ConfusionMatrix:
    """Counts of (true class, predicted class) pixel pairs.

    Attributes:
        counts: (C, C) int64, rows are the truth.

    Args:
        num_classes: C.
        ignore: pixels with this true label are not counted.

    Raises:
        ValueError: no class, or `ignore` is one of the classes.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE_LABEL) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if 0 <= ignore < num_classes:
            raise ValueError(f"ignore: expected a number outside the {num_classes} classes, got {ignore}")
        self.ignore = ignore
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, pred: Any, truth: Any) -> None:
        """Count one image, or several of one shape.

        Args:
            pred: integer labels in 0..C-1, array or CPU tensor of any shape.
            truth: integer labels in 0..C-1 or `ignore`, of the same shape.

        Raises:
            ValueError: shapes differ, not integers, or a counted pixel has a label out of range.
        """
        pred, truth = np.asarray(pred), np.asarray(truth)
        if pred.shape != truth.shape:
            raise ValueError(f"pred: expected the shape of truth {truth.shape}, got {pred.shape}")
        for name, labels in (("pred", pred), ("truth", truth)):
            if labels.dtype.kind not in "iu":
                raise ValueError(f"{name}: expected integer labels, got {labels.dtype}")
        counted = truth != self.ignore
        classes = self.counts.shape[0]
        rows, columns = truth[counted].astype(np.int64), pred[counted].astype(np.int64)
        for name, labels in (("pred", columns), ("truth", rows)):
            if labels.size and not (labels.min() >= 0 and labels.max() < classes):
                wrong = labels.min() if labels.min() < 0 else labels.max()
                raise ValueError(f"{name}: expected labels 0 to {classes - 1}, got {wrong}")
        flat = np.bincount(rows * classes + columns, minlength=classes * classes)
        self.counts += flat.reshape(classes, classes)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the data set.

        Raises:
            ValueError: another number of classes.
        """
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"other: expected {len(self.counts)} classes, got {len(other.counts)}")
        self.counts += other.counts

    def result(self, names: Sequence[str] = ()) -> MetricResult:
        """The metric over everything counted so far; all NaN if nothing was."""
        hit = np.diag(self.counts).astype(np.float64)
        actual, guessed = self.counts.sum(axis=1), self.counts.sum(axis=0)
        iou = _divide(hit, actual + guessed - hit)
        accuracy = _divide(hit, actual)
        return MetricResult(
            iou=iou,
            miou=_mean(iou),
            pixel_accuracy=float(_divide(hit.sum(keepdims=True), actual.sum(keepdims=True))[0]),
            mean_accuracy=_mean(accuracy),
            names=tuple(names),
        )


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole  # 0 / 0 -> NaN: the class does not occur


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def evaluate_source(
    model: SegCLIP,
    source: ImageTextSource,
    *,
    labels: Sequence[str] | None = None,
    background: bool | None = None,
    snap: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    **options: Any,
) -> MetricResult:
    """Segment the images of a source and compare with their masks at the images' own size.

    Args:
        model: the segmenter.
        source: samples with masks; a mask is an index into `source.class_names`, 255 is not counted.
        labels: the text for each class that gets a prompt (all, or all but the background), where it should
            differ from the class name.
        background: class 0 is the background, found by threshold; by default, if it is called "background".
        snap: snap to superpixels.
        limit: use the first `limit` samples only.
        batch_size: images segmented together; does not change the result.
        **options: passed on to `segment_batch` (threshold, templates, short_side, stride, protocol).

    Raises:
        ValueError: no sample, a sample without a mask or with one of another size, a wrong number of labels.
    """
    from .segmentation import segment_batch

    names = tuple(source.class_names)
    if background is None:
        background = bool(names) and names[0] == BACKGROUND
    prompts = list(names[1:] if background else names) if labels is None else list(labels)
    if len(prompts) + int(background) != len(names):
        raise ValueError(f"labels: expected {len(names) - int(background)} of them, got {len(prompts)}")
    count = len(source) if limit is None else min(limit, len(source))
    if count < 1:
        raise ValueError(f"source: expected at least one sample to evaluate, got {count}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    matrix = ConfusionMatrix(len(names))
    for start in range(0, count, batch_size):
        samples = [source[i] for i in range(start, min(start + batch_size, count))]
        masks = [_mask_of(sample, start + i) for i, sample in enumerate(samples)]
        images = [sample.image for sample in samples]
        results = segment_batch(model, images, prompts, background=background, snap=snap, **options)
        for result, mask in zip(results, masks, strict=True):
            matrix.update(result.labels, mask)
    return matrix.result(names)


def _mask_of(sample: RawSample, index: int) -> np.ndarray:
    if sample.mask is None:
        raise ValueError(f"source: expected a mask with every image, sample {index} has none")
    if sample.mask.shape != sample.image.shape[:2]:
        size, got = sample.image.shape[:2], sample.mask.shape
        raise ValueError(f"source: expected a mask of shape {size} for sample {index}, got {got}")
    return sample.mask
