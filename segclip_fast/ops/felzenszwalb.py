"""Superpixels by graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004).

The compiled op, on CPU and CUDA, and its NumPy twin agree label for label; in float64, the default, so does
scikit-image's `felzenszwalb` with a stable argsort.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import functools
import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from . import felzenszwalb_cuda
from ._extension import extension

Array = TypeVar("Array", np.ndarray, Tensor)
PRECISIONS = ("float64", "float32")
MAX_PIXELS = 2**30  # per image: an edge is packed into 32 bits, 2 of them for its direction
MAX_SIGMA = 1e4
MAX_INT = 2**31 - 1


def felzenszwalb(
    image: Array,
    *,
    scale: float = 1.0,
    sigma: float = 0.8,
    min_size: int = 20,
    threads: int = 0,
    precision: str = "float64",
) -> Array:
    """Segments images into superpixels, one image per thread.

    SegCLIP's superpixels use scale 224, sigma 0.9, min_size 224.

    Args:
        image: a NumPy (H, W) or (H, W, C) image, or a tensor of B images (B, C, H, W). uint8 is scaled to
            [0, 1]; float32 and float64 are taken as they are and should lie in [0, 1]. Any strides.
        scale: larger values give fewer, larger segments.
        sigma: standard deviation of the Gaussian blur, in pixels; 0 for none.
        min_size: smaller segments are joined to a neighbour, in pixels.
        threads: at most this many threads, one image each; 0 uses every core this process may run on, but
            only one in a worker process of a PyTorch DataLoader, whose siblings have the others.
        precision: "float64" is exact; "float32" computes pixels, blur and edge weights in float32: less time
            and memory, and at SegCLIP's setting the same labels for all but one photograph in about 300.

    Returns:
        Labels 0, 1, ... numbered by first appearance in raster order: int64 (H, W) for a NumPy image, int32
        (B, H, W) on the same device for a tensor.

    Raises:
        TypeError: image is neither an array nor a tensor, or its dtype is not uint8, float32 or float64.
        ValueError: wrong number of dimensions, no pixels or channels, more than 2^30 pixels in one image,
            NaN or infinity (in float32 also values that do not fit), or a parameter out of range.
        NotImplementedError: image is a tensor that is not on the CPU.
        ImportError: the compiled extension is missing.
    """
    _check_parameters(scale, sigma, min_size, threads, precision)
    single = precision == "float32"
    if isinstance(image, Tensor):
        _check_tensor(image)
        return torch.ops.segclip_fast.felzenszwalb(
            image, float(scale), float(sigma), int(min_size), int(threads), single
        )
    batch = _with_channels(image)[None]  # (1, H, W, C)
    return _segment(batch, scale, sigma, min_size, threads, single, planar=False)[0].astype(np.int64)


def felzenszwalb_ref(
    image: np.ndarray,
    *,
    scale: float = 1.0,
    sigma: float = 0.8,
    min_size: int = 20,
    threads: int = 0,
    precision: str = "float64",
) -> np.ndarray:
    """Plain-NumPy twin of `felzenszwalb` for one image, the specification; `threads` is ignored.

    Returns:
        (H, W) int64 labels.
    """
    _check_parameters(scale, sigma, min_size, threads, precision)
    pixels = _real_ref(_with_channels(image), np.dtype(precision))
    weights, first, second = _edges_ref(_blur_ref(pixels, sigma))
    order = np.argsort(weights, kind="stable").tolist()  # ties: in the order of _edges_ref
    k = scale / 255.0
    parent = list(range(pixels.shape[0] * pixels.shape[1]))
    size = [1] * len(parent)
    threshold = [float(np.float32(k))] * len(parent)  # Int(C) + k / |C|, rounded to float32

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = x = parent[parent[x]]
        return x

    def join(a: int, b: int) -> int:
        root, child = min(a, b), max(a, b)
        parent[child] = root
        size[root] += size[child]
        return root

    for e in order:
        a, b, weight = find(first[e]), find(second[e]), float(weights[e])
        if a != b and weight < min(threshold[a], threshold[b]):
            root = join(a, b)
            threshold[root] = float(np.float32(weight + k / size[root]))
    for e in order:
        a, b = find(first[e]), find(second[e])
        if a != b and min(size[a], size[b]) < min_size:
            join(a, b)
    roots = [find(x) for x in range(len(parent))]  # smallest pixel of each segment, so ranks are raster order
    return np.unique(roots, return_inverse=True)[1].reshape(pixels.shape[:2]).astype(np.int64)


# --- twin: the steps before merging


def _real_ref(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Pixels as float64 or float32; uint8 is multiplied by 1/255 rounded to that type, not divided."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        real = pixels.astype(dtype)
    if not np.isfinite(real).all():
        raise ValueError("image: expected finite values, got NaN or infinity")
    return real * dtype.type(1.0 / 255) if pixels.dtype == np.uint8 else real


def _blur_ref(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (H, W, C) down the columns, then along the rows, mirrored borders."""
    taps = np.array(_gaussian_taps(float(sigma)), pixels.dtype)
    radius = len(taps) - 1
    for axis in (0, 1) if radius >= 0 else ():
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.moveaxis(np.pad(pixels, pad, mode="symmetric"), axis, 0)
        n = pixels.shape[axis]
        blurred = padded[radius : radius + n] * taps[0]
        for j in range(radius, 0, -1):  # from the far taps inwards: the order decides the last bit
            blurred = (
                blurred
                + (padded[radius - j : radius - j + n] + padded[radius + j : radius + j + n]) * taps[j]
            )
        pixels = np.ascontiguousarray(np.moveaxis(blurred, 0, axis))
    return pixels


