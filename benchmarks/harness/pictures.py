"""What the model is fed: crops of scikit-image's photographs, their superpixels, and captions."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.captions import TOKENS
from segclip_fast.ops import felzenszwalb, patch_labels

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png")
PAPER = {"scale": 224.0, "sigma": 0.9, "min_size": 224}  # SegCLIP's superpixels
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 224


def photo_paths() -> list[Path]:
    """Those of the photographs that come with this installation of scikit-image; it may be missing.

    scikit-image is not imported: its wheel alone, without what it depends on, will do.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "data"
    return [folder / name for name in PHOTOS if (folder / name).exists()]


@functools.cache
def crops(count: int) -> tuple[np.ndarray, ...]:
    """`count` uint8 (224, 224, 3) crops at random places of the photographs, the same every time.

    Where there are none, blocky random pictures, so that the sizes and the work stay the same.
    """
    rng = np.random.default_rng(0)
    if not photo_paths():
        blocks = rng.integers(0, 256, (count, 14, 14, 3), dtype=np.uint8)
        return tuple(block.repeat(16, axis=0).repeat(16, axis=1) for block in blocks)
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in photo_paths()]
    found = []
    for i in range(count):
        photo = photos[i % len(photos)]
        y, x = (int(rng.integers(0, n - SIDE + 1)) for n in photo.shape[:2])
        found.append(np.ascontiguousarray(photo[y : y + SIDE, x : x + SIDE]))
    return tuple(found)


@functools.cache
def superpixels(count: int, patch: int) -> Tensor:
    """(count, 224 / patch, 224 / patch) int64: the superpixel that holds most of each patch of `crops`.

    Blocks of 4 x 4 patches where the compiled extension is missing.
    """
    images = torch.from_numpy(np.stack(crops(count))).permute(0, 3, 1, 2)
    try:
        labels = felzenszwalb(images, **PAPER)
    except ImportError:
        rows = torch.arange(SIDE // patch) // 4
        return (rows[:, None] * len(rows) + rows).expand(count, -1, -1).contiguous()
    return patch_labels(labels, patch).to(torch.int64)


def images(count: int) -> Tensor:
    """(count, 3, 224, 224) float32, normalised as CLIP wants it; crops repeat from 32 on."""
    distinct = torch.from_numpy(np.stack(crops(min(count, 32)))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((distinct - mean) / std).repeat(-(-count // 32), 1, 1, 1)[:count].contiguous()


def patch_superpixels(count: int, patch: int) -> Tensor:
    """(count, h, w) labels of the patches of `images`."""
    return superpixels(min(count, 32), patch).repeat(-(-count // 32), 1, 1)[:count].contiguous()


def tokens(count: int) -> Tensor:
    """(count, 32) int64 ids of the captions in turn."""
    table = torch.zeros(len(TOKENS), 32, dtype=torch.int64)
    for row, ids in zip(table, TOKENS, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return table.repeat(-(-count // len(table)), 1)[:count].contiguous()
