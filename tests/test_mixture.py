"""Mixtures: proportions, no repetition before exhaustion, permutations that are ones; synthetic pairs."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from torch.utils.data import DataLoader

from segclip_fast.data.mixture import Mixture, Permutation, Synthetic, mix
from segclip_fast.data.sample import RawSample
from segclip_fast.data.scenes import SceneSource
from segclip_fast.ops import felzenszwalb


class Numbers:
    """Sample i says which it is."""

    def __init__(self, name: str, length: int, class_names=()) -> None:
        self.name, self.length, self.class_names = name, length, class_names

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return RawSample(np.zeros((1, 1, 3), np.uint8), f"{self.name}{index}", np.zeros((1, 1), np.int64))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_permutations_take_every_value_once(length):
    orders = [[Permutation(length, key)(index) for index in range(length)] for key in (0, 1, 2**64 - 1)]
    for order in orders:
        assert sorted(order) == list(range(length))
    assert length < 15 or orders[0] != orders[1] != orders[2] != list(range(length))


def test_permutations_of_large_lengths():
    permutation = Permutation(10**12 + 7, 3)
    values = [permutation(index) for index in range(2000)]
    assert len(set(values)) == 2000
    assert 0 <= min(values) < 10**10
    assert 9.9e11 < max(values) < 10**12 + 7
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        Permutation(0, 1)


def test_permutations_look_random():
    """Over many keys every value comes to every place equally often (chi-squared, 0.1 % bounds)."""
    length, keys = 11, 4000
    counts = np.zeros((length, length))
    for key in range(keys):
        permutation = Permutation(length, mix(5, key))
        for index in range(length):
            counts[index, permutation(index)] += 1
    expected = keys / length
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert 60 < statistic < 150  # 100 degrees of freedom


@pytest.mark.parametrize(
    ("weights", "length", "counts"),
    [
        ((1, 3), 1000, [250, 750]),
        ((0.1, 0.2, 0.7), 999, [100, 200, 699]),
        ((1, 1, 1), 100, [34, 33, 33]),
        ((5,), 7, [7]),
        ((1e-9, 1), 50, [0, 50]),
        ((2.9e6, 12.4e6), 4096, [776, 3320]),
    ],
)
def test_proportions_are_exact_over_the_whole_length(weights, length, counts):
    mixture = Mixture([(Numbers("abc"[i], 37), w) for i, w in enumerate(weights)], length, seed=4)
    assert mixture.counts == counts
    drawn = Counter(mixture.locate(index)[0] for index in range(length))
    assert [drawn[number] for number in range(len(weights))] == counts


def test_proportions_hold_in_every_part():
    mixture = Mixture([(Numbers("a", 10**6), 1), (Numbers("b", 10**6), 2), (Numbers("c", 10), 5)], 4096)
    sources = np.array([mixture.locate(index)[0] for index in range(4096)])
    for size in (64, 256, 1024):
        for number, weight in enumerate((1, 2, 5)):
            parts = (sources.reshape(-1, size) == number).sum(1)
            assert np.abs(parts - size * weight / 8).max() <= 2


def test_every_position_has_its_share_over_the_seeds():
    """No fixed pattern: each source comes to each position with the probability of its weight."""
    weights, seeds, length = np.array([1, 2, 5]) / 8, 2000, 11
    pairs = [(Numbers("abc"[number], 50), weight) for number, weight in enumerate(weights)]
    counts = np.zeros((length, 3))
    for seed in range(seeds):
        mixture = Mixture(pairs, length, seed)
        for position in range(length):
            counts[position, mixture.locate(position)[0]] += 1
    share = np.array(mixture.counts) / length
    deviation = np.sqrt(seeds * share * (1 - share))
    assert np.abs((counts - seeds * share) / deviation).max() < 4.5


@pytest.mark.parametrize("seed", [0, 1, 2**70])
def test_nothing_repeats_before_its_source_is_exhausted(seed):
    """In order of the positions, over epochs too."""
    lengths = (7, 100, 1000)
    mixture = Mixture([(Numbers(str(n), n), 1) for n in lengths], 900, seed)
    seen = [[], [], []]
    for epoch in range(4):
        for index in range(900):
            source, within = mixture.at_epoch(epoch).locate(index)
            seen[source].append(within)
    for length, order in zip(lengths, seen, strict=True):
        assert len(order) == 1200
        rounds = [order[start : start + length] for start in range(0, 1200, length)]
        assert all(len(set(part)) == len(part) for part in rounds)
        assert all(first != second for first, second in pairwise(rounds))


def test_samples_are_functions_of_seed_epoch_and_position():
    sources = [(Numbers("a", 50), 1), (Numbers("b", 70), 1.5)]

    def captions(mixture):
        return [mixture[index].caption for index in range(60)]

    mixture = Mixture(sources, 60, 3)
    first = captions(mixture)
    assert [mixture[index].caption for index in reversed(range(60))] == first[::-1]
    assert captions(Mixture(sources, 60, 3)) == captions(pickle.loads(pickle.dumps(mixture))) == first
    assert mixture[-1].caption == first[-1]
    assert captions(Mixture(sources, 60, 4)) != first
    assert captions(mixture.at_epoch(1)) == captions(Mixture(sources, 60, 3, epoch=1)) != first
    assert mixture.epoch == 0
    loaded = DataLoader(mixture, None, num_workers=2)
    assert [sample.caption for sample in loaded] == first
    with pytest.raises(IndexError, match="index: expected 0 to 59, got 60"):
        mixture[60]


def test_masks_need_the_same_classes():
    same = Mixture([(SceneSource(3, size=32), 1), (SceneSource(4, seed=1, size=32), 1)], 8)
    assert same.class_names
    assert same[0].mask is not None
    other = Mixture([(SceneSource(3, size=32), 1), (Numbers("a", 3), 1)], 8)
    assert other.class_names == ()
    assert all(other[index].mask is None for index in range(8))


@pytest.mark.parametrize(
    ("pairs", "options", "problem"),
    [
        ([], {}, "sources: expected at least one"),
        ([(5, 0.0)], {}, r"sources\[0\]: expected a finite positive weight, got 0.0"),
        ([(5, 1), (5, float("nan"))], {}, r"sources\[1\]: expected a finite positive weight, got nan"),
        ([(5, 1), (0, 1)], {}, r"sources\[1\]: expected at least one sample, got 0"),
        ([(5, 1)], {"length": 0}, "length: expected at least 1, got 0"),
        ([(5, 1)], {"seed": -1}, "seed: expected a non-negative number, got -1"),
        ([(5, 1)], {"epoch": -1}, "epoch: expected a non-negative number, got -1"),
    ],
)
def test_unusable_mixtures(pairs, options, problem):
    with pytest.raises(ValueError, match=problem):
        Mixture([(Numbers("a", length), weight) for length, weight in pairs], **{"length": 9} | options)


def test_synthetic_pairs():
    source = Synthetic(1000, 48, pool=5)
    again = pickle.loads(pickle.dumps(source))
    assert len(source) == 1000
    pictures, captions = set(), set()
    for index in range(200):
        sample = source[index]
        assert sample.image.shape == (48, 48, 3)
        assert sample.image.dtype == np.uint8
        assert 4 <= len(sample.caption.split()) <= 12
        assert again[index].caption == sample.caption
        pictures.add(sample.image.tobytes())
        captions.add(sample.caption)
        sample.image[:] = 0  # it is the caller's own
    assert len(pictures) == 5
    assert len(captions) > 190
    assert np.array_equal(Synthetic(1000, 48, pool=5)[7].image, again[7].image)
    assert Synthetic(1000, 48, pool=5, seed=1)[7].caption != again[7].caption
    assert {Synthetic(99, 8, ["a", "b"])[index].caption for index in range(99)} == {"a", "b"}
    with pytest.raises(IndexError, match="index: expected 0 to 999, got 1000"):
        source[1000]


def test_synthetic_pictures_have_segments():
    """Neither one for all nor one for each pixel."""
    labels = felzenszwalb(Synthetic(1, 224)[0].image, scale=224, sigma=0.9, min_size=224)
    assert 5 < len(np.unique(np.asarray(labels))) < 224


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((0, 8), "length: expected at least 1, got 0"),
        ((1, 0), "size: expected at least 1, got 0"),
        ((1, 8, "text"), "captions: expected a sequence of non-empty strings, got 'text'"),
        ((1, 8, ["a", " "]), "captions: expected a sequence of non-empty strings"),
    ],
)
def test_unusable_synthetic_pairs(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Synthetic(*arguments)
