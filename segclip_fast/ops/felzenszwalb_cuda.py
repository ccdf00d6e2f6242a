"""Superpixels and patch labels of tensors in GPU memory: `_C`'s kernels on the caller's stream.

Nothing here waits for the GPU. Same labels as on the CPU, bit for bit (csrc/felzenszwalb_device.h).
Shapes: B batch, C channels, H W pixels, h w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

MAX_PIXELS = 2**24  # per image
MAX_CHANNELS = 128
WORKSPACE_BYTES = 2 << 30  # a batch that needs more runs in parts, one after the other


def segment(
    extension: ModuleType, image: Tensor, scale: float, taps: Sequence[float], min_size: int, single: bool
) -> Tensor:
    """Superpixels by `_C`'s kernels.

    Args:
        extension: `segclip_fast._C`.
        image: (B, C, H, W) uint8, float32 or float64 on CUDA, any strides.
        scale: as for `felzenszwalb`.
        taps: right half of the blur's kernel; empty for none.
        min_size: as for `felzenszwalb`.
        single: weights in float32 instead of float64.

    Returns:
        (B, H, W) int32 labels; -1 all over an image with NaN or infinity, which could not be refused without
        waiting for the GPU.

    Raises:
        NotImplementedError: the extension was built without CUDA.
        ValueError: more than 2^24 pixels in an image or more than 128 channels.
    """
    if not extension.cuda_build()["compiled"]:
        raise NotImplementedError(
            "felzenszwalb: segclip_fast._C was built without CUDA; build it where nvcc is (WITH_CUDA=on pip "
            "install .) or pass image.cpu()"
        )
    B, C, H, W = image.shape
    if H * W > MAX_PIXELS or C > MAX_CHANNELS:
        raise ValueError(
            f"image: expected at most 2^24 pixels and {MAX_CHANNELS} channels on CUDA, got shape "
            f"{tuple(image.shape)}; image.cpu() may have more"
        )
    labels = torch.empty((B, H, W), dtype=torch.int32, device=image.device)
    if B == 0:
        return labels
    request = extension.CudaFelzenszwalb(
        image.data_ptr(),
        str(image.dtype).removeprefix("torch."),
        tuple(image.shape),
        image.stride(),
        scale=scale,
        min_size=min_size,
        taps=taps,
        single=single,
    )
    one, two = request.workspace_bytes(1), request.workspace_bytes(2)
    at_a_time = min(B, max(1, (WORKSPACE_BYTES - one) // (two - one) + 1))
    workspace = torch.empty(request.workspace_bytes(at_a_time), dtype=torch.uint8, device=image.device)
    request.run(
        labels.data_ptr(), workspace.data_ptr(), workspace.numel(), workspace.get_device(), _stream(image)
    )
    return labels


def label_patches(extension: ModuleType, labels: Tensor, patch: int, mean: bool) -> Tensor:
    """Patch labels by `_C`'s kernel, which replaces about a dozen launches and a sort.

    Args:
        extension: `segclip_fast._C`.
        labels: (B, H, W) int32 or int64 on CUDA.
        patch: side of a patch, a divisor of H and W.
        mean: the mean of the labels instead of the most frequent one.

    Returns:
        (B, h, w) int64.
    """
    B, H, W = labels.shape
    labels = labels.contiguous()
    out = torch.empty((B, H // patch, W // patch), dtype=torch.int64, device=labels.device)
    extension.patch_labels_cuda(
        labels.data_ptr(),
        labels.dtype == torch.int64,
        (B, H, W),
        patch,
        mean,
        out.data_ptr(),
        labels.get_device(),
        _stream(labels),
    )
    return out


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream
