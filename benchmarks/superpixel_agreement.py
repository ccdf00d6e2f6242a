"""Counted, not timed: how far other superpixels agree with ours, on 200 crops of scikit-image's photographs.

    python benchmarks/superpixel_agreement.py   # 3 minutes; prints the table

Writes results/superpixel_agreement.json. "Ours" is `felzenszwalb` in float64. Against it: float32,
scikit-image with a stable argsort and as shipped, OpenCV's graph segmentation, and the release's order, which
segments the stored picture and then cuts the label map instead of segmenting the training crop. A yardstick
for that order is what saving the crop as JPEG changes. What scikit-image does with equal weights is up to
NumPy's sort and so to the processor; nothing else depends on the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness.machine import commit, versions
from harness.pictures import PAPER, SIDE, crops, photo_paths
from PIL import Image
from reporting.superpixels import agreement_table
from scipy.optimize import linear_sum_assignment
from scipy.stats.contingency import crosstab

from segclip_fast.data.transforms import crop_box, cut_segments, resized_crop
from segclip_fast.ops import felzenszwalb, patch_labels

Setting = dict[str, float]
Box = tuple[int, int, int, int]  # top, left, height, width
Pair = tuple[np.ndarray, np.ndarray]  # label maps (H, W) of the same pixels, theirs and ours
RESULT = Path(__file__).parent / "results" / "superpixel_agreement.json"
SETTINGS: tuple[Setting, ...] = (
    PAPER,
    {"scale": 100.0, "sigma": 0.8, "min_size": 20},
    {"scale": 1.0, "sigma": 0.8, "min_size": 20},
    {"scale": 100.0, "sigma": 0.0, "min_size": 20},
)
IMAGES, PATCH, AREA = 200, 16, (0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON to write")
    parser.add_argument("--images", type=int, default=IMAGES, help="crops")
    options = parser.parse_args()
    if not photo_paths():
        parser.error("scikit-image's photographs are missing")
    run = count(options.images)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(run, indent=1) + "\n")
    print(agreement_table(run))


def count(images: int) -> dict[str, Any]:
    """All rows: every setting with every other implementation, then the release's order at the paper's."""
    pictures = crops(images)
    rows = []
    for setting in SETTINGS:
        ours = [felzenszwalb(picture, **setting) for picture in pictures]
        for name, segment in others(setting).items():
            pairs = zip(map(segment, pictures), ours, strict=True)
            rows.append({"setting": setting, "theirs": name} | summary(pairs))
    photos = [Image.open(path).convert("RGB") for path in photo_paths()]
    small, large = [stored(photo) for photo in photos], [np.asarray(photo) for photo in photos]
    for name, pairs in {
        "the release's order, pictures as it stores them": in_both_orders(small, PAPER, images),
        "the release's order, pictures at full size": in_both_orders(large, PAPER, images),
        "ours, crops saved once more as JPEG (quality 95)": with_and_without_jpeg(small, PAPER, images),
    }.items():
        rows.append({"setting": PAPER, "theirs": name} | summary(pairs))
    return {
        "command": "python benchmarks/superpixel_agreement.py",
        "commit": commit(),
        "versions": versions() | {"opencv": opencv_version()},
        "simd": np.show_config(mode="dicts")["SIMD Extensions"].get("found", []),
        "images": images,
        "side": SIDE,
        "patch": PATCH,
        "rows": rows,
    }


# --- what is compared with ours


def others(setting: Setting) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name, what turns a picture (H, W, 3) uint8 into labels (H, W)."""
    from skimage.segmentation import felzenszwalb as scikit

    found = {
        "float32": lambda picture: felzenszwalb(picture, **setting, precision="float32"),
        "scikit-image, stable argsort": lambda picture: stable_scikit(picture, setting),
        "scikit-image as shipped": lambda picture: scikit(picture, **setting),
    }
    if opencv_version() is not None:
        found["OpenCV"] = lambda picture: opencv(picture, setting)
    return found


def stable_scikit(picture: np.ndarray, setting: Setting) -> np.ndarray:
    """scikit-image's labels (H, W) of a picture (H, W, 3), equal weights in the order of their edges."""
    from skimage.segmentation import felzenszwalb as scikit

    plain = np.argsort
    with mock.patch.object(np, "argsort", lambda a, *_, **__: plain(a, kind="stable")):
        return scikit(picture, **setting)


def opencv(picture: np.ndarray, setting: Setting) -> np.ndarray:
    """OpenCV's labels (H, W) of a picture (H, W, 3)."""
    from cv2.ximgproc.segmentation import createGraphSegmentation

    k, least = setting["scale"], int(setting["min_size"])
    return createGraphSegmentation(setting["sigma"], k, least).processImage(picture)


