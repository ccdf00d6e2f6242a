"""Masks as COCO-style results hold them: run lengths down the columns, packed into printable characters.

A mask is read column by column. Its runs alternate between 0 and 1, beginning with a run of 0 that may be
empty. From the fourth run on, the difference to the run two places before stands for the length. Each number
is cut into groups of five bits, the lowest first, up to the group that also shows the sign in its top bit; a
group is one character, chr(48 + bits), or chr(48 + 32 + bits) if another group of the number follows.

Shape legend: H W pixels, n runs, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

_BITS = 5  # of a number in one character
_MORE = 32  # flag of a character that is not its number's last
_ZERO = 48  # character of the number 0
_MOST_GROUPS = 12  # 60 bits: every number fits in int64


class Rle(TypedDict):
    """A mask: `size` [H, W] and `counts`, the packed run lengths."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class LabelMask:
    """The pixels of one label in a label map.

    Attributes:
        label: the label.
        segmentation: its mask.
        area: pixels.
        bbox: left, top, width, height in pixels.
        score: mean score of its pixels.
    """

    label: int
    segmentation: Rle
    area: int
    bbox: tuple[int, int, int, int]
    score: float


# --- numbers and characters --------------------------------------------------------------------------------


def pack_counts(counts: np.ndarray) -> str:
    """Run lengths (n,) of integers, none negative, as characters."""
    counts = np.asarray(counts, dtype=np.int64)
    values = counts.copy()
    values[3:] -= counts[1:-2]
    groups = np.ones(len(values), dtype=np.int64)  # characters of each number
    for k in range(1, _MOST_GROUPS):
        half = 1 << (_BITS * k - 1)
        longer = (values < -half) | (values >= half)  # does not fit k groups with its sign
        if not longer.any():
            break
        groups += longer
    place = np.arange(groups.max(initial=1))
    digits = (values[:, None] >> (_BITS * place)) & (_MORE - 1)  # (n, most groups)
    digits += np.where(place < groups[:, None] - 1, _MORE, 0) + _ZERO
    return digits[place < groups[:, None]].astype(np.uint8).tobytes().decode("ascii")


def unpack_counts(text: str | bytes) -> np.ndarray:
    """Characters as run lengths (n,) int64.

    Raises:
        ValueError: not such a string, or one that ends in the middle of a number.
    """
    data = text.encode("latin-1", "replace") if isinstance(text, str) else bytes(text)
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - _ZERO
    if ((codes < 0) | (codes >= 2 * _MORE)).any():
        raise ValueError(f"counts: expected the characters '0' to 'o', got {_excerpt(text)}")
    if not len(codes):
        return codes
    last = np.flatnonzero(codes < _MORE)  # (n,), last character of each number
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError(f"counts: expected whole numbers, got {_excerpt(text)}, which ends within one")
    first = np.append(0, last[:-1] + 1)
    groups = last - first + 1
    if groups.max() > _MOST_GROUPS:
        raise ValueError(f"counts: expected numbers of at most {_MOST_GROUPS} characters, got {groups.max()}")
    place = np.arange(len(codes)) - np.repeat(first, groups)
    values = np.add.reduceat((codes & (_MORE - 1)) << (_BITS * place), first)
    values -= np.where(codes[last] & (_MORE // 2), 1 << (_BITS * groups), 0)  # sign
    for start in (1, 2):  # differences to the run two before
        values[start::2] = np.cumsum(values[start::2])
    return values


def _excerpt(text: str | bytes) -> str:
    return repr(text if len(text) <= 40 else text[:40]) + ("..." if len(text) > 40 else "")


# --- masks -------------------------------------------------------------------------------------------------


def encode(mask: np.ndarray) -> Rle:
    """A mask (H, W) of bool, or of zeros and other numbers, as `size` and `counts`.

    Raises:
        ValueError: not a 2-D array.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask: expected an array (H, W), got shape {mask.shape}")
    flat = (mask != 0).T.ravel()  # column by column
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if len(flat) and flat[0] else []  # the empty run of 0
    counts = np.diff(np.concatenate((first, [0], edges, [len(flat)])).astype(np.int64))
    return {"size": [*mask.shape], "counts": pack_counts(counts)}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """A mask (H, W) bool from `size` and `counts` (str or bytes).

    Raises:
        ValueError: `counts` is broken, or its runs do not add up to H * W.
    """
    height, width = rle["size"]
    counts = unpack_counts(rle["counts"])
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"counts: expected runs that add up to {height * width}, the pixels of {height} x {width}, "
            f"got {counts.sum()}" + (", some negative" if (counts < 0).any() else "")
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def encode_label_map(labels: np.ndarray, scores: np.ndarray) -> list[LabelMask]:
    """The mask of every label present, by one pass over the pixels for all labels together.

    Args:
        labels: (H, W) of integers, none negative.
        scores: (H, W) floats, averaged over each label's pixels.

    Returns:
        One entry per label present, in the order of the labels.

    Raises:
        ValueError: no pixels, or shapes that differ.
    """
    if labels.ndim != 2 or not labels.size or labels.shape != scores.shape:
        raise ValueError(
            f"labels: expected a non-empty (H, W) of the scores' shape, got {labels.shape} and {scores.shape}"
        )
    height, width = labels.shape
    flat = labels.T.ravel()  # column by column
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)  # of the runs of one label
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    order = np.argsort(owners, kind="stable")
    present, first = np.unique(owners[order], return_index=True)
    totals = np.bincount(labels.ravel(), weights=scores.ravel())
    found = []
    for label, runs in zip(present.tolist(), np.split(order, first[1:]), strict=True):
        start, end = starts[runs], ends[runs]  # apart from each other: two runs of a label never touch
        edges = np.stack((start, end), axis=1).ravel()
        rest = [flat.size] if end[-1] < flat.size else []
        counts = np.diff(np.concatenate(([0], edges, rest)).astype(np.int64))
        area = int((end - start).sum())
        rle: Rle = {"size": [height, width], "counts": pack_counts(counts)}
        found.append(LabelMask(label, rle, area, _box(start, end, height), float(totals[label]) / area))
    return found


def _box(start: np.ndarray, end: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of the pixels start..end - 1 of columns of `height`."""
    last = end - 1
    left, right = int(start[0] // height), int(last[-1] // height)
    if (start // height != last // height).any():  # a run over the end of a column has both borders
        return left, 0, right - left + 1, height
    top, bottom = int((start % height).min()), int((last % height).max())
    return left, top, right - left + 1, bottom - top + 1
