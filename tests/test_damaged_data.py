"""Bad input while a model trains: left out, counted, named, or a clear end; the same on every process."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
from collections import namedtuple
from pathlib import Path

import damaged_worker
import pytest
import torch
import torchrun
from damaged_shards import (
    BAD,
    BATCH,
    SEED,
    TOTAL,
    order_of,
    run_config,
    write_damaged,
    write_run_of_damage,
)
from test_training import assert_same_weights

from segclip_fast.data import shards as shards_module
from segclip_fast.data.pipeline import RETRIES
from segclip_fast.data.shards import ShardSource
from segclip_fast.training import loop
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train
from segclip_fast.training.runs import dump

TWO_EPOCHS = {"steps": 0, "epochs": 2.0}
STEPS = 2 * TOTAL // BATCH


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return write_damaged(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def whole(found, tmp_path_factory) -> Path:
    """A run of two epochs with two loader workers."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run_config(run, found.pattern, {"workers": 2}, **TWO_EPOCHS))
    return run


def events(run: Path) -> dict[str, tuple[str, int]]:
    """Reason and step of the damaged samples in a log, by their names."""
    entries = read_log(run, "damaged")
    assert len(entries) == len({entry["key"] for entry in entries})
    return {entry["key"]: (entry["reason"], entry["step"]) for entry in entries}


def first_steps(found) -> dict[str, int]:
    """The step in which each damaged sample is first met: its own, or that of one before it in a row."""
    keys = ShardSource(found.pattern).keys
    names = [keys[index] for index in order_of(SEED, 0, TOTAL)]
    steps: dict[str, int] = {}
    for position in range(TOTAL):
        number = 0
        while (name := names[(position + number) % TOTAL]) in found.reasons:
            steps.setdefault(name, position // BATCH + 1)
            number += 1
    return steps


def check_log(run: Path, found) -> None:
    logged = events(run)
    assert {key: step for key, (_, step) in logged.items()} == first_steps(found)
    for key, (reason, _) in logged.items():
        assert reason.startswith(found.reasons[key]), key
    (summary,) = read_log(run, "damaged_samples")
    assert summary == {
        "event": "damaged_samples",
        "step": STEPS,
        "damaged": BAD,
        "by_container": found.counts,
    }
    steps = read_log(run)
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    for entry in steps:
        assert not entry["skipped"]
        names = ("total", "contrastive", "reconstruction", "superpixel_kl", "gradient_norm")
        assert all(math.isfinite(entry[name]) for name in names)
    (report,) = read_log(run, "throughput")
    assert sum(report["shares"].values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in report["shares"].values())
    assert report["steps"] == STEPS - 2


# --- runs of one process


def test_five_percent_are_damaged(found):
    assert BAD == len(found.reasons) == TOTAL // 20
    source = ShardSource(found.pattern)
    assert len(source) == TOTAL
    assert source.missing == found.missing
    assert set(found.odd) <= set(source.keys)


def test_a_run_leaves_out_what_is_damaged_and_nothing_else(whole, found):
    check_log(whole, found)


def test_a_resumed_run_knows_the_damaged_samples_of_before(whole, found, tmp_path):
    class StopError(Exception):
        pass

    def stop(step, _):
        if step == 17:  # continued after the checkpoint of step 10
            raise StopError

    run = tmp_path / "run"
    config = run_config(run, found.pattern, {"workers": 2}, save_every=10, **TWO_EPOCHS)
    with pytest.raises(StopError):
        train(config, on_step=stop)
    before = [step for _, step in events(run).values()]
    assert any(step <= 10 for step in before)
    assert any(step > 10 for step in before)
    train(dataclasses.replace(config, resume="latest"))
    assert_same_weights(whole, run)
    assert read_log(run, "damaged_samples") == read_log(whole, "damaged_samples")
    assert events(run) == events(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_in_a_row_end_a_run(tmp_path, workers):
    shard = write_run_of_damage(tmp_path / "a.tar", order_of(SEED, 0, 60), 20, RETRIES + 1)
    config = run_config(tmp_path / "run", shard, {"workers": workers})
    seen, before = [], set(multiprocessing.active_children())
    message = "^data.train_data: expected a usable sample among 51, got none, the last of them .*a.tar/"
    with pytest.raises(ValueError, match=message):
        train(config, lambda step, _: seen.append(step))
    assert seen == [1]  # positions 0 to 11; the next step has the 20th
    assert set(multiprocessing.active_children()) <= before  # no worker is left to the garbage collector


def test_a_shard_that_disappears_ends_a_run(tmp_path):
    found = write_damaged(tmp_path)
    gone = Path(found.paths[2])

    def remove(step, _):
        gone.unlink()
        shards_module._opened.cache_clear()  # as if so many others had been read since

    with pytest.raises(OSError, match=rf"^\[Errno 2\] No such file or directory: '{gone}'$"):
        train(run_config(tmp_path / "run", found.pattern), on_step=remove)
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1]


def test_a_worker_that_misses_a_shard_ends_a_run(tmp_path, monkeypatch):
    found = write_damaged(tmp_path)
    gone, real = Path(found.paths[1]), loop.start_stream

    def start(run, stopping):
        gone.unlink()
        return real(run, stopping)

    monkeypatch.setattr(loop, "start_stream", start)
    with pytest.raises(OSError, match=rf"^\[Errno 2\] No such file or directory: '{gone}'$"):
        train(run_config(tmp_path / "run", found.pattern, {"workers": 2}))


def test_samples_of_a_skipped_step_are_named(tmp_path, monkeypatch, found):
    """Damaged ones too, though others stood in for them."""
    damaged = min(step for step in first_steps(found).values() if step > 1)
    real = loop.losses_and_gradients

    def poisoned(run, batch, step):
        if step == damaged:
            batch.images.fill_(float("nan"))
        return real(run, batch, step)

    monkeypatch.setattr(loop, "losses_and_gradients", poisoned)
    model = train(run_config(tmp_path / "run", found.pattern, steps=damaged + 1))
    assert [entry["step"] for entry in read_log(tmp_path / "run") if entry["skipped"]] == [damaged]
    entry = read_log(tmp_path / "run")[damaged - 1]
    first = (damaged - 1) * BATCH
    keys = ShardSource(found.pattern).keys
    names = [keys[index] for index in order_of(SEED, 0, TOTAL)[first : first + BATCH]]
    assert entry["positions"] == [first, first + BATCH - 1]
    assert entry["samples"] == names
    assert set(names) & set(found.reasons)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_what_does_not_fit_is_said_before_the_first_step(tmp_path, monkeypatch, found):
    few = {"steps": 0, "epochs": 0.04}
    with pytest.raises(ValueError, match=r"epochs: expected at least one step of 12 pairs, got 0\.04 epochs"):
        train(run_config(tmp_path / "a", found.pattern, **few))
    many = r"data\.train_num_samples: expected at most 240, the pairs found \(240 in 4 shards\), got 241"
    with pytest.raises(ValueError, match=many):
        train(run_config(tmp_path / "b", found.pattern, {"train_num_samples": TOTAL + 1}))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12, 1000))
    room = r"output: expected room for a checkpoint of 0\.00 GB in .*/c, got 0\.00 GB"
    with pytest.raises(OSError, match=room):
        train(run_config(tmp_path / "c", found.pattern))
    assert not any(read_log(tmp_path / name) for name in "abc")


