"""From stored pictures to network input: random resized crop and CLIP's normalisation.

Shapes: H W pixels, S side of the training crop.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10


def normalise(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 or [0, 255] float RGB to (3, H, W) float32, CLIP mean and deviation."""
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    return standardise(pixels, *pixel_statistics(pixels.device))


def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of CLIP's pixels in 0..255, each (3, 1, 1) float32 on `device`."""
    mean, deviation = (255.0 * torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return mean.to(device), deviation.to(device)


def standardise(pixels: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 or [0, 255] float to float32; the same bits on every device."""
    return (pixels.to(torch.float32) - mean) / deviation


def crop_box(
    height: int, width: int, area: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """A random (top, left, height, width) inside an image, of random area share and aspect 3:4 to 4:3.

    Ten attempts, then the largest central crop of an allowed aspect. Drawn in the order area, aspect, top,
    left.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        area: smallest and largest share of the image's area.
        rng: source of the numbers.
    """
    for _ in range(ATTEMPTS):
        target = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cut (top, left, height, width) out of an (H, W, 3) uint8 image, bicubic to (size, size, 3)."""
    top, left, height, width = box
    if (height, width) == (size, size):
        return image[top : top + height, left : left + width]
    picture = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def cut_segments(segments: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cut (top, left, height, width) out of an (H, W) label map, nearest neighbour to (size, size).

    The release's rule: output pixel i shows source pixel floor(i * height / size), and a box of less than two
    pixels in a direction gives the whole map. (Its boxes are fractions of the picture, which int(x0 * W) and
    ceil(x1 * W) turn back into this box.)
    """
    top, left, height, width = box
    if min(height, width) >= 2:
        segments = segments[top : top + height, left : left + width]
    rows, columns = (np.arange(size) * extent // size for extent in segments.shape)
    return segments[rows[:, None], columns]