def _edges_ref(pixels: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Weight (E,), first and second pixel of every edge of the 8-connected grid of (H, W, C)."""
    H, W, _ = pixels.shape
    index = np.arange(H * W).reshape(H, W)
    to, back, all_ = slice(1, None), slice(None, -1), slice(None)
    pairs = [
        ((all_, back), (all_, to)),  # right
        ((back, all_), (to, all_)),  # down
        ((back, back), (to, to)),  # down-right
        ((back, to), (to, back)),  # up-right
    ]
    weights = [np.sqrt(np.sum((pixels[b] - pixels[a]) * (pixels[b] - pixels[a]), axis=-1)) for a, b in pairs]
    first = np.concatenate([index[a].ravel() for a, _ in pairs]).tolist()
    second = np.concatenate([index[b].ravel() for _, b in pairs]).tolist()
    return np.concatenate([w.ravel() for w in weights]), first, second


# --- the compiled op


@functools.lru_cache(maxsize=32)
def _gaussian_taps(sigma: float) -> tuple[float, ...]:
    """Right half of the normalised Gaussian cut at 4 sigma; empty for sigma 0.

    Computed by NumPy, as scikit-image does: its vectorised exp may differ from C++'s in the last bit.
    """
    if sigma <= 1e-15:
        return ()
    radius = int(4.0 * sigma + 0.5)
    taps = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    return tuple((taps / taps.sum())[radius:].tolist())


def _segment(
    batch: np.ndarray, scale: float, sigma: float, min_size: int, threads: int, single: bool, planar: bool
) -> np.ndarray:
    """(B, H, W, C), or (B, C, H, W) if planar -> (B, H, W) int32."""
    if not batch.flags.aligned or any(stride % batch.itemsize for stride in batch.strides):
        batch = np.ascontiguousarray(batch)
    if threads == 0 and get_worker_info() is not None:
        threads = 1
    taps = _gaussian_taps(float(sigma))
    return extension().felzenszwalb(
        batch,
        float(scale),
        float(sigma),
        int(min_size),
        int(threads),
        planar=planar,
        taps=taps,
        single=single,
    )


def _felzenszwalb_cpu(
    image: Tensor, scale: float, sigma: float, min_size: int, threads: int, single: bool
) -> Tensor:
    pixels = image.detach().numpy()  # (B, C, H, W)
    return torch.from_numpy(_segment(pixels, scale, sigma, min_size, threads, single, planar=True))


def _felzenszwalb_cuda(
    image: Tensor, scale: float, sigma: float, min_size: int, threads: int, single: bool
) -> Tensor:
    return felzenszwalb_cuda.segment(
        extension(), image.detach(), scale, _gaussian_taps(float(sigma)), min_size, single
    )


def _felzenszwalb_fake(
    image: Tensor, scale: float, sigma: float, min_size: int, threads: int, single: bool
) -> Tensor:
    B, _, H, W = image.shape
    return image.new_empty((B, H, W), dtype=torch.int32)


_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "felzenszwalb(Tensor image, float scale, float sigma, int min_size, int threads, bool single) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("felzenszwalb", _felzenszwalb_cpu, "CPU")
_library.impl("felzenszwalb", _felzenszwalb_cuda, "CUDA")
torch.library.register_fake("segclip_fast::felzenszwalb", _felzenszwalb_fake, lib=_library)


# --- checks


def _check_parameters(scale: float, sigma: float, min_size: int, threads: int, precision: str) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale: expected a finite number >= 0, got {scale}")
    if not 0 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma: expected a number from 0 to {MAX_SIGMA:g}, got {sigma}")
    if not 0 <= min_size <= MAX_INT:
        raise ValueError(f"min_size: expected an integer from 0 to {MAX_INT}, got {min_size}")
    if not 0 <= threads <= MAX_INT:
        raise ValueError(f"threads: expected an integer from 0 (all cores) to {MAX_INT}, got {threads}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")


def _check_tensor(image: Tensor) -> None:
    if image.ndim != 4:
        raise ValueError(f"image: expected a tensor (B, C, H, W), got shape {tuple(image.shape)}")
    if image.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise TypeError(f"image: expected uint8, float32 or float64, got {image.dtype}")
    _check_size(image.shape[-2], image.shape[-1], image.shape[1], tuple(image.shape))
    if image.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"image: expected a tensor on the CPU or CUDA, got one on {image.device}; pass image.cpu()"
        )


def _with_channels(image: np.ndarray) -> np.ndarray:
    """A checked NumPy image as (H, W, C)."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a NumPy array or a tensor, got {type(image).__name__}")
    if image.ndim not in (2, 3):
        raise ValueError(f"image: expected an array (H, W) or (H, W, C), got shape {image.shape}")
    if image.dtype not in (np.uint8, np.float32, np.float64):
        raise TypeError(f"image: expected uint8, float32 or float64, got {image.dtype}")
    pixels = image[:, :, None] if image.ndim == 2 else image
    _check_size(pixels.shape[0], pixels.shape[1], pixels.shape[2], image.shape)
    return pixels


def _check_size(height: int, width: int, channels: int, shape: tuple[int, ...]) -> None:
    if height == 0 or width == 0 or channels == 0:
        raise ValueError(f"image: expected at least one pixel and one channel, got shape {shape}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"image: expected at most 2^30 pixels, got shape {shape}")
