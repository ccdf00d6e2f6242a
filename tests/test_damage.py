"""Damaged samples: what stands in for them, whatever the workers and processes, and how they are counted."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from damaged_shards import BATCH, SEED, TOTAL, order_of, write_damaged
from small import small_config

from segclip_fast.config import DataConfig, SuperpixelConfig
from segclip_fast.data.mixture import Mixture
from segclip_fast.data.opening import make_source
from segclip_fast.data.pipeline import RETRIES, Damage, PairDataset, Positions, batches
from segclip_fast.data.sample import RawSample, SampleError
from segclip_fast.data.shards import ShardSource
from segclip_fast.training.damage import Damaged


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return write_damaged(tmp_path_factory.mktemp("pairs"))


def dataset_of(pairs: str, seed: int = SEED, **data) -> PairDataset:
    config = DataConfig(train_data=pairs, superpixels=SuperpixelConfig(scale=20, min_size=8), **data)
    model = small_config()
    return PairDataset(make_source(config, model), config, model, seed)


def test_the_next_usable_sample_stands_in(found):
    dataset, order = dataset_of(found.pattern), order_of(SEED, 0, TOTAL)
    keys = ShardSource(found.pattern).keys
    names = [keys[index] for index in order]
    for position, name in enumerate(names):
        assert dataset.name(position) == name
        if name not in found.reasons:
            continue
        number = next(n for n in range(TOTAL) if names[(position + n) % TOTAL] not in found.reasons)
        sample = dataset[position]
        skipped = [names[(position + n) % TOTAL] for n in range(number)]
        assert [damage.key for damage in sample.damaged] == skipped
        raw = dataset.source[int(order[(position + number) % TOTAL])]
        expected = dataset.prepare(raw, position)
        assert torch.equal(sample.pixels, expected.pixels)
        assert torch.equal(sample.tokens, expected.tokens)


def test_workers_and_processes_replace_alike(found):
    def loaded(workers: int, world: int):
        data = dataset_of(found.pattern, workers=workers)
        shares = [Positions(0, 10, BATCH // world, rank, world) for rank in range(world)]
        parts = list(zip(*(batches(data, share) for share in shares), strict=True))
        pixels = torch.cat([batch.pixels for step in parts for batch in step])
        return pixels, [damage for step in parts for batch in step for damage in batch.damaged]

    pixels, damaged = loaded(0, 1)
    assert damaged
    for workers, world in ((2, 1), (0, 2), (1, 3)):
        other, also = loaded(workers, world)
        assert torch.equal(pixels, other)
        assert damaged == also


def test_a_mixture_names_the_damaged_samples_of_its_sources(found):
    several = "::".join(found.paths[:2])
    dataset = dataset_of(several, train_data_upsampling_factors="1::1.5")
    assert isinstance(dataset.source, Mixture)
    length, usable = len(dataset.source), 0
    assert length == 60 + 90
    known = {key: why for key, why in found.reasons.items() if key.startswith(found.paths[:2])}
    met = {}
    for position in range(2 * length):  # 2 and 3 times through the sources
        sample, name = dataset[position], dataset.name(position)
        met |= dict(sample.damaged)
        assert bool(sample.damaged) == (name in known)
        assert [damage.key for damage in sample.damaged][:1] in ([], [name])
        usable += not sample.damaged
    assert usable == 2 * (60 - 2) + 3 * (60 - 5)
    assert all(reason.startswith(known[key]) for key, reason in met.items())
    damaged = Damaged(0.1, [Damage(*each) for each in met.items()])
    assert damaged.counts() == {path: found.counts[path] for path in found.paths[:2]}


class Halves:
    """Pairs of which the first `bad` in the order of a run's first epoch are damaged."""

    class_names = ()

    def __init__(self, bad: int, length: int = 60) -> None:
        self.length, self.bad = length, set(order_of(SEED, 0, length)[:bad].tolist())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RawSample:
        if index in self.bad:
            raise SampleError(f"pair {index}", "picture: torn")
        return RawSample(np.full((40, 40, 3), index, np.uint8), "a cat")


def test_as_many_in_a_row_as_may_be_damaged():
    data = DataConfig(train_data="x", crop_area=(1, 1))
    sample = PairDataset(Halves(RETRIES), data, small_config(), SEED)[0]
    assert len(sample.damaged) == RETRIES
    assert (sample.pixels == order_of(SEED, 0, 60)[RETRIES]).all()
    dataset = PairDataset(Halves(RETRIES + 1), data, small_config(), SEED)
    last = order_of(SEED, 0, 60)[RETRIES]
    with pytest.raises(ValueError, match=rf"usable sample among 51, .* of them pair {last}: picture: torn"):
        dataset[0]
    assert len(dataset[1].damaged) == RETRIES


def some(count: int, shard: str, kind: str = "picture", first: int = 0) -> list[Damage]:
    return [Damage(f"{shard}/{number}", f"{kind}: torn") for number in range(first, first + count)]


def test_damaged_samples_count_once():
    damaged = Damaged(0.1, some(2, "/x/b.tar"))
    assert len(damaged) == 2
    more = [*some(3, "/x/b.tar"), *some(1, "/x/a.tar", "caption"), *some(1, "/x/a.tar", "picture", 1)]
    assert damaged.add([*more, *more]) == more[2:]
    assert damaged.add(more) == []
    assert damaged.add([]) == []
    by_place = {"/x/a.tar": {"caption": 1, "picture": 1}, "/x/b.tar": {"picture": 3}}
    assert damaged.counts() == by_place
    assert damaged.summary() == {"damaged": 5, "by_container": by_place}
    assert Damaged(0.1).summary() == {"damaged": 0, "by_container": {}}


@pytest.mark.parametrize(
    ("limit", "shown", "most"),
    [(0.1, 12, 100), (0.1, 1000, 100), (0.1, 1010, 101), (0.1, 5000, 500), (0.0, 12, 0), (0.002, 1, 2)],
)
def test_the_limit_is_of_the_samples_shown_and_at_least_1000(limit, shown, most):
    damaged = Damaged(limit, some(most, "/x/b.tar"))
    damaged.check(shown)
    damaged.add(some(1, "/x/a.tar"))
    with pytest.raises(ValueError, match=rf"data.max_damaged: .* got {most + 1} of {shown}, "):
        damaged.check(shown)


def test_the_limit_names_the_worst():
    damaged = Damaged(0.001, [*some(1, "/x/a.tar"), *some(3, "/x/b.tar", "caption"), *some(2, "/x/c.tar")])
    message = (
        "data.max_damaged: expected a share of at most 0.001, got 6 of 500, 3 of them in /x/b.tar "
        "(/x/b.tar/0: caption: torn); mend or leave out what the log lists as damaged, or raise "
        "data.max_damaged"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        damaged.check(500)
    with pytest.raises(ValueError, match=r"got 1 of 5, 1 of them in one source \(Own\[3\]: picture: torn\)"):
        Damaged(0.0, [Damage("Own[3]", "picture: torn")]).check(5)
    Damaged(1.0, some(1000, "/x/a.tar")).check(1)
