"""Batches on the training device: the same from workers and device, one ahead on a GPU, none lost."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from test_training import assert_same_weights, quick

from segclip_fast.data.opening import make_source
from segclip_fast.data.pipeline import PairDataset, Positions, batches
from segclip_fast.data.pseudo_labels import PatchLabels
from segclip_fast.data.transforms import normalise
from segclip_fast.training import loop
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train
from segclip_fast.training.prefetch import Prefetcher

CPU = torch.device("cpu")


def at(config, where: str, **changes):
    superpixels = dataclasses.replace(config.data.superpixels, where=where)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, superpixels=superpixels, **changes)
    )


def stream(config, in_workers: bool, device=CPU, steps=5) -> Prefetcher:
    source = make_source(config.data, config.model)
    dataset = PairDataset(source, config.data, config.model, 7, superpixels=in_workers)
    loader = batches(dataset, Positions(0, steps, 4), pin=device.type == "cuda")
    return Prefetcher(loader, device, PatchLabels(config.data.superpixels, 8))


def assert_same_batches(left, right) -> None:
    count = 0
    for a, b in zip(left, right, strict=True):
        count += 1
        for name in ("images", "tokens", "superpixels"):
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
        assert a.loaded.facts == b.loaded.facts
    assert count == 5


@pytest.mark.parametrize(
    "changes",
    [{}, {"workers": 2}, {"crop_area": (1.0, 1.0), "cache": True}],
    ids=("in_process", "two_workers", "cache"),
)
def test_workers_and_device_give_the_same_batches(tmp_path, changes):
    config = at(
        quick(tmp_path), "auto", train_num_samples=8, **changes
    )  # more than an epoch: the cache is read, too
    assert_same_batches(stream(config, in_workers=True), stream(config, in_workers=False))


def test_batches_are_what_the_model_takes(tmp_path):
    config = quick(tmp_path)
    dataset = PairDataset(make_source(config.data, config.model), config.data, config.model, 7)
    batch = next(stream(config, in_workers=False))
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.superpixels.shape == (4, 4, 4)
    assert batch.superpixels.dtype == torch.int64
    for position in range(4):
        pixels = dataset[position].pixels
        assert pixels.dtype == torch.uint8
        expected = normalise(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        assert torch.equal(batch.images[position], expected)


def test_run_is_the_same_wherever_superpixels_are_made_and_may_change_place(tmp_path):
    train(at(quick(tmp_path / "whole", device="cpu"), "workers"))

    class StopError(Exception):
        pass

    def stop(step, _):
        if step == 6:
            raise StopError

    with pytest.raises(StopError):
        train(at(quick(tmp_path / "parts", device="cpu"), "workers"), on_step=stop)
    other = at(quick(tmp_path / "parts", device="cpu", resume="latest"), "device")
    train(other)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    superpixels = dataclasses.replace(other.data.superpixels, scale=30.0)
    changed = dataclasses.replace(other, data=dataclasses.replace(other.data, superpixels=superpixels))
    with pytest.raises(ValueError, match=r"resume: .*got other \['data.superpixels.scale'\]"):
        train(changed)


def test_the_trainer_takes_the_device_it_is_told_to(tmp_path, monkeypatch):
    seen = []

    class Spy(Prefetcher):
        def _on_device(self, loaded):
            seen.append(loaded.superpixels is None)
            return super()._on_device(loaded)

    monkeypatch.setattr(loop, "Prefetcher", Spy)
    for where, on_device in (("auto", False), ("workers", False), ("device", True)):
        seen.clear()
        train(at(quick(tmp_path / where, device="cpu", steps=2), where))
        assert seen == [on_device] * 2


# --- one batch ahead


def test_one_batch_ahead_in_a_side_stream(tmp_path, monkeypatch):
    """The order of what a GPU would be told, with a stream that only takes notes."""
    events: list[str] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def inside(stream):
        events.append(f"start in {stream.name}")
        yield

    config = quick(tmp_path)
    expected = list(stream(config, in_workers=False, steps=3))
    prefetcher = stream(config, in_workers=False, steps=3)
    prefetcher.side = Stream("side")  # type: ignore[assignment]

    class Event:
        """Of a device that is always done."""

        def record(self, stream):
            assert stream.name == "current"

        def query(self):
            return done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: events.append(f"keep for {stream.name}")
    )
    found, done = [], False
    for batch in prefetcher:
        found.append(batch)
        before = prefetcher.seconds
        prefetcher.prefetch()
        prefetcher.prefetch()  # once is enough
        assert (prefetcher.seconds > before) == done  # a busy device hides the wait
        done = True
    step = ["current waits for side", *["keep for current"] * 2]
    assert events == ["start in side", *step, "start in side", *step, "start in side", *step]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.superpixels, b.superpixels)


@pytest.mark.gpu
def test_gpu_labels_and_pixels_equal_the_workers(tmp_path):
    config = quick(tmp_path)
    cuda = torch.device("cuda")

    def ahead():
        prefetcher = stream(config, in_workers=False, device=cuda)
        for batch in prefetcher:
            prefetcher.prefetch()
            assert {batch.images.device.type, batch.superpixels.device.type} == {"cuda"}
            assert batch.tokens.device.type == "cpu"
            yield batch

    assert_same_batches(stream(config, in_workers=True), ahead())


@pytest.mark.gpu
def test_gpu_stream_semantics(tmp_path):
    """The next batch is made beside a busy device, without waiting, and never over a batch in use."""
    config = quick(tmp_path)
    cuda = torch.device("cuda")
    expected = [(batch.images, batch.superpixels) for batch in stream(config, in_workers=True, steps=20)]
    prefetcher = stream(config, in_workers=False, device=cuda, steps=20)
    prefetcher.prefetch()  # allocations, kernels and constants of the first use
    torch.cuda.synchronize()
    results = []
    for number, batch in enumerate(prefetcher):
        torch.cuda._sleep(200_000_000 if number == 1 else 5_000_000)  # 0.1 s of work, and a little
        idle = torch.cuda.Event()
        idle.record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            prefetcher.prefetch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if number == 1:
            prefetcher.side.synchronize()
            assert not idle.query(), "the side stream waited for the work of the current stream"
        results.append((batch.images.clone(), batch.superpixels.clone()))
        del batch  # its memory may go to the next batch, but only after the clones
    torch.cuda.synchronize()
    for (images, labels), (images_cpu, labels_cpu) in zip(results, expected, strict=True):
        assert torch.equal(images.cpu(), images_cpu)
        assert torch.equal(labels.cpu(), labels_cpu)


@pytest.mark.gpu
def test_gpu_training_takes_superpixels_on_the_device(tmp_path):
    """The default there; the run equals one whose workers made them."""
    pytest.importorskip("tqdm")
    for where in ("auto", "workers"):
        train(at(quick(tmp_path / where, device="cuda", precision="fp32"), where))
    left, right = ([entry["total"] for entry in read_log(tmp_path / where)] for where in ("auto", "workers"))
    assert left == pytest.approx(right, rel=1e-4)
