"""The label scores of one photo in little memory, and what is made of them: arg max, means of superpixels.

Shape legend: C labels (with the background column where there is one), h w the resized photo, H W the photo's
own size, K distinct score rows of a photo, L regions of a window, S superpixels.

A (C, H, W) float tensor never exists, however large the photo. Grouping models give every pixel the scores
of its region, or the mean over the windows that cover it: few distinct rows. `ScoreMap` keeps that palette of
rows and an index per pixel, and resizes it exactly: a pixel whose four bilinear neighbours share a row needs
no arithmetic, the others are blended in bounded chunks. `window_maps` has the forms for GPUs and for dense
models. All tensors of a map are on one device, and so are its results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .windows import Window

MAX_FLOATS = 2**24  # most floats a temporary of the final resize may hold: 64 MiB


class Scores(ABC):
    """Label scores of one resized photo: what every representation can do, some labels at a time."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of labels C."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Size (h, w) of the resized photo."""

    @property
    @abstractmethod
    def regions(self) -> Tensor:
        """(h, w) int64, the region of each pixel, numbered from 0 over the photo."""

    @abstractmethod
    def planes(self, start: int, stop: int) -> Tensor:
        """Scores of the labels from `start` to `stop`, (stop - start, h, w) float32."""

    def blocks(self, max_floats: int = MAX_FLOATS) -> Iterator[tuple[int, Tensor]]:
        """All labels in blocks of at most `max_floats` (one label at least): first number, planes."""
        step = max(1, max_floats // (self.size[0] * self.size[1]))
        for start in range(0, self.count, step):
            yield start, self.planes(start, min(start + step, self.count))

    def arg_max(self, height: int, width: int, max_floats: int = MAX_FLOATS) -> tuple[Tensor, Tensor]:
        """Resize the scores (bilinear, align_corners False) and take the best label of each pixel (step 6).

        Args:
            height: H.
            width: W.
            max_floats: most floats in any temporary.

        Returns:
            labels (H, W) int64, the first of equally good ones, and their scores (H, W) float32.
        """
        labels = scores = None
        for start, planes in self.blocks(max_floats):
            if labels is None or scores is None:
                labels = torch.zeros(height, width, dtype=torch.int64, device=planes.device)
                scores = torch.full((height, width), -torch.inf, device=planes.device)
            for rows, resized in resize_bands(planes, height, width, max_floats):
                best, winner = resized.max(dim=0)
                better = best > scores[rows]
                scores[rows] = torch.where(better, best, scores[rows])
                labels[rows] = torch.where(better, winner + start, labels[rows])
        assert labels is not None
        assert scores is not None
        return labels, scores

    def superpixel_means(self, ids: Tensor, max_floats: int = MAX_FLOATS) -> Tensor:
        """Mean of the resized scores inside each superpixel.

        Args:
            ids: (H, W) int64 superpixels from 0, on the scores' device.
            max_floats: most floats in a temporary of the resize.

        Returns:
            (S, C) float32; zero for numbers that do not occur.
        """
        S = int(ids.max()) + 1
        sums = torch.zeros(self.count, S, dtype=torch.float64, device=ids.device)
        for start, planes in self.blocks(max_floats):
            for rows, resized in resize_bands(planes, ids.shape[0], ids.shape[1], max_floats):
                part = sums[start : start + len(planes)]
                part.index_add_(1, ids[rows].flatten(), resized.flatten(1).double())
        area = torch.bincount(ids.flatten(), minlength=S).clamp(min=1)
        return (sums / area).float().mT


@dataclass(frozen=True, eq=False)
class ScoreMap(Scores):
    """Label scores of one resized photo whose pixels share few rows of scores.

    Attributes:
        palette: (K, C) float32, the distinct score rows.
        index: (h, w) int64, the row of each pixel.
        owner: (h, w) int64, the region of each pixel, numbered from 0 over the photo; where windows overlap,
            the first one's regions.
    """

    palette: Tensor
    index: Tensor
    owner: Tensor

    @property
    def regions(self) -> Tensor:
        """(h, w) int64, `owner`."""
        return self.owner

    @property
    def count(self) -> int:
        """C."""
        return self.palette.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.index.shape[0], self.index.shape[1]

    def planes(self, start: int, stop: int) -> Tensor:
        """Scores of the labels from `start` to `stop`, (stop - start, h, w) float32."""
        return self.palette[:, start:stop].T.contiguous()[:, self.index]

    def dense(self) -> Tensor:
        """The score map as (C, h, w); for small photos and tests."""
        return self.planes(0, self.count)

    def bands(self, height: int, width: int, max_floats: int = MAX_FLOATS) -> Iterator[Band]:
        """Bilinear resize (align_corners False) to (height, width): palette rows and their weights."""
        index, device = self.index, self.index.device
        top, bottom, down = bilinear_taps(index.shape[0], height, device)
        left, right, along = bilinear_taps(index.shape[1], width, device)
        lower = index[_following(index.shape[0], device)]
        following = _following(index.shape[1], device)
        mixed = (index != lower) | (index != index[:, following]) | (index != lower[:, following])
        step = max(1, max_floats // (6 * width))  # int64 rows and places, the caller's planes
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            first = index.index_select(0, top[rows]).index_select(1, left)  # (b, W)
            ys, xs = mixed.index_select(0, top[rows]).index_select(1, left).nonzero(as_tuple=True)
            yield Band(
                rows, first, ys, xs, (top[rows], bottom[rows], down[rows]), (left, right, along), index
            )

    def arg_max(self, height: int, width: int, max_floats: int = MAX_FLOATS) -> tuple[Tensor, Tensor]:
        """As `Scores.arg_max`, blending only where neighbours differ."""
        live = self.palette.any(dim=0)  # the top-label filter leaves few labels with any score at all
        live[0] = True  # wins where all are zero
        names = live.nonzero().flatten()  # (c,)
        palette = self.palette[:, names]  # (K, c)
        best, winner = palette.max(dim=1)  # (K,)
        labels = torch.empty(height, width, dtype=torch.int64, device=palette.device)
        scores = torch.empty(height, width, device=palette.device)
        step = max(1, max_floats // (2 * palette.shape[1]))
        for band in self.bands(height, width, max_floats):
            band_labels, band_scores = winner[band.first], best[band.first]  # right wherever neighbours agree
            for ys, xs, corners, weights in band.mixed(step):
                blend = palette.new_zeros(len(ys), palette.shape[1])
                for row, weight in zip(corners, weights, strict=True):
                    blend += weight[:, None] * palette[row]
                band_scores[ys, xs], band_labels[ys, xs] = blend.max(dim=1)
            labels[band.rows], scores[band.rows] = names[band_labels], band_scores
        return labels, scores

    def superpixel_means(self, ids: Tensor, max_floats: int = MAX_FLOATS) -> Tensor:
        """As `Scores.superpixel_means`: the resize is linear, so it is (share of every row) @ (rows)."""
        K, S = self.palette.shape[0], int(ids.max()) + 1
        shares = torch.zeros(S * K, dtype=torch.float64, device=ids.device)
        for band in self.bands(ids.shape[0], ids.shape[1], max_floats):
            base = ids[band.rows] * K
            shares += torch.bincount((base + band.first).flatten(), minlength=S * K)  # as if all agreed
            for ys, xs, corners, weights in band.mixed(max(1, max_floats // 8)):
                place = base[ys, xs]
                shares.index_add_(0, place + corners[0], weights.new_full((len(ys),), -1.0).double())
                for corner, weight in zip(corners, weights, strict=True):
                    shares.index_add_(0, place + corner, weight.double())
        area = torch.bincount(ids.flatten(), minlength=S).clamp(min=1)
        return (shares.view(S, K) / area[:, None] @ self.palette.double()).float()


@dataclass(frozen=True, eq=False)
class Band:
    """Some rows of a resized `ScoreMap`, b of them.

    Attributes:
        rows: which rows of the output.
        first: (b, W) int64, the palette row of each pixel's upper left neighbour.
        ys: rows, within the band, of the pixels whose four neighbours are not all of one palette row.
        xs: their columns.
        vertical: upper and lower neighbours and weights of the lower, (b,) each.
        horizontal: left and right neighbours and weights of the right, (W,) each.
        index: (h, w) the palette row of each pixel before the resize.
    """

    rows: slice
    first: Tensor
    ys: Tensor
    xs: Tensor
    vertical: tuple[Tensor, Tensor, Tensor]
    horizontal: tuple[Tensor, Tensor, Tensor]
    index: Tensor

    def mixed(self, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Pixels between different rows, at most `step` at a time.

        Yields:
            Rows and columns within the band (n,), palette rows of the four neighbours (4, n), weights (4, n).
        """
        (top, bottom, down), (left, right, along) = self.vertical, self.horizontal
        for start in range(0, len(self.ys), step):
            ys, xs = self.ys[start : start + step], self.xs[start : start + step]
            upper, lower, y, x = top[ys], bottom[ys], down[ys], along[xs]
            before, after = left[xs], right[xs]
            corners = [self.index[row, column] for row in (upper, lower) for column in (before, after)]
            weights = ((1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x)
            yield ys, xs, torch.stack(corners), torch.stack(weights)


def _following(count: int, device: torch.device) -> Tensor:
    """The next index of each, the last one's own."""
    return torch.arange(1, count + 1, device=device).clamp(max=count - 1)


def bilinear_taps(
    source: int, target: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear resize of one axis: low and high neighbours (target,) int64, weights of the high (target,)."""
    position = (torch.arange(target, dtype=torch.float64, device=device) + 0.5) * (source / target) - 0.5
    position = position.clamp(0, source - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=source - 1), (position - low).float()


def resize_bands(
    planes: Tensor, height: int, width: int, max_floats: int = MAX_FLOATS
) -> Iterator[tuple[slice, Tensor]]:
    """Bilinear resize (align_corners False) of (c, h, w) in bands: output rows as a slice, (c, b, W)."""
    if planes.shape[1:] == (height, width):
        yield slice(0, height), planes
        return
    top, bottom, down = bilinear_taps(planes.shape[1], height, planes.device)
    left, right, along = bilinear_taps(planes.shape[2], width, planes.device)
    step = max(1, max_floats // (4 * planes.shape[0] * max(planes.shape[2], width)))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        across = torch.lerp(planes[:, top[rows]], planes[:, bottom[rows]], down[rows, None])  # (c, b, w)
        yield rows, torch.lerp(across[..., left], across[..., right], along)


def merge_windows(
    size: tuple[int, int], windows: Sequence[Window], parts: Sequence[tuple[Tensor, Tensor]]
) -> ScoreMap:
    """Average the windows of one photo where they overlap (step 6).

    Args:
        size: (h, w) of the resized photo.
        windows: their places; together they cover the photo.
        parts: for each window its region map (h_i, w_i) int64 in 0..L-1, and its regions' scores (L, C).
    """
    device = parts[0][1].device
    index = torch.zeros(size, dtype=torch.int64, device=device)  # row of `total` for each pixel
    owner = torch.full(size, -1, dtype=torch.int64, device=device)
    total = torch.zeros(1, parts[0][1].shape[1], device=device)  # sum of the rows a pixel has met so far
    count = torch.zeros(1, device=device)
    for number, (window, (region, score)) in enumerate(zip(windows, parts, strict=True)):
        place, L = window.slices, score.shape[0]
        pairs, inverse = compact(index[place] * L + region, total.shape[0] * L)
        index[place] = inverse + total.shape[0]
        old, new = pairs // L, pairs % L
        total = torch.cat((total, total[old] + score[new]))
        count = torch.cat((count, count[old] + 1))
        owner[place] = torch.where(owner[place] < 0, region + number * L, owner[place])
    used, index = compact(index, total.shape[0])
    regions = compact(owner, len(windows) * max(score.shape[0] for _, score in parts))[1]
    return ScoreMap(total[used] / count[used, None], index, regions)


def compact(numbers: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """`torch.unique` with its inverse for numbers 0 to limit - 1, without sorting them.

    Returns:
        The numbers that occur, ascending, and for each entry of `numbers` its position among them.
    """
    occurs = torch.zeros(limit, dtype=torch.bool, device=numbers.device)
    occurs[numbers] = True
    return occurs.nonzero().flatten(), (occurs.cumsum(0) - 1)[numbers]
