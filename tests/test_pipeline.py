"""From pairs to batches: order, positions, crops, what is known of captions."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import torch
from test_training import quick

from segclip_fast.data.opening import make_source
from segclip_fast.data.pipeline import Facts, PairDataset, Positions, batches, caption_holds, collate
from segclip_fast.data.sample import RawSample
from segclip_fast.data.transforms import crop_box, resized_crop


def test_every_sample_of_an_epoch_once(tmp_path):
    config = quick(tmp_path)
    dataset = PairDataset(make_source(config.data, config.model), config.data, config.model, 7)
    seen = []
    real = dataset.prepare

    def prepare(raw, position):
        seen.append(raw.caption + str(raw.image.sum()))
        return real(raw, position)

    dataset.prepare = prepare  # type: ignore[method-assign]
    for position in range(40):
        dataset[position]
    assert sorted(seen[:20]) == sorted(seen[20:])
    assert seen[:20] != seen[20:]
    assert len(set(seen)) == 20


def test_batches_start_anywhere(tmp_path):
    config = quick(tmp_path)
    source = make_source(config.data, config.model)
    dataset = PairDataset(source, config.data, config.model, 7)
    whole = list(batches(dataset, Positions(0, 5, 4)))
    part = list(batches(PairDataset(source, config.data, config.model, 7), Positions(12, 2, 4)))
    for a, b in zip(whole[3:], part, strict=True):
        for name in ("pixels", "tokens", "superpixels"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.facts == b.facts
    assert whole[0].pixels.shape == (4, 3, 32, 32)
    assert whole[0].superpixels.shape == (4, 4, 4)


def sample(caption, content=(), mentioned=()):
    return Facts(frozenset(content), frozenset(mentioned), caption)


def test_caption_holds():
    samples = [
        sample("cat and grass", {"cat", "grass"}, {"cat", "grass"}),
        sample("a cat", {"cat", "dog"}, {"cat"}),
        sample("a dog", {"dog"}, {"dog"}),
        sample("who knows"),
        sample("who knows"),
    ]
    expected = [
        [True, True, False, False, False],
        [False, True, True, False, False],
        [False, False, True, False, False],
        [False, False, False, True, True],
        [False, False, False, True, True],
    ]
    assert caption_holds(samples, samples).tolist() == expected
    assert caption_holds(samples[1:3], samples).tolist() == expected[1:3]
    assert caption_holds(samples, samples[3:]).tolist() == [row[3:] for row in expected]


def test_processes_share_the_positions_of_a_step():
    shares = [list(Positions(100, 2, 3, rank, 2)) for rank in range(2)]
    assert shares == [[100, 101, 102, 106, 107, 108], [103, 104, 105, 109, 110, 111]]
    assert Positions(100, 2, 3, 1, 2).of(1) == range(109, 112)
    assert len(Positions(100, 2, 3, 1, 2)) == 6


def test_cache_changes_nothing(tmp_path):
    config = quick(tmp_path)
    data = dataclasses.replace(config.data, crop_area=(1.0, 1.0))
    cached = dataclasses.replace(data, cache=True)
    source = make_source(data, config.model)
    a, b = (PairDataset(source, d, config.model, 1) for d in (data, cached))
    for position in (3, 25, 3, 30):
        assert torch.equal(collate([a[position]]).pixels, collate([b[position]]).pixels)


def test_crop_box_stays_inside():
    rng = random.Random(0)
    for _ in range(300):
        height, width = rng.randint(1, 60), rng.randint(1, 300)
        top, left, h, w = crop_box(height, width, (0.5, 1.0), rng)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h > 0
        assert w > 0


def test_resized_crop_cuts_first():
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:20, 20:30] = 255
    assert (resized_crop(image, (10, 20, 10, 10), 16) == 255).all()
    assert (resized_crop(image, (0, 0, 10, 10), 10) == 0).all()


def test_prepared_sample(tmp_path):
    config = quick(tmp_path)
    dataset = PairDataset(make_source(config.data, config.model), config.data, config.model, 0)
    image = np.zeros((50, 70, 3), np.uint8)
    prepared = dataset.prepare(RawSample(image, "a photo of a zebra"), 0)
    assert prepared.pixels.shape == (3, 32, 32)
    assert prepared.tokens.shape == (16,)
    assert not prepared.superpixels.any()
