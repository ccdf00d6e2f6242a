"""Photos in, score maps out: resize, sliding windows, and common batches of the windows of all photos.

Shape legend: B windows in a batch, E joint embedding, C labels (with the background column where there is
one), h w the resized photo or a window of it, H W the photo's own size.

Step numbers are those of the official evaluation protocol: 1 resize, 2 windows, 3 region map, 4 label scores
of a region, 5 background (`scoring`), 6 average, resize, arg max (`score_map`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require
from ..data.images import resize_bilinear_tensor, resize_bilinear_uint8
from ..data.transforms import pixel_statistics, standardise
from .score_map import Scores, merge_windows
from .scoring import PROTOCOLS, Background, PatchScores, Protocol, RegionScores, score_windows
from .segmenter import Segmenter
from .window_maps import PatchMap, WindowMap

LONG_SIDE = 2048  # protocol step 1: no photo is made longer than this
CPU_BATCH = 32  # windows per call of the image encoder
MOST_BATCH = 512
MEMORY_SHARE = 0.4  # of the free memory of a GPU, for one batch of windows

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
T = TypeVar("T")
_LOGGER = logging.getLogger("segclip_fast")


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


def resize_on(image: np.ndarray | Tensor, short: int, device: torch.device) -> np.ndarray | Tensor:
    """As `resize_short_side`, on the device where that is a GPU, and the same bits there.

    Args:
        image: (H, W, 3) uint8.
        short: short side of the result in pixels.
        device: where the model is.

    Returns:
        (h, w, 3) uint8, on the GPU or as it came.
    """
    if device.type != "cuda":
        return image if isinstance(image, Tensor) else resize_short_side(image, short)
    pixels = torch.as_tensor(image).to(device, non_blocking=True)
    size = short_side_size(image.shape[0], image.shape[1], short)
    return pixels if size == tuple(image.shape[:2]) else resize_bilinear_tensor(pixels, size)


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


# --- many photos at once


@contextmanager
def evaluation_mode(model: Segmenter) -> Iterator[None]:
    """Evaluation mode without gradients for the block; a training model returns to training afterwards."""
    training = model.training
    if training:  # telling every module takes milliseconds
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()


@dataclass(frozen=True)
class Sliding:
    """How photos become windows and windows scores.

    Attributes:
        protocol: "official" or "paper", see `scoring.score_windows`.
        short_side: short side in pixels after resizing; the model's image size by default.
        stride: step between windows in pixels; the window side, which is the model's image size, by default.
        batch_size: windows per call of the image encoder; by default 32 on a CPU, and on a GPU what the free
            memory holds. Changes nothing but speed and memory.
        precision: of the image encoder; scores are computed in float32 in any case.

    Raises:
        ValueError: an option out of range.
    """

    protocol: Protocol = "official"
    short_side: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        choices = f"one of {', '.join(PROTOCOLS)}"
        require(self.protocol in PROTOCOLS, "protocol", choices, self.protocol)
        for name, unit in (("short_side", "pixels"), ("batch_size", "windows")):
            value = getattr(self, name)
            require(value is None or value >= 1, name, f"a positive number of {unit}", value)
        choices = f"one of {', '.join(PRECISIONS)}"
        require(self.precision in PRECISIONS, "precision", choices, self.precision)


def score_images(
    model: Segmenter,
    images: Sequence[np.ndarray],
    labels: Tensor | Sequence[Tensor],
    background: Background = Background(),  # noqa: B008  frozen
    sliding: Sliding = Sliding(),  # noqa: B008  frozen
) -> list[Scores]:
    """Score the windows of all photos in common batches; filters and thresholds stay per window.

    Args:
        model: the crop is its image size.
        images: (H, W, 3) uint8 RGB each, any sizes.
        labels: (C, E) normalised label features for all photos, or one such tensor for each.
        background: how background is found; its column comes first.
        sliding: protocol, resolution, batches.

    Returns:
        A map for each photo, on the model's device.

    Raises:
        ValueError: an option out of range.
    """
    short = model.image_size if sliding.short_side is None else sliding.short_side
    device = next(model.parameters()).device
    resized = [resize_on(image, short, device) for image in images]
    return score_resized(model, resized, labels, background, sliding)


def score_resized(
    model: Segmenter,
    resized: Sequence[np.ndarray | Tensor],
    labels: Tensor | Sequence[Tensor],
    background: Background,
    sliding: Sliding,
) -> list[Scores]:
    """As `score_images`, for photos (h, w, 3) uint8 that have their size already (step 1)."""
    crop, weight = model.image_size, next(model.parameters())
    texts = [labels] * len(resized) if isinstance(labels, Tensor) else list(labels)
    moved = {id(text): text.to(weight.device).float() for text in texts}
    texts = [moved[id(text)] for text in texts]
    mean, deviation = pixel_statistics(weight.device)
    pixels = [torch.as_tensor(image).to(weight.device, non_blocking=True) for image in resized]
    pixels = [standardise(image.permute(2, 0, 1), mean, deviation) for image in pixels]  # (3, h, w)
    stride = crop if sliding.stride is None else sliding.stride
    plans = [plan_windows(p.shape[1], p.shape[2], crop, stride) for p in pixels]
    same_size: dict[tuple[int, int], list[tuple[int, int]]] = {}  # window size -> photo and window numbers
    for i, plan in enumerate(plans):
        for j, window in enumerate(plan):
            same_size.setdefault((window.height, window.width), []).append((i, j))
    found: dict[tuple[int, int], RegionScores | PatchScores] = {}

    def encode(keys: Sequence[tuple[int, int]]) -> None:
        batch = torch.stack([pixels[i][(..., *plans[i][j].slices)] for i, j in keys])
        found.update(_score_batch(model, batch, keys, texts, background, sliding))

    with evaluation_mode(model):
        for members in same_size.values():
            in_batches(encode, members, sliding.batch_size or batch_for(model))
    return [
        _merge((p.shape[1], p.shape[2]), plan, [found[i, j] for j in range(len(plan))])
        for i, (p, plan) in enumerate(zip(pixels, plans, strict=True))
    ]


def _score_batch(
    model: Segmenter,
    batch: Tensor,
    keys: Sequence[tuple[int, int]],
    texts: Sequence[Tensor],
    background: Background,
    sliding: Sliding,
) -> dict[tuple[int, int], RegionScores | PatchScores]:
    """One pass of the image encoder over (B, 3, h, w); windows with the same labels are scored together."""
    size = (batch.shape[2], batch.shape[3])
    padded = pad_to_patch(batch, model.patch_size)
    weight = next(model.parameters())
    dtype = PRECISIONS[sliding.precision]
    with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
        features = model.encode_image(padded.to(weight.dtype))
    groups: dict[int, list[int]] = {}  # which rows of the batch share their labels
    for row, (photo, _) in enumerate(keys):
        groups.setdefault(id(texts[photo]), []).append(row)
    scored: dict[tuple[int, int], RegionScores | PatchScores] = {}
    for rows in groups.values():
        part = features if len(rows) == len(keys) else _rows(features, rows)
        text, place = texts[keys[rows[0]][0]], (padded.shape[2], padded.shape[3])
        scores = score_windows(model, part, text, size, place, background, sliding.protocol)
        scored.update({keys[row]: _one(scores, k) for k, row in enumerate(rows)})
    return scored


def _rows(features: Any, rows: list[int]) -> Any:
    """Some images of a batch of features."""
    return type(features)(**{part.name: getattr(features, part.name)[rows] for part in fields(features)})


def _one(scores: RegionScores | PatchScores, number: int) -> RegionScores | PatchScores:
    """One window of a batch, without the batch dimension."""
    if isinstance(scores, PatchScores):
        return PatchScores(scores.grids[number], scores.padded)
    return RegionScores(scores.regions[number], scores.scores[number])


def _merge(
    size: tuple[int, int], plan: Sequence[Window], parts: Sequence[RegionScores | PatchScores]
) -> Scores:
    """The windows of one photo, without batch dimension, as its map of scores."""
    patches = [part for part in parts if isinstance(part, PatchScores)]
    if patches:
        return PatchMap(torch.stack([part.grids for part in patches]), plan, patches[0].padded, size)
    regions = [part for part in parts if isinstance(part, RegionScores)]
    pairs = [(part.regions, part.scores) for part in regions]
    if pairs[0][1].is_cuda:
        return WindowMap(plan, pairs, size)
    return merge_windows(size, plan, pairs)


def batch_for(model: Segmenter) -> int:
    """Windows per batch: 32 on a CPU; on a GPU what 40 % of its free memory holds, 512 at most.

    A window is reckoned at 20 times its tokens in float32 (a block's inputs, projections and MLP) and 32 maps
    of its size (soft regions upsampled). Where that is too little, `in_batches` halves the batch.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return CPU_BATCH
    width = next((m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 1024)
    tokens = (model.image_size // model.patch_size + 1) ** 2
    window_bytes = 4 * (20 * tokens * width + 32 * model.image_size**2)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(MOST_BATCH, int(MEMORY_SHARE * free) // window_bytes))


def in_batches(call: Callable[[Sequence[T]], None], items: Sequence[T], size: int) -> None:
    """Call with `size` items at a time; a batch too large for the GPU's memory is tried again by halves.

    Raises:
        torch.OutOfMemoryError: a single item is too large.
    """
    start = 0
    while start < len(items):
        try:
            call(items[start : start + size])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            _LOGGER.warning("batch_size: out of memory, going on with %d windows at a time", size)
        else:
            start += size
            continue
        torch.cuda.empty_cache()  # outside of the handler, whose traceback keeps the batch alive
