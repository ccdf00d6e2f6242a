"""PAMR: let score maps follow the photo's edges by averaging over alike neighbours, again and again.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020 (pixel-adaptive mask
refinement). An addition to SegCLIP, off by default and named in the result when used.

Shape legend: C labels, H W pixels, P = 8 * len(dilations) neighbours of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .score_map import MAX_FLOATS

ITERATIONS = 10
DILATIONS = (8, 16)
SHARPNESS = 0.1  # the authors' factor on the standard deviation: smaller follows the photo more strictly
EPSILON = 1e-8  # a flat neighbourhood has deviation 0: all its differences are 0 too, its weights equal
# The 3 x 3 square without its centre, (row, column) in steps of the dilation
STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@torch.no_grad()
def pamr(
    image: np.ndarray | Tensor,
    scores: Tensor,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
    max_floats: int = MAX_FLOATS,
) -> Tensor:
    """Refine score maps by the photo they belong to (Araslanov and Roth, CVPR 2020, "PAMR").

    Pixel i has P neighbours n: 8 at each dilation; outside the photo its nearest border pixel stands in. With
    x[k] the photo's channel k and s[k, i] the standard deviation (divisor one less than the count) of x[k]
    over the 3 x 3 squares around i at every dilation, so 9 * len(dilations) values, i once for each dilation:

        affinity[i, n] = softmax over n of mean over k of -|x[k, i] - x[k, n]| / (0.1 * s[k, i] + 1e-8)
        scores[c, i] <- sum over n of affinity[i, n] * scores[c, n],    `iterations` times

    as in the authors' released code: the pixel itself is not among its neighbours. Scores that add up to 1
    over the labels still do, and no score leaves the range of its label's map (but for rounding).

    Args:
        image: (3, H, W) or (H, W, 3), told apart by the size of `scores` (3 x 3 pixels: the former). uint8 in
            0..255 or floating point, by convention in 0..1: only ratios count, so shifting or scaling a
            channel changes nothing as long as its contrasts stay far above 1e-8. Moved to the device of
            `scores`.
        scores: (C, H, W) float32 on any device, unchanged.
        iterations: how often neighbours are averaged; 0 returns a copy.
        dilations: distances of the neighbours in pixels; they may exceed the photo.
        max_floats: most floats in the temporaries of the iterations, which sets how many labels are refined
            together (at least one); the result is the same to the bit. Not counted: the affinity, P * H * W
            floats and a few planes to compute it, once.

    Returns:
        (C, H, W) float32, contiguous, on the device of `scores`, without gradient.

    Raises:
        ValueError: shapes, types or numbers that cannot be used; the message names the argument.
    """
    planes = _check(image, scores, iterations, dilations)
    if max_floats < 1:
        raise ValueError(f"max_floats: expected at least 1, got {max_floats}")
    refined = scores.detach().clone(memory_format=torch.contiguous_format)
    if iterations == 0:
        return refined
    height, width = scores.shape[1:]
    reach = [min(d, max(height, width)) for d in dilations]  # farther is the same border pixel
    margin = max(reach)
    offsets = [(row * d, column * d) for d in reach for row, column in STEPS]
    weights = _affinity(planes, offsets, margin)  # (P, H, W)
    floats = (height + 2 * margin) * (width + 2 * margin) + height * width  # per label: padded, product
    for part in refined.split(max(1, max_floats // floats)):
        product = torch.empty_like(part)
        for _ in range(iterations):
            padded = _padded(part, margin)
            part.zero_()
            for (row, column), weight in zip(offsets, weights, strict=True):
                # Not addcmul_: it may fuse the two roundings for some elements only, depending on the chunk.
                torch.mul(_shifted(padded, row, column, margin), weight, out=product)
                part += product
            del padded  # before the next one is made
    return refined


def pamr_ref(
    image: np.ndarray | Tensor,
    scores: Tensor,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> np.ndarray:
    """`pamr` pixel by pixel as its docstring has it, in float64: slow, for tests on tiny photos.

    Args:
        image: see `pamr`.
        scores: see `pamr`.
        iterations: see `pamr`.
        dilations: see `pamr`.

    Returns:
        (C, H, W) float64.

    Raises:
        ValueError: as `pamr`.
    """
    x = _check(image, scores, iterations, dilations).double().cpu().numpy()
    y = scores.detach().double().cpu().numpy().copy()
    height, width = y.shape[1:]
    for _ in range(iterations):
        before = y.copy()
        for i in range(height):
            for j in range(width):
                square, around, old = [], [], []
                for d in dilations:
                    for row in (i - d, i, i + d):
                        for column in (j - d, j, j + d):
                            r, c = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
                            square.append(x[:, r, c])
                            if (row, column) != (i, j):
                                around.append(x[:, r, c])
                                old.append(before[:, r, c])
                deviation = np.std(square, axis=0, ddof=1)  # (3,)
                distance = np.abs(np.array(around) - x[:, i, j])  # (P, 3)
                logits = -(distance / (SHARPNESS * deviation + EPSILON)).mean(axis=1)  # (P,)
                weights = np.exp(logits - logits.max())
                y[:, i, j] = weights / weights.sum() @ np.array(old)
    return y


def _affinity(planes: Tensor, offsets: list[tuple[int, int]], margin: int) -> Tensor:
    """Weight of every neighbour: (3, H, W) photo -> (P, H, W) that adds up to 1 over P."""
    count = len(offsets) * 9 // 8  # the centres of the squares too
    logits = planes.new_zeros((len(offsets), *planes.shape[1:]))
    for plane in planes:  # one channel at a time keeps the temporaries at a few planes
        padded = _padded(plane[None], margin)[0]
        # Differences to the centre have the deviation of the values, and the centres' zeros among them keep
        # the subtraction of squares harmless: the second term is at most 8/9 of the first.
        total, squares = torch.zeros_like(plane), torch.zeros_like(plane)
        for row, column in offsets:
            difference = _shifted(padded, row, column, margin) - plane
            total += difference
            squares += difference.square()
        deviation = ((squares - total.square() / count) / (count - 1)).sqrt()
        scale = -1.0 / (len(planes) * (SHARPNESS * deviation + EPSILON))
        for logit, (row, column) in zip(logits, offsets, strict=True):
            logit += (_shifted(padded, row, column, margin) - plane).abs() * scale
    weights = logits.sub_(logits.amax(dim=0)).exp_()  # softmax in place: (P, H, W) is the largest array here
    return weights.div_(weights.sum(dim=0))


def _padded(planes: Tensor, margin: int) -> Tensor:
    """(K, H, W) -> (K, H + 2 margin, W + 2 margin), borders repeated."""
    return F.pad(planes, (margin, margin, margin, margin), mode="replicate")


def _shifted(padded: Tensor, row: int, column: int, margin: int) -> Tensor:
    """The neighbours at one offset, as a view without the margin."""
    height, width = padded.shape[-2] - 2 * margin, padded.shape[-1] - 2 * margin
    return padded[..., margin + row : margin + row + height, margin + column : margin + column + width]


def _check(image: np.ndarray | Tensor, scores: Tensor, iterations: int, dilations: Sequence[int]) -> Tensor:
    """The photo as (3, H, W) float32 on the device of `scores`, or ValueError."""
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores: expected a float32 tensor, got {got}")
    if scores.ndim != 3 or scores.numel() == 0:
        raise ValueError(f"scores: expected non-empty (C, H, W), got shape {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: expected finite numbers, got NaN or infinity")  # inf * weight 0 is NaN
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    if len(dilations) == 0 or min(dilations) < 1:
        raise ValueError(f"dilations: expected at least one, each at least 1, got {tuple(dilations)}")
    # A NumPy photo may be read-only or flipped, which a tensor cannot share: copy it.
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image, order="C"))
    if pixels.dtype != torch.uint8 and not pixels.dtype.is_floating_point:
        raise ValueError(f"image: expected uint8 or floating point, got {pixels.dtype}")
    height, width = scores.shape[1:]
    if pixels.shape != (3, height, width):
        if pixels.shape != (height, width, 3):
            expected = f"(3, {height}, {width}) or ({height}, {width}, 3) as `scores`"
            raise ValueError(f"image: expected shape {expected}, got {tuple(pixels.shape)}")
        pixels = pixels.permute(2, 0, 1)
    planes = pixels.detach().to(scores.device, torch.float32)
    if not bool(planes.isfinite().all()):
        raise ValueError("image: expected finite numbers, got NaN or infinity")
    return planes / 255.0 if pixels.dtype == torch.uint8 else planes
