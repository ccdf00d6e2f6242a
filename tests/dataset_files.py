"""Tiny data sets in the standard layouts, for the tests of their readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from segclip_fast.evaluation.datasets import SegmentationSet, open_dataset

SIZE = (6, 9)  # height, width
UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}

# name: pictures and masks of two images, further files, the largest label in the masks
LAYOUTS = {
    "voc": (
        [f"JPEGImages/2007_00003{i}.jpg" for i in (3, 4)],
        [f"SegmentationClass/2007_00003{i}.png" for i in (3, 4)],
        {"ImageSets/Segmentation/val.txt": "2007_000033\n2007_000034\n"},
        20,
    ),
    "context": (
        [f"JPEGImages/2008_00000{i}.jpg" for i in (2, 3)],
        [f"SegmentationClassContext/2008_00000{i}.png" for i in (2, 3)],
        {"ImageSets/SegmentationContext/val.txt": "2008_000002\n2008_000003"},
        59,
    ),
    "coco_object": (
        [f"images/val2017/000000000{i}.jpg" for i in (139, 285)],
        [f"annotations/val2017/000000000{i}_instanceTrainIds.png" for i in (139, 285)],
        {},
        80,
    ),
    "coco_stuff": (
        [f"images/val2017/000000000{i}.jpg" for i in (139, 285)],
        [f"annotations/val2017/000000000{i}.png" for i in (139, 285)],
        {},
        181,
    ),
    "ade20k": (
        [f"images/validation/ADE_val_0000000{i}.jpg" for i in (1, 2)],
        [f"annotations/validation/ADE_val_0000000{i}.png" for i in (1, 2)],
        {},
        150,
    ),
    "cityscapes": (
        [f"leftImg8bit/val/{i}_000000_000019_leftImg8bit.png" for i in ("bonn/bonn", "ulm/ulm")],
        [f"gtFine/val/{i}_000000_000019_gtFine_labelTrainIds.png" for i in ("bonn/bonn", "ulm/ulm")],
        {},
        18,
    ),
    "folder": (
        ["images/a.JPG", "images/deep/b.png"],
        ["masks/a.png", "masks/deep/b.png"],
        {"labels.txt": "background\nzebra\nlava lamp\n"},
        2,
    ),
}
LAYOUTS["voc20"], LAYOUTS["context59"] = LAYOUTS["voc"], LAYOUTS["context"]


def save(path: Path, values: np.ndarray, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette:
        picture = picture.convert("P")
        picture.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
        picture.putdata(values.ravel().tolist())
    picture.save(path)
    return path


def photo(seed: int, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def values_of(name: str) -> np.ndarray:
    """A mask with the smallest and largest values that the data set's files hold."""
    top = LAYOUTS[name][3]
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[1], mask[2], mask[3, :5] = 1, top, top - 1
    if name != "coco_object":
        mask[4] = 255
    return mask


def build(root: Path, name: str) -> Path:
    pictures, masks, texts, _ = LAYOUTS[name]
    for seed, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        save(root / picture, photo(seed))
        save(root / mask, values_of(name), palette=name.startswith(("voc", "context")))
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def reopen(root: Path, name: str) -> SegmentationSet:
    return open_dataset(name, root, partial=True)
