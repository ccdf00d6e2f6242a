"""Sliding-window scoring: photos and label features in, one compact score map per photo out.

Shape legend: B windows in a batch, E joint embedding, L regions of a window, N patches of a window, C labels
(with the background column where there is one), h w the resized photo or a window of it, H W the photo's own
size, K distinct score rows of a photo.

Inside one photo every pixel's scores are those of its region, or the mean over the windows that cover it: few
distinct rows. `ScoreMap` keeps that palette of rows (K, C) and an index per pixel instead of (C, h, w), and
resizes it exactly: a pixel whose four bilinear neighbours share a row needs no arithmetic, the others are
blended in bounded chunks. A (C, H, W) float tensor never exists, however large the photo.

Step numbers are those of the official evaluation protocol: 1 resize, 2 windows, 3 region map, 4 label scores
of a region, 5 background, 6 average, resize, arg max.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..data.images import resize_bilinear_uint8
from ..data.transforms import normalise
from ..losses import inverse_temperature

if TYPE_CHECKING:
    from ..model.segclip import SegCLIP

LONG_SIDE = 2048  # protocol step 1: no photo is made longer than this
TOP_LABELS = 5  # protocol step 4: labels of a window that survive the image-level filter
MAX_FLOATS = 2**24  # most floats a temporary of the final resize may hold: 64 MiB
WINDOW_BATCH = 32  # windows per call of the image encoder

Protocol = Literal["official", "paper"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "paper")


# --- steps 1 and 2: geometry -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A rectangle of the resized photo, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices, for indexing the last two dimensions."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def short_side_size(height: int, width: int, short: int, long_limit: int = LONG_SIDE) -> tuple[int, int]:
    """Size after protocol step 1: the short side becomes `short`, the long one at most `long_limit`.

    Sides never fall below one pixel (the official rule rounds a 1 x 10000 photo to nothing).
    """
    scale = min(long_limit / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_short_side(image: np.ndarray, short: int, long_limit: int = LONG_SIDE) -> np.ndarray:
    """Resize a (H, W, 3) uint8 photo to (h, w, 3) uint8 by protocol step 1 (bilinear, no antialiasing)."""
    size = short_side_size(image.shape[0], image.shape[1], short, long_limit)
    return image if size == image.shape[:2] else resize_bilinear_uint8(image, size)


def window_starts(side: int, crop: int, stride: int) -> list[int]:
    """First pixel of every window along one axis; the last is shifted back to end at the border (step 2)."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - crop), 0) for i in range(count)]


def plan_windows(height: int, width: int, crop: int, stride: int) -> list[Window]:
    """Windows of a (height, width) photo, row by row; all of one photo have one size, at most crop x crop.

    Raises:
        ValueError: `stride` is not in 1..crop, so that pixels would stay uncovered.
    """
    if not 1 <= stride <= crop:
        raise ValueError(f"stride: expected 1 to {crop} (the window side), got {stride}")
    h, w = min(crop, height), min(crop, width)
    tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
    return [Window(top, left, h, w) for top in tops for left in lefts]


