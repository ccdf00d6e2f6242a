"""Zero-shot segmentation as the authors' release runs it: slow, and what ours is compared with.

Every step is written down as the release takes it, without the shortcuts of `segclip_fast.evaluation`, of
which nothing is used here: batch 1, every window through the image encoder twice (once for the regions, once
for the scores), a score of every label for every pixel, histograms in float32. Of a model only `encode_image`
and `logit_scale` are used; the label features are given.

Shape legend: C labels, K classes (C, or 1 + C with the background), E joint embedding, L regions, N patches
of a window, h w the resized photo, S side of a window, H W the photo's own size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import cv2
except ImportError:  # a bare machine: the same resize to the bit, tested against OpenCV elsewhere
    cv2 = None

SIDE = 224  # window, its stride, and the short side of the resized photo, in pixels
LONGEST = 2048  # no photo is made longer than this
MEAN = np.array([122.7709383, 116.7460125, 104.09373615], dtype=np.float32)  # RGB in 0..255
DEVIATION = np.array([68.5005327, 66.6321579, 70.32316305], dtype=np.float32)
LIKELY = 5  # labels of a window that the image feature lets through
IGNORED = 255  # true label of a pixel that is not counted
RESIZED_BY = "segclip_fast" if cv2 is None else "cv2"
Box = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass(frozen=True, eq=False)
class Scored:
    """One window.

    Attributes:
        box: its place in the resized photo.
        regions: (S, S) int64, the region of each pixel.
        affinity: (L, C) float32, each region's score of each label.
        threshold: the background threshold that was applied, None without background.
    """

    box: Box
    regions: Tensor
    affinity: Tensor
    threshold: float | None


@dataclass(frozen=True, eq=False)
class Trace:
    """All that is known about one photo on the way to its labels.

    Attributes:
        pixels: (3, h, w) float32, resized and normalised.
        windows: in the order they were scored, row by row.
        logits: (K, h, w) float32, averaged over the windows.
        labels: (H, W) int64.
    """

    pixels: Tensor
    windows: tuple[Scored, ...]
    logits: Tensor
    labels: Tensor


# --- the photo ---------------------------------------------------------------------------------------------


def resized(photo: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(H, W, 3) uint8 to (h, w, 3) uint8 with the short side `side`, OpenCV's bilinear resize.

    Raises:
        ValueError: so long a photo that its short side falls below the window; the release breaks down there.
    """
    H, W = photo.shape[:2]
    scale = min(LONGEST / max(H, W), side / min(H, W))
    h, w = int(H * scale + 0.5), int(W * scale + 0.5)
    if min(h, w) < side:
        raise ValueError(f"photo: expected sides within {LONGEST / side:.2f} of each other, got {H} x {W}")
    if cv2 is None:
        from segclip_fast.data.images import resize_bilinear_uint8

        return resize_bilinear_uint8(photo, (h, w))
    return cv2.resize(photo, (w, h), interpolation=cv2.INTER_LINEAR)


