"""Images to segment, and scikit-image's answer, for the tests of every implementation of felzenszwalb."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

PAPER = {"scale": 224.0, "sigma": 0.9, "min_size": 224}  # SegCLIP's superpixels
MIDDLE = {"scale": 100.0, "sigma": 0.8, "min_size": 20}
TIES = {"scale": 1.0, "sigma": 0.0, "min_size": 5}  # unblurred 8-bit values: most weights are equal to others
SETTINGS = {"paper": PAPER, "middle": MIDDLE, "ties": TIES}

SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".npy"}


@functools.cache
def pictures() -> dict[str, np.ndarray]:
    """Every picture inside the installed scikit-image, (H, W) or (H, W, C), uint8 but for a few in float64.

    Files with several pages are taken apart: `name[page]`. Alpha channels are kept.
    """
    skimage = pytest.importorskip("skimage")
    from skimage import io

    found = {}
    for path in sorted((Path(skimage.__file__).parent / "data").iterdir()):
        if path.suffix not in SUFFIXES:
            continue
        data = np.load(path) if path.suffix == ".npy" else io.imread(path)
        if data.ndim == 2 or (data.ndim == 3 and data.shape[-1] in (3, 4)):
            found[path.name] = data
        else:
            found.update({f"{path.name}[{page}]": np.ascontiguousarray(x) for page, x in enumerate(data)})
    assert len(found) >= 10, "scikit-image came without its pictures"
    return found


def crops(count: int, side: int, seed: int) -> Iterator[np.ndarray]:
    """`count` uint8 (side, side[, 3]) crops at random places, of all pictures that large in turn."""
    rng = np.random.default_rng(seed)
    large = [x for x in pictures().values() if x.dtype == np.uint8 and min(x.shape[:2]) >= side]
    for picture in itertools.islice(itertools.cycle(large), count):
        y, x = (int(rng.integers(0, n - side + 1)) for n in picture.shape[:2])
        crop = picture[y : y + side, x : x + side]
        yield np.ascontiguousarray(crop[..., :3] if crop.ndim == 3 else crop)


def drawn(count: int, side: int, seed: int) -> np.ndarray:
    """(count, side, side, 3) uint8 pictures that need no files: shaded discs on a ground, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    found = np.empty((count, side, side, 3), np.uint8)
    for picture in found:
        values = np.zeros((side, side, 3))
        for disc in range(12):
            cy, cx, radius = rng.random(3)
            inside = ((y - cy) ** 2 + (x - cx) ** 2 < (radius / 3) ** 2)[..., None] | (disc == 0)
            shade = rng.random(3) * 150 + 60 * (y * rng.random() + x * rng.random())[..., None]
            values = np.where(inside, shade, values)
        picture[:] = (values + rng.normal(0, rng.choice([0, 2, 8]), values.shape)).clip(0, 255)
    return found


def adversarial(seed: int) -> tuple[np.ndarray, dict[str, float]]:
    """A tiny image with many ties, (H, W) or (H, W, C), of any dtype, and a setting."""
    rng = np.random.default_rng(seed)
    H, W = [(1, rng.integers(1, 65)), (rng.integers(1, 65), 1), (1, 1), *[tuple(rng.integers(1, 13, 2))] * 5][
        rng.integers(0, 8)
    ]
    C = int(rng.choice([1, 1, 2, 3, 3, 3, 5, 7, 8, 9, 17, 130]))
    y, x, c = np.ogrid[:H, :W, :C]
    levels = int(rng.integers(2, 5))
    kinds = [
        rng.integers(0, levels, (H, W, C)) * (255 // (levels - 1)),
        np.full((H, W, C), rng.integers(0, 256)),
        (y + x + c) % 2 * rng.integers(1, 256),
        (y * rng.integers(0, 9) + x * rng.integers(0, 9) + c) % 256,
        rng.integers(0, 256, (H, W, C)),
        (y // 2 + x // 3) % levels * 40 + c % 2,
    ]
    image = np.broadcast_to(kinds[rng.integers(0, len(kinds))], (H, W, C)).astype(np.uint8)
    image = [image, image / 255, (image / 255).astype(np.float32), rng.random((H, W, C))][rng.integers(0, 4)]
    image = image[:, :, 0] if C == 1 and rng.integers(0, 2) else image
    scale = float(rng.choice([0, 1, 20, 100, 224, 1000, 5000]))
    sigma = float(rng.choice([0, 0, 0.3, 0.5, 0.8, 0.9, 2, rng.uniform(0, 2)]))
    return image, {"scale": scale, "sigma": sigma, "min_size": int(rng.choice([0, 1, 2, 3, 5, 20, 224]))}


def skimage_stable(image: np.ndarray, **setting: float) -> np.ndarray:
    """scikit-image with a stable argsort; the default one orders ties as the CPU's SIMD sort happens to."""
    segmentation = pytest.importorskip("skimage.segmentation")
    plain = np.argsort

    def stable(a, *args, **kwargs):
        return plain(a, kind="stable")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more than 3 channels
        patch.setattr(np, "argsort", stable)
        return segmentation.felzenszwalb(image, **setting)