def pad_to_patch(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Repeat the last row and column of (B, 3, h, w) until both sides are multiples of `patch`.

    Only photos more than 9.14 times longer than wide need it: step 1 leaves their short side below the crop.
    The added pixels are cut off the region map again.
    """
    down, right = -images.shape[-2] % patch, -images.shape[-1] % patch
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


# --- steps 3 to 5: one window ------------------------------------------------------------------------------


def upsample_regions(soft: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Region of every pixel (step 3): bilinear upsampling of the soft assignment, then arg max.

    Args:
        soft: (B, L, N) softmax over the regions of the clean assignment logits, patches row-major.
        grid: patch rows and columns, N = rows * columns.
        size: (h, w) in pixels of the padded window.

    Returns:
        (B, h, w) int64 region index.
    """
    maps = soft.unflatten(-1, grid)  # (B, L, rows, columns)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).argmax(dim=1)


def label_affinity(
    image: torch.Tensor, regions: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
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


def paper_affinity(regions: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Score of every label for every region by the paper's Section 2.5, one softmax over labels (B, L, C)."""
    return (scale * F.normalize(regions, dim=-1) @ labels.T).softmax(dim=-1)


def effective_threshold(affinity: torch.Tensor, threshold: float) -> torch.Tensor:
    """Background threshold of each window (step 5), (B, L, C) -> (B,): never above its largest score.

    So the region of that score stays; the release counts empty regions too, which no pixel shows.
    """
    return affinity.amax(dim=(1, 2)).clamp(max=threshold)


def add_background(affinity: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
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


def score_windows(
    model: SegCLIP, windows: torch.Tensor, labels: torch.Tensor, threshold: float | None, protocol: Protocol
) -> tuple[torch.Tensor, torch.Tensor]:
    """Regions and label scores of equally sized windows (steps 3 to 5), by one pass of the image encoder.

    Args:
        model: in evaluation mode.
        windows: (B, 3, h, w) normalised.
        labels: (C, E) normalised label features.
        threshold: background threshold, or None for no background column.
        protocol: "official" (two softmaxes, top labels, adaptive threshold, regions upsampled bilinearly) or
            "paper" (S = M S_hat: one softmax, a plain threshold, every pixel in the region of its patch).

    Returns:
        Region map (B, h, w) int64 and scores (B, L, C) or (B, L, 1 + C) float32, both on the CPU.
    """
    patch, (h, w) = model.config.vision.patch_size, windows.shape[-2:]
    weight = next(model.parameters())
    padded = pad_to_patch(windows, patch).to(weight.device, weight.dtype)
    size = (padded.shape[-2], padded.shape[-1])
    grid = (size[0] // patch, size[1] // patch)
    features = model.encode_image(padded)
    scale = inverse_temperature(model.logit_scale)
    labels = labels.to(weight.device).float()
    if protocol == "official":
        regions = upsample_regions(features.soft.float(), grid, size)
        scores = label_affinity(features.image.float(), features.regions.float(), labels, scale)
        limit = None if threshold is None else effective_threshold(scores, threshold)
    else:
        owner = features.hard.argmax(dim=1).unflatten(-1, grid)  # (B, rows, columns)
        regions = owner.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
        scores = paper_affinity(features.regions.float(), labels, scale)
        limit = None if threshold is None else torch.tensor(threshold)
    if limit is not None:
        scores = add_background(scores, limit)
    return regions[:, :h, :w].cpu(), scores.cpu()  # the rest is small integer work


# --- step 6: one photo -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """Label scores of one resized photo.

    Attributes:
        palette: (K, C) float32, the distinct score rows.
        index: (h, w) int64, the row of each pixel.
        regions: (h, w) int64, numbered from 0 over the photo; where windows overlap, the first one's regions.
    """

    palette: torch.Tensor
    index: torch.Tensor
    regions: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The score map as (C, h, w); for small photos and tests."""
        return self.palette[self.index].permute(2, 0, 1)

    def bands(
        self, height: int, width: int, max_floats: int = MAX_FLOATS
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Bilinear resize (align_corners False) to (height, width), as rows of the palette and their weights.

        Yields:
            Output rows as a slice, the four neighbours' palette rows (4, b, W) int64, weights (4, b, W).
        """
        top, bottom, down = bilinear_taps(self.index.shape[0], height)
        left, right, along = bilinear_taps(self.index.shape[1], width)
        step = max(1, max_floats // (24 * width))  # neighbours (int64), weights and the caller's copies
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            upper, lower = self.index[top[rows]], self.index[bottom[rows]]  # (b, w)
            corners = torch.stack((upper[:, left], upper[:, right], lower[:, left], lower[:, right]))
            y = down[rows, None]
            weights = torch.stack(((1 - y) * (1 - along), (1 - y) * along, y * (1 - along), y * along))
            yield rows, corners, weights

    def arg_max(
        self, height: int, width: int, max_floats: int = MAX_FLOATS
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Resize the scores and take the best label of each pixel (step 6).

        Args:
            height: H.
            width: W.
            max_floats: most floats in any temporary.

        Returns:
            labels (H, W) int64 and their scores (H, W) float32.
        """
        live = self.palette.any(dim=0)  # the top-label filter leaves few labels with any score at all
        live[0] = True  # wins where all are zero
        names, palette = live.nonzero().flatten(), self.palette[:, live]  # (c,), (K, c)
        best, winner = palette.max(dim=1)  # (K,)
        labels = torch.empty(height, width, dtype=torch.int64)
        scores = torch.empty(height, width)
        step = max(1, max_floats // (2 * palette.shape[1]))
        for rows, corners, weights in self.bands(height, width, max_floats):
            band_labels, band_scores = winner[corners[0]], best[corners[0]]  # right wherever neighbours agree
            ys, xs = (corners[1:] != corners[0]).any(dim=0).nonzero(as_tuple=True)
            for chunk in range(0, len(ys), step):
                y, x = ys[chunk : chunk + step], xs[chunk : chunk + step]
                blend = palette.new_zeros(len(y), palette.shape[1])
                for row, weight in zip(corners[:, y, x], weights[:, y, x], strict=True):
                    blend += weight[:, None] * palette[row]
                band_scores[y, x], band_labels[y, x] = blend.max(dim=1)
            labels[rows], scores[rows] = names[band_labels], band_scores
        return labels, scores


def bilinear_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bilinear resize of one axis: low and high neighbours (target,) int64, weights of the high (target,)."""
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    position = position.clamp(0, source - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=source - 1), (position - low).float()


def merge_windows(
    size: tuple[int, int], windows: Sequence[Window], parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> ScoreMap:
    """Average the windows of one photo where they overlap (step 6).

    Args:
        size: (h, w) of the resized photo.
        windows: their places; together they cover the photo.
        parts: for each window its region map (h_i, w_i) int64 in 0..L-1, and its regions' scores (L, C).
    """
    index = torch.zeros(size, dtype=torch.int64)  # row of `total` for each pixel
    owner = torch.full(size, -1, dtype=torch.int64)
    total = torch.zeros(1, parts[0][1].shape[1])  # sum of the score rows that a pixel has met so far
    count = torch.zeros(1)
    for number, (window, (region, score)) in enumerate(zip(windows, parts, strict=True)):
        place, L = window.slices, score.shape[0]
        pairs, inverse = torch.unique(index[place] * L + region, return_inverse=True)
        index[place] = inverse + total.shape[0]
        old, new = pairs // L, pairs % L
        total = torch.cat((total, total[old] + score[new]))
        count = torch.cat((count, count[old] + 1))
        owner[place] = torch.where(owner[place] < 0, region + number * L, owner[place])
    used, index = torch.unique(index, return_inverse=True)
    compact = torch.unique(owner, return_inverse=True)[1]
    return ScoreMap(total[used] / count[used, None], index, compact)


# --- many photos at once -----------------------------------------------------------------------------------


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the block; a training model returns to training afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()


def score_images(
    model: SegCLIP,
    images: Sequence[np.ndarray],
    labels: torch.Tensor,
    *,
    threshold: float | None = None,
    protocol: Protocol = "official",
    short_side: int | None = None,
    stride: int | None = None,
    window_batch: int = WINDOW_BATCH,
) -> list[ScoreMap]:
    """Score the windows of all photos in common batches; filters and thresholds stay per window.

    Args:
        model: the crop is its image size.
        images: (H, W, 3) uint8 RGB each, any sizes.
        labels: (C, E) normalised label features.
        threshold: adds a background column 0 below this score; None adds nothing.
        protocol: "official" or "paper", see `score_windows`.
        short_side: short side after resizing; the model's image size by default.
        stride: step between windows; the crop by default.
        window_batch: windows per call of the image encoder.

    Raises:
        ValueError: an option out of range.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    crop = model.config.vision.image_size
    short = crop if short_side is None else short_side
    if short < 1:
        raise ValueError(f"short_side: expected a positive number of pixels, got {short}")
    pixels = [normalise(resize_short_side(image, short)) for image in images]
    plans = [plan_windows(p.shape[1], p.shape[2], crop, crop if stride is None else stride) for p in pixels]
    same_size: dict[tuple[int, int], list[tuple[int, int]]] = {}  # window size -> photo and window numbers
    for i, plan in enumerate(plans):
        for j, window in enumerate(plan):
            same_size.setdefault((window.height, window.width), []).append((i, j))
    found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    with evaluation_mode(model):
        for members in same_size.values():
            for start in range(0, len(members), window_batch):
                keys = members[start : start + window_batch]
                batch = torch.stack([pixels[i][(..., *plans[i][j].slices)] for i, j in keys])
                regions, scores = score_windows(model, batch, labels, threshold, protocol)
                found.update(zip(keys, zip(regions, scores, strict=True), strict=True))
    return [
        merge_windows((p.shape[1], p.shape[2]), plan, [found[i, j] for j in range(len(plan))])
        for i, (p, plan) in enumerate(zip(pixels, plans, strict=True))
    ]