def normalised(image: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 RGB to (3, h, w) float32."""
    standard = (image.astype(np.float32) - MEAN) * (np.float32(1) / DEVIATION)
    return torch.from_numpy(standard.transpose(2, 0, 1).copy())


def boxes(height: int, width: int, side: int = SIDE) -> list[Box]:
    """Windows of a resized photo, row by row; those that would leave it are shifted back."""
    rows = max(height - side + side - 1, 0) // side + 1
    columns = max(width - side + side - 1, 0) // side + 1
    found = []
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * side + side, height), min(column * side + side, width)
            found.append((max(bottom - side, 0), max(right - side, 0), bottom, right))
    return found


# --- one window --------------------------------------------------------------------------------------------


def region_map(model: Any, window: Tensor) -> Tensor:
    """The region of every pixel of a window (1, 3, S, S): (S, S) int64."""
    soft = model.encode_image(window).soft.float()  # (1, L, N)
    grid = round(soft.shape[-1] ** 0.5)
    maps = F.interpolate(
        soft.unflatten(-1, (grid, grid)), size=window.shape[-2:], mode="bilinear", align_corners=False
    )
    return maps.argmax(dim=1)[0]


def label_scores(model: Any, window: Tensor, text_features: Tensor) -> Tensor:
    """Each region's score of each label, (L, C): the likely labels' share times the share among all."""
    features = model.encode_image(window)
    region = F.normalize(features.regions.float(), dim=-1)[0]  # (L, E)
    image = F.normalize(features.image.float(), dim=-1)[0]  # (E,)
    scale = model.logit_scale.float().exp().clamp(max=100)
    similarity = scale * region @ text_features.T  # (L, C)
    chances = (scale * image @ text_features.T).softmax(dim=-1)  # (C,)
    likely = chances.topk(min(LIKELY, len(chances))).indices
    among_likely = torch.full_like(similarity, float("-inf"))
    among_likely[:, likely] = similarity[:, likely]
    return among_likely.softmax(dim=-1) * similarity.softmax(dim=-1)


def window_logits(regions: Tensor, affinity: Tensor, threshold: float | None) -> tuple[Tensor, float | None]:
    """Scores of every pixel of a window, (1, K, S, S), and the threshold that decided on its background."""
    one_hot = F.one_hot(regions, len(affinity)).to(affinity.dtype)  # (S, S, L)
    logits = (one_hot @ affinity).permute(2, 0, 1)[None]  # (1, C, S, S)
    if threshold is None:
        return logits, None
    limit = min(threshold, float(affinity.max()))
    background = (logits.amax(dim=1, keepdim=True) < limit).to(logits.dtype)
    return torch.cat((background, logits), dim=1), limit


# --- one photo ---------------------------------------------------------------------------------------------


@torch.no_grad()
def trace(
    model: Any,
    photo: np.ndarray,
    text_features: Tensor,
    threshold: float | None,
    side: int = SIDE,
) -> Trace:
    """Segment one photo and keep what was found on the way, all on the model's device.

    Args:
        model: in evaluation mode; `encode_image` gives `soft`, `regions` and `image`.
        photo: (H, W, 3) uint8 RGB.
        text_features: (C, E) of unit length.
        threshold: adds the background as class 0 below this score; None: every pixel gets a label.
        side: of the square windows, in pixels.

    Raises:
        ValueError: the photo is too long for its width.
    """
    pixels = normalised(resized(photo, side)).to(model.logit_scale.device)
    text_features = text_features.to(pixels)
    h, w = pixels.shape[1:]
    total = pixels.new_zeros(1, len(text_features) + (threshold is not None), h, w)
    count = pixels.new_zeros(1, 1, h, w)
    windows = []
    for top, left, bottom, right in boxes(h, w, side):
        window = pixels[None, :, top:bottom, left:right]
        regions = region_map(model, window)
        affinity = label_scores(model, window, text_features)
        logits, limit = window_logits(regions, affinity, threshold)
        total[:, :, top:bottom, left:right] += logits
        count[:, :, top:bottom, left:right] += 1
        windows.append(Scored((top, left, bottom, right), regions, affinity, limit))
    mean = total / count
    full = F.interpolate(mean, size=photo.shape[:2], mode="bilinear", align_corners=False)
    labels = full.softmax(dim=1).argmax(dim=1)[0]
    return Trace(pixels, tuple(windows), mean[0], labels)


def label_map(
    model: Any,
    photo: np.ndarray,
    text_features: Tensor,
    threshold: float | None,
    side: int = SIDE,
) -> Tensor:
    """The label of every pixel of a photo, (H, W) int64 on the CPU; see `trace` for the arguments."""
    return trace(model, photo, text_features, threshold, side).labels.cpu()


# --- the metric --------------------------------------------------------------------------------------------


def mean_iou(pairs: Iterable[tuple[Tensor, np.ndarray]], classes: int) -> float:
    """Mean intersection over union of the classes that occur, as a fraction (the release prints percent).

    Args:
        pairs: of each photo the labels (H, W) on the CPU and the true ones, 255 where nothing is counted.
        classes: K.
    """
    shared = torch.zeros(classes, dtype=torch.float64)
    united = torch.zeros(classes, dtype=torch.float64)
    for labels, truth in pairs:
        truth = torch.from_numpy(np.asarray(truth)).long()
        counted = truth != IGNORED
        found, truth = labels[counted], truth[counted]
        areas = [
            torch.histc(of.float(), bins=classes, min=0, max=classes - 1)
            for of in (found[found == truth], found, truth)
        ]
        shared += areas[0]
        united += areas[1] + areas[2] - areas[0]
    return float((shared / united).nanmean())  # 0 / 0: the class does not occur


def evaluate(
    model: Any,
    samples: Iterable[tuple[np.ndarray, np.ndarray]],
    text_features: Tensor,
    classes: int,
    threshold: float | None,
    side: int = SIDE,
) -> float:
    """Mean intersection over union of photos with their true labels; see `trace` and `mean_iou`."""
    pairs = ((label_map(model, photo, text_features, threshold, side), truth) for photo, truth in samples)
    return mean_iou(pairs, classes)


# --- label features ----------------------------------------------------------------------------------------


def planted_features(regions: Tensor, labels: int) -> Tensor:
    """Label features that an untrained model's regions answer to, (C, E) of unit length on the CPU.

    Each is a mixture of two regions' features with noise, the same every time: prompts score alike under
    random weights, so that neither thresholds nor the filter of likely labels would decide anything.

    Args:
        regions: (., E) region features of the photos, any length.
        labels: C.
    """
    regions = F.normalize(regions.float().cpu(), dim=-1)
    random = torch.Generator().manual_seed(3)
    pairs = torch.randint(len(regions), (labels, 2), generator=random)
    share = 0.5 + 0.5 * torch.rand(labels, 1, generator=random)
    noise = torch.randn(labels, regions.shape[1], generator=random) / regions.shape[1] ** 0.5
    mixture = share * regions[pairs[:, 0]] + (1 - share) * regions[pairs[:, 1]]
    return F.normalize(mixture + 0.5 * noise, dim=-1)
