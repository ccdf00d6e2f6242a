"""One superpixel label for every patch of the vision transformer.

Compiled on CPU and CUDA; the plain twin serves where the extension, or its CUDA part, is missing.
Shapes: B batch, H W pixels, h w patches.
"""

from __future__ import annotations

import functools
import logging
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from . import felzenszwalb_cuda
from ._extension import extension

Array = TypeVar("Array", np.ndarray, Tensor)
HOW = ("majority", "mean")
_log = logging.getLogger("segclip_fast")


def patch_labels(labels: Array, patch: int, how: str = "majority") -> Array:
    """One superpixel label per square patch.

    Args:
        labels: (B, H, W) or (H, W) integers, array or tensor; H and W divisible by patch.
        patch: side of a patch, in pixels.
        how: "majority" takes the most frequent label, the smallest of several; "mean" the arithmetic mean of
            the label numbers cut towards zero, as the released SegCLIP does.

    Returns:
        (B, h, w) or (h, w) int64, array or tensor like `labels`.

    Raises:
        TypeError: labels are not integers.
        ValueError: wrong number of dimensions, sides not divisible by patch, or an unknown `how`.
    """
    tensor = _label_tensor(labels, patch, how)
    result = torch.ops.segclip_fast.patch_labels(tensor, patch, how == "mean")
    return result if isinstance(labels, Tensor) else result.numpy()


def patch_labels_ref(labels: Array, patch: int, how: str = "majority") -> Array:
    """Plain-PyTorch twin of `patch_labels`; the specification."""
    result = _patch_labels_torch(_label_tensor(labels, patch, how), patch, how == "mean")
    return result if isinstance(labels, Tensor) else result.numpy()


def _patch_labels_torch(labels: Tensor, patch: int, mean: bool) -> Tensor:
    grid = labels.to(torch.int64).unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # (..., h, p, w, p)
    cells = grid.transpose(-3, -2).flatten(-2)  # (..., h, w, p * p)
    if mean:
        return torch.div(cells.sum(dim=-1), patch * patch, rounding_mode="trunc")
    return _smallest_mode(cells)


def _smallest_mode(cells: Tensor) -> Tensor:
    """Most frequent value of the last axis, the smallest of several."""
    ordered = cells.sort(dim=-1).values
    index = torch.arange(ordered.shape[-1], device=ordered.device).expand(ordered.shape)
    starts = torch.zeros_like(index)
    starts[..., 1:] = torch.where(ordered[..., 1:] != ordered[..., :-1], index[..., 1:], 0)
    run = index - starts.cummax(dim=-1).values  # how many equal values came before
    best = run.argmax(dim=-1, keepdim=True)  # the first, hence smallest, of the longest runs
    return ordered.gather(-1, best).squeeze(-1)


# --- the compiled op


def _patch_labels(labels: Tensor, patch: int, mean: bool) -> Tensor:
    try:
        compiled = extension()
    except ImportError:
        _announce_twin("the compiled extension is missing")
        return _patch_labels_torch(labels, patch, mean)
    if labels.is_cuda and not compiled.cuda_build()["compiled"]:
        _announce_twin("the extension was built without CUDA")
        return _patch_labels_torch(labels, patch, mean)
    maps = labels.detach() if labels.ndim == 3 else labels.detach()[None]  # (B, H, W)
    maps = maps if maps.dtype in (torch.int32, torch.int64) else maps.to(torch.int64)
    if labels.is_cuda:
        result = felzenszwalb_cuda.label_patches(compiled, maps, patch, mean)
    else:  # PyTorch's thread count is 1 in the worker processes of a DataLoader
        threads = torch.get_num_threads()
        result = torch.from_numpy(compiled.patch_labels(maps.numpy(), patch, mean, threads))
    return result if labels.ndim == 3 else result[0]


def _patch_labels_fake(labels: Tensor, patch: int, mean: bool) -> Tensor:
    *batch, H, W = labels.shape
    return labels.new_empty((*batch, H // patch, W // patch), dtype=torch.int64)


@functools.cache
def _announce_twin(reason: str) -> None:
    """Say once that patch labels take the slow way."""
    _log.info("patch_labels: served by plain PyTorch, because %s", reason)


_library = torch.library.Library("segclip_fast", "FRAGMENT")
_library.define(
    "patch_labels(Tensor labels, int patch, bool mean) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("patch_labels", _patch_labels, "CPU")
_library.impl("patch_labels", _patch_labels, "CUDA")
torch.library.register_fake("segclip_fast::patch_labels", _patch_labels_fake, lib=_library)


# --- checks


def _label_tensor(labels: np.ndarray | Tensor, patch: int, how: str) -> Tensor:
    """Checked label maps as a tensor; of an array a view, or a copy where PyTorch cannot take it as it is."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = np.require(labels, labels.dtype.newbyteorder("="), ["C", "A", "W"])
    tensor = torch.as_tensor(labels)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {tensor.dtype}")
    if tensor.ndim not in (2, 3):
        raise ValueError(f"labels: expected (B, H, W) or (H, W), got {tuple(tensor.shape)}")
    if patch < 1 or tensor.shape[-2] % patch or tensor.shape[-1] % patch:
        raise ValueError(f"labels: expected sides divisible by patch {patch}, got {tuple(tensor.shape)}")
    if how not in HOW:
        raise ValueError(f"how: expected one of {HOW}, got {how!r}")
    return tensor
