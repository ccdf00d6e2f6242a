"""Models of other papers behind the interface of the evaluation, to be compared on the same harness.

Shapes: B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..data.transforms import CLIP_MEAN, CLIP_STD


def patch_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of `images` (B, 3, H, W).

    Raises:
        ValueError: wrong shape or dtype, or sides that are no multiples of `patch` pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: expected (B, 3, H, W) floating point, got {tuple(images.shape)} {images.dtype}"
        )
    height, width = images.shape[2:]
    if not height or not width or height % patch or width % patch:
        raise ValueError(
            f"images: expected sides divisible by the patch size {patch}, got {height} x {width}"
        )
    return height // patch, width // patch


def renormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """CLIP-normalised images (B, 3, H, W) as another mean and deviation would have normalised their pixels.

    An affine change of every channel: with pixels p = CLIP_STD x + CLIP_MEAN it is (p - mean) / std.

    Args:
        images: CLIP-normalised.
        mean: of red, green and blue pixels in 0..1.
        std: their deviations.
    """
    if tuple(mean) == CLIP_MEAN and tuple(std) == CLIP_STD:
        return images
    scale = [ours / theirs for ours, theirs in zip(CLIP_STD, std, strict=True)]
    shift = [(ours - theirs) / s for ours, theirs, s in zip(CLIP_MEAN, mean, std, strict=True)]
    return images * images.new_tensor(scale)[:, None, None] + images.new_tensor(shift)[:, None, None]
