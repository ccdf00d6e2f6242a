"""Compressed run lengths: answers worked out by hand, a twin by single characters, round trips."""

from __future__ import annotations

import numpy as np
import pytest

from segclip_fast.evaluation.coco_rle import decode, encode, encode_label_map, pack_counts, unpack_counts

# Runs, and their characters by hand. 16 has its fifth bit set, so a second group must show that it is not
# negative: 16 + 32 + 48 = "`", then 0 + 48 = "0". 2 after 5 is -3, 29 in five bits: 29 + 48 = "M".
KNOWN = [
    ([1], "1"),
    ([0, 1], "01"),
    ([1, 3], "13"),
    ([15], "?"),
    ([16], "`0"),
    ([1, 5, 1, 2], "151M"),
    ([1000], "Xo0"),  # 8 + 32, 31 + 32, 0
    ([0, 40, 3, 8], "0X13PO"),  # 40 is 8 and 1; 8 - 40 = -32 is 0 and -1 (31)
    ([2, 1, 1, 1, 1], "21100"),
]


def pack_by_character(counts: list[int]) -> str:
    text = ""
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        while True:
            bits, rest = rest & 31, rest >> 5
            last = rest == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if last else 32))
            if last:
                break
    return text


def runs_by_pixel(mask: np.ndarray) -> list[int]:
    counts, value = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if bool(mask[y, x]) != value:
                counts, value = [*counts, 0], not value
            counts[-1] += 1
    return counts


@pytest.mark.parametrize(("counts", "text"), KNOWN, ids=[text for _, text in KNOWN])
def test_known_answers(counts, text):
    assert pack_counts(np.array(counts)) == text
    assert unpack_counts(text).tolist() == counts
    assert unpack_counts(text.encode()).tolist() == counts
    assert pack_by_character(counts) == text


def test_known_mask():
    mask = np.array([[0, 1, 1], [1, 1, 0]])  # columns 01, 11, 10: runs 1, 4, 1
    assert encode(mask) == {"size": [2, 3], "counts": "141"}
    assert decode({"size": [2, 3], "counts": "141"}).tolist() == mask.astype(bool).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_numbers_as_the_twin(seed):
    rng = np.random.default_rng(seed)
    counts = np.floor(2 ** rng.uniform(0, 1 + 2 * seed, size=rng.integers(1, 200))).astype(np.int64)
    text = pack_counts(counts)
    assert text == pack_by_character(counts.tolist())
    np.testing.assert_array_equal(unpack_counts(text), counts)


def masks():
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 7), (7, 1), (5, 9), (64, 33)]:
        yield np.zeros((height, width), bool)
        yield np.ones((height, width), bool)
        yield rng.random((height, width)) < 0.5
        yield np.kron(rng.random((height, width)) < 0.5, np.ones((41, 3))) > 0  # long runs


@pytest.mark.parametrize("mask", list(masks()), ids=lambda mask: f"{mask.shape}-{mask.mean():.2f}")
def test_masks_round_trip_and_match_the_twin(mask):
    rle = encode(mask)
    assert rle == {"size": list(mask.shape), "counts": pack_by_character(runs_by_pixel(mask))}
    back = decode(rle)
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (1, 6), (13, 17), (50, 40)], ids=str)
def test_label_map_is_its_masks(shape):
    rng = np.random.default_rng(1)
    labels = 3 * rng.integers(0, 4, shape)  # 0, 3, 6, 9: some labels have no pixel
    labels[: shape[0] // 2] = 9
    scores = rng.random(shape, dtype=np.float32)
    found = encode_label_map(labels, scores)
    assert [entry.label for entry in found] == np.unique(labels).tolist()
    for entry in found:
        mask = labels == entry.label
        assert entry.segmentation == encode(mask)
        assert entry.area == mask.sum()
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)
        assert entry.bbox == box
        assert entry.score == pytest.approx(scores[mask].mean(dtype=np.float64))


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": "142"}, "counts: expected runs that add up to 6, .* got 7"),
        ({"size": [2, 3], "counts": "1M8"}, "got 6, some negative"),  # 1, -3, 8
        ({"size": [2, 3], "counts": "14a"}, "ends within one"),
        ({"size": [2, 3], "counts": "14 "}, "counts: expected the characters '0' to 'o'"),
        ({"size": [2, 3], "counts": "14é"}, "counts: expected the characters '0' to 'o'"),
        ({"size": [2, 3], "counts": "o" * 13 + "0"}, "at most 12 characters, got 14"),
        ({"size": [2, 3], "counts": ""}, "got 0"),
    ],
    ids=lambda value: value["counts"] if isinstance(value, dict) else "",
)
def test_broken_counts(rle, message):
    with pytest.raises(ValueError, match=message):
        decode(rle)


def test_wrong_shapes():
    with pytest.raises(ValueError, match="mask: expected an array"):
        encode(np.zeros((2, 3, 1)))
    for labels, scores in [((2, 3), (3, 2)), ((0, 3), (0, 3)), ((6,), (6,))]:
        with pytest.raises(ValueError, match="labels: expected a non-empty"):
            encode_label_map(np.zeros(labels, int), np.zeros(scores))


def test_nothing_packs_to_nothing():
    assert pack_counts(np.array([], dtype=np.int64)) == ""
    assert unpack_counts("").tolist() == []
