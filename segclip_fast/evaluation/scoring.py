"""What one window says: its regions or patches, and the score of every label for each of them.

Shape legend: B windows in a batch, E joint embedding, L regions of a window, N patches of a window, (r, c)
grid of patches, C labels (with the background column where there is one), h w a window.

Step numbers are those of the official evaluation protocol: 3 region map, 4 label scores of a region, 5
background. Labels are scored window by window, so what else is in the batch changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import inverse_temperature
from .segmenter import PatchFeatures, Segmenter

if TYPE_CHECKING:
    from ..model.segclip import ImageFeatures

TOP_LABELS = 5  # protocol step 4: labels of a window that survive the image-level filter

Protocol = Literal["official", "paper"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "paper")


@dataclass(frozen=True)
class Background:
    """How background is found, if at all.

    Attributes:
        threshold: step 5: background where no label scores that much; None for no background by threshold.
        names: so many labels at the end of the vocabulary are names of the background; what the best of them
            scores is the background's score. 0 for none.
    """

    threshold: float | None = None
    names: int = 0


@dataclass(frozen=True)
class RegionScores:
    """Windows whose pixels take the scores of their region.

    Attributes:
        regions: (B, h, w) int64 in 0..L-1.
        scores: (B, L, C) float32.
    """

    regions: Tensor
    scores: Tensor


@dataclass(frozen=True)
class PatchScores:
    """Windows with scores for every patch, to be upsampled.

    Attributes:
        grids: (B, C, r, c) float32.
        padded: size in pixels that the grid covers, at least the window's.
    """

    grids: Tensor
    padded: tuple[int, int]


# --- step 3


def upsample_regions(soft: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Region of every pixel (step 3): bilinear upsampling of the soft assignment, then arg max.

    Args:
        soft: (B, L, N) softmax over the regions of the clean assignment logits, patches row-major.
        grid: patch rows and columns, N = rows * columns.
        size: (h, w) in pixels of the padded window.

    Returns:
        (B, h, w) int64 region index.
    """
    maps = soft.unflatten(-1, grid)  # (B, L, rows, columns)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    if maps.is_cuda:
        return maps.argmax(dim=1)
    best = maps[:, 0].clone()  # on a CPU whole planes are compared, many times faster than a strided arg max
    winner = torch.zeros_like(best, dtype=torch.int64)
    for region in range(1, maps.shape[1]):
        winner.masked_fill_(maps[:, region] > best, region)
        torch.maximum(best, maps[:, region], out=best)
    return winner


# --- step 4


def label_affinity(image: Tensor, regions: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Score of every label for every region (step 4): two softmaxes multiplied, one over the top labels only.

    Args:
        image: (B, E) image features, any length.
        regions: (B, L, E) region features, any length.
        labels: (C, E) label features, normalised.
        scale: scalar, already clamped.

    Returns:
        (B, L, C) scores in [0, 1]; 0 for labels outside the window's top labels.
    """
    similarity = scale * F.normalize(regions, dim=-1) @ labels.T  # (B, L, C)
    likely = F.normalize(image, dim=-1) @ labels.T  # (B, C)
    kept = torch.zeros_like(likely, dtype=torch.bool)
    kept.scatter_(1, likely.topk(min(TOP_LABELS, labels.shape[0]), dim=1).indices, True)
    filtered = similarity.masked_fill(~kept[:, None], float("-inf"))
    return filtered.softmax(dim=-1) * similarity.softmax(dim=-1)


def paper_affinity(regions: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Score of every label for every region by the paper's Section 2.5, one softmax over labels (B, L, C)."""
    return (scale * F.normalize(regions, dim=-1) @ labels.T).softmax(dim=-1)


# --- step 5


def effective_threshold(affinity: Tensor, threshold: float) -> Tensor:
    """Background threshold of each window (step 5), (B, L, C) -> (B,): never above its largest score.

    So the region of that score stays; the release counts empty regions too, which no pixel shows.
    """
    return affinity.amax(dim=(1, 2)).clamp(max=threshold)


def add_background(affinity: Tensor, threshold: float | Tensor) -> Tensor:
    """Prepend the background column (step 5): 1 where a region's best score is below `threshold`, else 0.

    Args:
        affinity: (B, L, C).
        threshold: one number, or one for each window (B,).

    Returns:
        (B, L, 1 + C).
    """
    limit = torch.as_tensor(threshold, device=affinity.device).reshape(-1, 1, 1)
    background = affinity.amax(dim=-1, keepdim=True) < limit  # (B, L, 1)
    return torch.cat((background.to(affinity.dtype), affinity), dim=-1)


def fold_background(affinity: Tensor, names: int) -> Tensor:
    """Merge the last `names` columns into one background column at index 0, the best of them.

    (B, L, C) -> (B, L, 1 + C - names).
    """
    rest = affinity[..., -names:].amax(dim=-1, keepdim=True)
    return torch.cat((rest, affinity[..., :-names]), dim=-1)


# --- all of it


def score_windows(
    model: Segmenter,
    features: ImageFeatures | PatchFeatures,
    labels: Tensor,
    size: tuple[int, int],
    padded: tuple[int, int],
    background: Background,
    protocol: Protocol,
) -> RegionScores | PatchScores:
    """Steps 3 to 5 for equally sized windows that were encoded together.

    Args:
        model: gives the patch size and the temperature.
        features: what `model.encode_image` returned: `ImageFeatures` or `PatchFeatures`.
        labels: (C, E) normalised label features on the features' device.
        size: (h, w) of the windows in pixels.
        padded: their size as encoded, a multiple of the patch.
        background: how background is found.
        protocol: "official" (two softmaxes, top labels, adaptive threshold, regions upsampled bilinearly) or
            "paper" (S = M S_hat: one softmax, a plain threshold, every pixel in the region of its patch).
            A dense model's patches are scored as regions are, and always upsampled.

    Returns:
        Scores on the features' device; the first of C columns is the background's where it is asked for.
    """
    patch = model.patch_size
    grid = (padded[0] // patch, padded[1] // patch)
    if isinstance(features, PatchFeatures):
        scores = _affinity(model, features.image, features.patches, labels, background, protocol)
        return PatchScores(scores.mT.unflatten(-1, grid).contiguous(), padded)
    if protocol == "official":
        regions = upsample_regions(features.soft.float(), grid, padded)
    else:
        owner = features.hard.argmax(dim=1).unflatten(-1, grid)  # (B, rows, columns)
        regions = owner.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
    scores = _affinity(model, features.image, features.regions, labels, background, protocol)
    return RegionScores(regions[:, : size[0], : size[1]], scores)


def _affinity(
    model: Segmenter,
    image: Tensor,
    regions: Tensor,
    labels: Tensor,
    background: Background,
    protocol: Protocol,
) -> Tensor:
    """Scores of all columns (steps 4 and 5), (B, L, C) float32."""
    scale = inverse_temperature(model.logit_scale)
    regions, labels = regions.float(), labels.float()
    if protocol == "official":
        scores = label_affinity(image.float(), regions, labels, scale)
    else:
        scores = paper_affinity(regions, labels, scale)
    if background.names:
        return fold_background(scores, background.names)
    if background.threshold is None:
        return scores
    if protocol == "official":
        return add_background(scores, effective_threshold(scores, background.threshold))
    return add_background(scores, background.threshold)