def opencv_version() -> str | None:
    """None where OpenCV, or its contributed part, is missing."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2.__version__ if hasattr(cv2, "ximgproc") else None


def stored(photo: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, the shorter side 224: how the release keeps its pictures, but for the JPEG."""
    width, height = photo.size
    ratio = max(width, height) / min(width, height)
    size = (SIDE, int(SIDE * ratio)) if width < height else (int(SIDE * ratio), SIDE)
    return np.asarray(photo.resize(size, Image.Resampling.LANCZOS))


def training_crops(wholes: list[np.ndarray], count: int) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Random resized crops, the same every time.

    Args:
        wholes: stored pictures (H, W, 3) uint8, cropped in turn.
        count: crops to draw.

    Yields:
        Index of the picture, (top, left, height, width) in it, and the crop (224, 224, 3) uint8.
    """
    rng = random.Random(0)
    for i in range(count):
        index = i % len(wholes)
        box = crop_box(*wholes[index].shape[:2], AREA, rng)
        yield index, box, resized_crop(wholes[index], box, SIDE)


def in_both_orders(wholes: list[np.ndarray], setting: Setting, count: int) -> Iterator[Pair]:
    """Two label maps (224, 224) of each training crop: cut from the stored picture's; segmented as it is."""
    maps = [felzenszwalb(whole, **setting) for whole in wholes]  # each (H, W)
    for index, box, crop in training_crops(wholes, count):
        yield cut_segments(maps[index], box, SIDE), felzenszwalb(crop, **setting)


def with_and_without_jpeg(wholes: list[np.ndarray], setting: Setting, count: int) -> Iterator[Pair]:
    """Two label maps (224, 224) of each training crop: after JPEG at quality 95; segmented as it is."""
    for _, _, crop in training_crops(wholes, count):
        file = io.BytesIO()
        Image.fromarray(crop).save(file, "JPEG", quality=95)
        saved = np.asarray(Image.open(file))
        yield felzenszwalb(saved, **setting), felzenszwalb(crop, **setting)


# --- how far two label maps agree


@dataclass(frozen=True)
class Agreement:
    """Two label maps of one image.

    Attributes:
        differs: whether they are different partitions, whatever the segments are called.
        rand: adjusted Rand index.
        segments_theirs: how many there are.
        segments_ours: how many there are.
        majority_changed: share of patches whose majority label differs, segments renamed to fit best.
        mean_changed: the same for the cut-off mean of the label numbers, which the release takes.
        mean_numbers_changed: share of patches whose cut-off means are different numbers.
    """

    differs: bool
    rand: float
    segments_theirs: int
    segments_ours: int
    majority_changed: float
    mean_changed: float
    mean_numbers_changed: float


def agreement(theirs: np.ndarray, ours: np.ndarray) -> Agreement:
    """Compare two label maps (H, W) of non-negative integers; sides divisible by 16."""
    table = contingency(theirs, ours)
    majority = [patch_labels(labels, PATCH) for labels in (theirs, ours)]  # (h, w) each
    mean = [patch_labels(labels, PATCH, how="mean") for labels in (theirs, ours)]
    return Agreement(
        differs=not np.count_nonzero(table) == table.shape[0] == table.shape[1],
        rand=adjusted_rand_index(table),
        segments_theirs=table.shape[0],
        segments_ours=table.shape[1],
        majority_changed=changed_share(contingency(*majority)),
        mean_changed=changed_share(contingency(*mean)),
        mean_numbers_changed=float(np.mean(mean[0] != mean[1])),
    )


def contingency(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """How many places (...) carry each pair of labels: (labels of theirs, labels of ours) integers."""
    return crosstab(theirs.ravel(), ours.ravel()).count


def adjusted_rand_index(table: np.ndarray) -> float:
    """Agreement of two partitions above chance (Hubert and Arabie, J. of Classification 1985, Eq. 5).

    Args:
        table: (A, B) contingency table.

    Returns:
        1 for equal partitions, about 0 for independent ones.
    """

    def couples(counts: np.ndarray) -> float:
        return float((counts.astype(np.float64) * (counts - 1) / 2).sum())

    both, theirs, ours = couples(table), couples(table.sum(axis=1)), couples(table.sum(axis=0))
    everything = couples(table.sum())
    chance = theirs * ours / everything if everything else 0.0
    most = (theirs + ours) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)  # both one segment, or all single


def changed_share(table: np.ndarray) -> float:
    """Share of places whose labels differ after the best one-to-one renaming.

    Args:
        table: (A, B) contingency table.
    """
    rows, columns = linear_sum_assignment(table, maximize=True)
    return 1.0 - float(table[rows, columns].sum() / table.sum())


def summary(pairs: Iterable[Pair]) -> dict[str, float]:
    """Means over the images, and the worst Rand index."""
    found = [agreement(theirs, ours) for theirs, ours in pairs]
    means = {name: float(np.mean([getattr(a, name) for a in found])) for name in vars(found[0])}
    return means | {"rand_least": min(a.rand for a in found)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
