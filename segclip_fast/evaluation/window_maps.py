"""Maps of scores that keep their windows apart: for GPUs, and for dense models.

Shape legend: C labels (with the background column where there is one), h w the resized photo, H W the photo's
own size, L regions of a window, M windows of a photo, S superpixels, (r, c) grid of patches of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .score_map import MAX_FLOATS, ScoreMap, Scores, merge_windows

if TYPE_CHECKING:
    from .windows import Window


@dataclass(frozen=True, eq=False)
class WindowMap(Scores):
    """Label scores of one resized photo as a grouping model's windows gave them, for GPUs.

    Finding the rows that a palette needs takes dozens of small operations and waits for the device. A GPU
    adds up and resizes whole planes of labels sooner, as many labels at a time as memory allows.

    Attributes:
        windows: places of the windows; together they cover the photo.
        parts: of each window its region map (h_i, w_i) int64 in 0..L-1, and its regions' scores (L, C).
        photo: (h, w) of the resized photo.
    """

    windows: Sequence[Window]
    parts: Sequence[tuple[Tensor, Tensor]]
    photo: tuple[int, int]

    @property
    def count(self) -> int:
        """C."""
        return self.parts[0][1].shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.photo

    @cached_property
    def palette(self) -> ScoreMap:
        """The same scores as rows and an index."""
        return merge_windows(self.photo, self.windows, self.parts)

    @property
    def regions(self) -> Tensor:
        """(h, w) int64, numbered from 0 over the photo; where windows overlap, the first one's regions."""
        return self.palette.regions

    def planes(self, start: int, stop: int) -> Tensor:
        """Scores of the labels from `start` to `stop`, the mean over the windows that cover a pixel."""
        total = self.parts[0][1].new_zeros(stop - start, *self.photo)
        for (regions, scores), window in zip(self.parts, self.windows, strict=True):
            total[(slice(None), *window.slices)] += scores[:, start:stop].T[:, regions]
        if len(self.windows) > 1:
            total /= coverage(self.photo, tuple(self.windows), total.device)
        return total

    def arg_max(self, height: int, width: int, max_floats: int = 4 * MAX_FLOATS) -> tuple[Tensor, Tensor]:
        """As `Scores.arg_max`."""
        if self.count * height * width > max_floats:
            return super().arg_max(height, width, max_floats)
        planes = self.planes(0, self.count)[None]
        resized = F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
        scores, labels = resized.max(dim=0)
        return labels, scores

    def superpixel_means(self, ids: Tensor, max_floats: int = MAX_FLOATS) -> Tensor:
        """As `Scores.superpixel_means`, by the palette."""
        return self.palette.superpixel_means(ids, max_floats)


@lru_cache(maxsize=64)
def coverage(size: tuple[int, int], windows: tuple[Window, ...], device: torch.device) -> Tensor:
    """How many windows cover each pixel, (h, w) float32. Kept: photos of one size share it; do not write."""
    cover = torch.zeros(size)
    for window in windows:
        cover[window.slices] += 1.0
    return cover.to(device)


@dataclass(frozen=True, eq=False)
class PatchMap(Scores):
    """Label scores of one resized photo, a row for each patch of each window, upsampled bilinearly.

    Attributes:
        grids: (M, C, r, c) float32, scores of the patches of each window.
        windows: their M places; together they cover the photo.
        padded: size in pixels that a window was padded to, which its grid covers.
        photo: (h, w) of the resized photo.
    """

    grids: Tensor
    windows: Sequence[Window]
    padded: tuple[int, int]
    photo: tuple[int, int]

    @property
    def count(self) -> int:
        """C."""
        return self.grids.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.photo

    @cached_property
    def _labels(self) -> Tensor:
        return torch.unique(self.arg_max(*self.photo)[0], return_inverse=True)[1]

    @property
    def regions(self) -> Tensor:
        """A dense model has no regions: the pixels of one label are one, (h, w) int64."""
        return self._labels

    def planes(self, start: int, stop: int) -> Tensor:
        """Scores of the labels from `start` to `stop`, the mean over the windows that cover a pixel."""
        total = self.grids.new_zeros(stop - start, *self.photo)
        for grid, window in zip(self.grids[:, start:stop], self.windows, strict=True):
            upsampled = F.interpolate(grid[None], self.padded, mode="bilinear", align_corners=False)[0]
            total[(slice(None), *window.slices)] += upsampled[:, : window.height, : window.width]
        return total / coverage(self.photo, tuple(self.windows), total.device)
