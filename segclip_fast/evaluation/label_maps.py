"""Label maps of the segmentation data sets: from the values in a PNG file to labels, by a table.

Shape legend: H W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import load_segments
from ..data.sample import IGNORE_LABEL
from .class_names import COCO_IDS, COCO_THING_IDS, COCO_UNUSED_IDS

FILE_LABELS = 256  # values of an 8-bit label map
REFUSED = -1  # in a table: a value that the data set does not have


def label_table(classes: int, *, skip_zero: bool = False, ignore: bool = True) -> np.ndarray:
    """What each value of a label map means, (256,) int64: a label, 255 (ignored) or -1 (must not occur).

    Args:
        classes: number of labels.
        skip_zero: the file's 0 is ignored, its 1 is label 0, and so on.
        ignore: the file may hold 255.
    """
    table = np.full(FILE_LABELS, REFUSED, dtype=np.int64)
    first = int(skip_zero)
    table[:first] = IGNORE_LABEL
    table[first : first + classes] = np.arange(classes)
    if ignore:
        table[IGNORE_LABEL] = IGNORE_LABEL
    return table


def coco_stuff_table() -> np.ndarray:
    """COCO-Stuff's pixel maps -> 171 classes, (256,) int64: ids without the eleven unused ones, closed up."""
    table = np.full(FILE_LABELS, REFUSED, dtype=np.int64)
    used = np.setdiff1d(np.arange(COCO_IDS), COCO_UNUSED_IDS)
    table[used] = np.arange(len(used))
    table[IGNORE_LABEL] = IGNORE_LABEL
    return table


def coco_object_table() -> np.ndarray:
    """COCO-Stuff's pixel maps -> COCO-Object, (256,) int64: the 80 things 1..80, all else and 255 are 0."""
    table = np.full(FILE_LABELS, REFUSED, dtype=np.int64)
    table[:COCO_IDS] = 0
    table[IGNORE_LABEL] = 0
    things = np.setdiff1d(np.arange(COCO_THING_IDS), COCO_UNUSED_IDS)
    table[things] = np.arange(1, len(things) + 1)
    return table


def read_labels(path: str | Path, table: np.ndarray, *, name: str = "mask") -> np.ndarray:
    """Read a label map and translate its values.

    Args:
        path: a PNG file, grey or palette.
        table: (256,) int64, see `label_table`.
        name: what error messages call the file.

    Returns:
        (H, W) int64.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken, no PNG, colours instead of labels, or a value that the table refuses.
    """
    path = Path(path)
    values = load_segments(path, name=name)
    with Image.open(path) as picture:
        mode, storage = picture.mode, str(getattr(picture, "tile", ""))
    few_bits = next((bits for bits in (2, 4) if f"L;{bits}'" in storage), None)  # Pillow stretches those
    if mode == "RGB" or few_bits:
        kind = "colours" if mode == "RGB" else f"grey with {few_bits} bits"
        raise ValueError(f"{name}: expected labels as 8-bit grey or palette, got {kind} in {str(path)!r}")
    labels = table[values.clip(0, FILE_LABELS - 1)]
    refused = (labels == REFUSED) | (values < 0) | (values >= FILE_LABELS)
    if refused.any():
        wrong = np.unique(values[refused]).tolist()
        allowed = _ranges(np.flatnonzero(table != REFUSED))
        got = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(f"{name}: expected labels {allowed}, got {got} in {str(path)!r}")
    return labels


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low} to {high}" if high > low else str(low) for low, high in runs)
