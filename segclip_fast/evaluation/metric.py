"""Mean intersection over union by mmseg's definition, from integer counts that can be streamed and merged.

Shape legend: C classes (the background is one of them), H W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sample import IGNORE_LABEL


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


def confusion(pred: Tensor, truth: Tensor, classes: int, ignore: int = IGNORE_LABEL) -> Tensor:
    """Pixels by true and predicted class, (C, C) int64, rows are the truth; on the device of `pred`.

    Args:
        pred: integers in 0..C-1 of any shape.
        truth: integers in 0..C-1 or `ignore`, of the same shape, on the same device.
        classes: C.
        ignore: pixels with this true label are not counted.
    """
    place = truth.long() * classes + pred.long()
    place = torch.where(truth == ignore, classes * classes, place).flatten()  # one bin more for the ignored
    counts = torch.bincount(place, minlength=classes * classes + 1)
    return counts[: classes * classes].view(classes, classes)


def confusions(preds: Sequence[Tensor], truths: Sequence[Tensor], classes: int) -> Tensor:
    """`confusion` of each of several images of any sizes, (images, C, C) int64, in few operations.

    Args:
        preds: integers in 0..C-1, on one device.
        truths: integers in 0..C-1 or 255, of the same shapes, anywhere.
        classes: C.
    """
    device, bins = preds[0].device, classes * classes + 1
    pred = torch.cat([labels.flatten() for labels in preds])
    truth = torch.cat([labels.flatten() for labels in truths]).to(device).long()
    sizes = torch.tensor([labels.numel() for labels in preds], device=device)
    image = torch.arange(len(preds), device=device).repeat_interleave(sizes, output_size=len(pred))
    place = torch.where(truth == IGNORE_LABEL, bins - 1, truth * classes + pred) + image * bins
    counts = torch.bincount(place, minlength=len(preds) * bins).view(len(preds), bins)
    return counts[:, :-1].unflatten(1, (classes, classes))


def mean_iou(counts: Tensor) -> Tensor:
    """Mean intersection over union of (..., C, C) counts, (...) float64; NaN if no class occurs."""
    hit = counts.diagonal(dim1=-2, dim2=-1).double()
    union = counts.sum(-1) + counts.sum(-2) - hit
    return (hit / union).nanmean(dim=-1)  # 0 / 0 is NaN: the class does not occur


class ConfusionMatrix:
    """Counts of (true class, predicted class) pixel pairs, exact in any order and in any number of parts.

    Args:
        num_classes: C.
        ignore: pixels with this true label are not counted.
        device: where the counts are kept.

    Raises:
        ValueError: no class, or `ignore` is one of the classes.
    """

    def __init__(
        self, num_classes: int, ignore: int = IGNORE_LABEL, device: torch.device | str = "cpu"
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if 0 <= ignore < num_classes:
            raise ValueError(f"ignore: expected a number outside the {num_classes} classes, got {ignore}")
        self.ignore = ignore
        self.total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @property
    def counts(self) -> np.ndarray:
        """(C, C) int64, rows are the truth."""
        return self.total.cpu().numpy()

    def update(self, pred: Any, truth: Any) -> Tensor:
        """Count one image, or several of one shape.

        Args:
            pred: integer labels in 0..C-1, array or tensor of any shape.
            truth: integer labels in 0..C-1 or `ignore`, of the same shape.

        Returns:
            What these pixels added, (C, C) int64 on the counts' device.

        Raises:
            ValueError: shapes differ, not integers, or a counted pixel has a label out of range.
        """
        labels = {"pred": _labels(pred, "pred"), "truth": _labels(truth, "truth")}
        if labels["pred"].shape != labels["truth"].shape:
            wanted, shape = tuple(labels["truth"].shape), tuple(labels["pred"].shape)
            raise ValueError(f"pred: expected the shape of truth {wanted}, got {shape}")
        classes, device = len(self.total), self.total.device
        labels = {name: values.to(device, torch.int64) for name, values in labels.items()}
        counted = labels["truth"] != self.ignore
        for name, values in labels.items():
            wrong = counted & ((values < 0) | (values >= classes))
            if bool(wrong.any()):
                got = int(values[wrong].flatten()[0])
                raise ValueError(f"{name}: expected labels 0 to {classes - 1}, got {got}")
        pred = torch.where(counted, labels["pred"], 0)
        return self.add(confusion(pred, labels["truth"], classes, self.ignore))

    def add(self, counts: Tensor) -> Tensor:
        """Add (C, C) counts of `confusion`, made on the same device; returns them."""
        self.total += counts
        return counts

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the data set.

        Raises:
            ValueError: another number of classes.
        """
        if other.total.shape != self.total.shape:
            raise ValueError(f"other: expected {len(self.total)} classes, got {len(other.total)}")
        self.total += other.total.to(self.total.device)

    def result(self, names: Sequence[str] = ()) -> MetricResult:
        """The metric over everything counted so far; all NaN if nothing was."""
        counts = self.counts
        hit = np.diag(counts).astype(np.float64)
        actual, guessed = counts.sum(axis=1), counts.sum(axis=0)
        iou = _divide(hit, actual + guessed - hit)
        accuracy = _divide(hit, actual)
        return MetricResult(
            iou=iou,
            miou=_mean(iou),
            pixel_accuracy=float(_divide(hit.sum(keepdims=True), actual.sum(keepdims=True))[0]),
            mean_accuracy=_mean(accuracy),
            names=tuple(names),
        )


def _labels(values: Any, name: str) -> Tensor:
    """An integer tensor, from whatever it came as."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(_whole(np.asarray(values), name))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: expected integer labels, got {tensor.dtype}")
    return tensor


def _whole(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integer labels, got {values.dtype}")
    return np.ascontiguousarray(values)


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole  # 0 / 0 -> NaN: the class does not occur


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