# --- runs of two processes


@pytest.fixture(scope="module")
def both(found, tmp_path_factory) -> Path:
    """Runs of two processes, in folders of their names."""
    folder = tmp_path_factory.mktemp("both")

    def entry(name, **changes):
        return {"output": str(folder / name), "pairs": found.pattern, "batch_size": 6, **changes}

    plan = [
        entry("whole", data={"workers": 1}, **TWO_EPOCHS),
        entry("strict", data={"max_damaged": 0.0}),
        entry("poisoned", steps=8, bad_loss=[3, 4], bad_pictures=[6]),
        entry("hopeless", steps=12, save_every=4, bad_loss=[2, 3, 5, 6, 7], max_skipped=3),
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    done = torchrun.run(damaged_worker.__file__, folder / "plan.json")
    assert done.returncode == 0, done.stderr
    return folder


def written(both: Path, name: str, ending: str) -> list[str]:
    """What each process has left of a run."""
    return [(both / f"{name}-{rank}.{ending}").read_text() for rank in range(2)]


def test_two_processes_count_the_same(both, found):
    check_log(both / "whole", found)
    first, second = written(both, "whole", "sha")
    assert first == second


def test_the_limit_stops_both_processes(both, found):
    first, second = written(both, "strict", "txt")
    assert first == second
    assert first.startswith("ValueError: data.max_damaged: expected a share of at most 0, got ")
    steps = first_steps(found)
    step = min(steps.values())
    seen = [key for key in steps if steps[key] == step]
    assert f"got {len(seen)} of {step * BATCH}, " in first
    worst = max(found.paths, key=lambda path: sum(key.startswith(path) for key in seen))
    assert f" of them in {worst} ({worst}/" in first
    assert len(events(both / "strict")) == len(seen)


def test_a_bad_loss_of_one_process_skips_the_step_of_both(both, found):
    first, second = written(both, "poisoned", "sha")
    assert first == second
    steps = read_log(both / "poisoned")
    assert [entry["step"] for entry in steps if entry["skipped"]] == [3, 4, 6]
    keys, order = ShardSource(found.pattern).keys, order_of(SEED, 0, TOTAL)
    for entry in (steps[2], steps[3], steps[5]):
        start = (entry["step"] - 1) * BATCH
        assert entry["positions"] == [start, start + BATCH - 1]
        assert entry["samples"] == [keys[index] for index in order[start : start + BATCH]]
    assert all(math.isfinite(steps[number]["total"]) for number in (0, 1, 4, 6, 7))


def test_too_many_skipped_steps_stop_both_processes(both):
    first, second = written(both, "hopeless", "txt")
    assert first == second
    assert first.startswith("FloatingPointError: steps 5 to 7, 3 in a row, had no finite loss or gradient")
    assert "the newest checkpoint is step-000004" in first


def test_nothing_usable_on_one_process_ends_both(tmp_path):
    """The second process finds nothing for step 2, while the first waits for it in the middle of the step."""
    shard = write_run_of_damage(tmp_path / "a.tar", order_of(SEED, 0, 80), 6, RETRIES + 1)
    config = run_config(tmp_path / "run", shard, batch_size=2)
    (tmp_path / "run.yaml").write_text(dump(config))
    done = torchrun.run("-m", "segclip_fast.train", tmp_path / "run.yaml")
    assert done.returncode != 0
    assert "error (process 1): data.train_data: expected a usable sample among 51, got none" in done.stderr
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1]
