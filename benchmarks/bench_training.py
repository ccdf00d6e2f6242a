"""Training through the loop: the paper's step with all that is around it, ViT-B/16 and three losses, on CUDA.

`pytest benchmarks/bench_training.py --benchmark-only`. `prepare()` and `take_step()` as in `train()`: loader
workers, superpixels on the device, forward, backward, clipping, AdamW, the log. Weights are random and none
is frozen, so that nothing has to be downloaded. Before anything is timed, the losses of the first step are
compared with those of `model.forward` on the same batch and noise.

MFU counts the model's operations only: 3 x forward x pairs per second / peak, where forward is what one pair
takes on the fast path by `harness/counts.py`, a multiply-add being 2 FLOPs. What is computed again, in
accumulated batches and with checkpointing, adds nothing. Two peaks: a large product measured here, and the
data sheet's.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness.counts import counted
from harness.gate import passes
from harness.models import autocast
from harness.pairs import RESIZED, write_shards
from harness.rivals import Result, enter, timed
from harness.settings import CUDA, DEVICE, DTYPES, SMOKE
from harness.timing import interleaved
from harness.tokens import tokenizer_at_hand

from segclip_fast.config import DataConfig, OptimConfig, SegCLIPConfig, TrainConfig
from segclip_fast.ops import linear
from segclip_fast.ops._dispatch import force
from segclip_fast.training.loop import note_damage, start_stream, take_step
from segclip_fast.training.preparing import prepare, processes
from segclip_fast.training.stopping import Stopping
from segclip_fast.training.throughput import Throughput

pytestmark = [timed, pytest.mark.skipif(not (CUDA or SMOKE), reason="needs a CUDA device")]
PRECISION = "bf16" if CUDA else "fp32"
TOLERANCES = {"fp32": 1e-3, "bf16": 1e-2}  # micro-batches round otherwise than the whole batch
WARM_UP, STEPS, LEAST = (3, 2, 2) if SMOKE else (3, 20, 5)
SECONDS = 5.0  # of timed steps, after which no more than LEAST are made
STORED = 16 if SMOKE else 2000  # pairs in shards
COUNTED = 32  # pairs of the batch whose operations are counted
PLANNED = 1000  # steps of the run, of which only the first are made: rates stay low, and the loader busy
# Dense bf16 FLOP/s of the data sheets, by the names that the devices give themselves (both SXM).
DATA_SHEET = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


@dataclass(frozen=True)
class Case:
    """What is trained on: `source` "synthetic" or "shards", and pairs of a forward pass and passes a step."""

    source: str
    batch_size: int
    accum_freq: int = 1

    def __str__(self):
        return f"{self.source}-B{self.pairs}" + (f"-{self.parts}" if self.parts else "")

    @property
    def pairs(self):
        return self.batch_size * self.accum_freq

    @property
    def parts(self):
        return f"{self.accum_freq}x{self.batch_size}" if self.accum_freq > 1 else ""


CASES = (
    *(Case(source, B) for source in ("synthetic", "shards") for B in ((2,) if SMOKE else (96, 256, 768))),
    Case("synthetic", 2, 2) if SMOKE else Case("synthetic", 96, 8),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, RESIZED, STORED, processes=1 if SMOKE else cores())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(benchmark, case, shards, tmp_path):
    result = None
    try:
        result = measure(config_of(case, shards.pattern, tmp_path / "run"))
    except torch.cuda.OutOfMemoryError:
        if case.accum_freq > 1:
            raise
    finally:
        release()
    if result is None:  # only here, so that the first try's tensors are free
        again = config_of(case, shards.pattern, tmp_path / "again", grad_checkpointing=True)
        result = measure(again)
        release()
    enter(
        benchmark,
        f"training loop, {case}",
        {"loop": result},
        "loop",
        op="training loop",
        size=f"ViT-B/16, B {case.pairs}" + (f" as {case.parts.replace('x', ' x ')}" if case.parts else ""),
        shape={"B": case.pairs},
        dtype=PRECISION,
        direction="step",
        source=case.source,
    )


def config_of(case, pattern, folder, grad_checkpointing=False):
    """The paper's run, from random weights."""
    data = {"dataset_type": "synthetic"}
    if case.source == "shards":
        data = {"dataset_type": "webdataset", "train_data": pattern}
    return TrainConfig(
        output=str(folder),
        model=architecture(),
        data=DataConfig(**data, workers=loader_workers(case.pairs)),
        optim=OptimConfig(decay="official"),
        steps=PLANNED,
        batch_size=case.batch_size,
        accum_freq=case.accum_freq,
        precision="amp_bf16" if PRECISION == "bf16" else "fp32",
        grad_checkpointing=grad_checkpointing,
        device=DEVICE.type,
        quiet=True,
    )


def architecture():
    """ViT-B/16; a few layers of it for a smoke run."""
    config = SegCLIPConfig()
    if not SMOKE:
        return config
    vision = dataclasses.replace(config.vision, layers=3, group_after=2)
    return dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, layers=1))


def cores():
    return len(os.sched_getaffinity(0))


def loader_workers(pairs):
    """All cores but two, as far as shared memory has room for the five batches that each may hold."""
    if SMOKE:
        return 1
    batch = pairs * 3 * SegCLIPConfig().vision.image_size ** 2
    room = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**40
    return max(0, min(16, cores() - 2, int(room / (5 * batch))))


# --- the steps


class Peeked:
    """A stream of batches whose first one is there to be looked at."""

    def __init__(self, stream):
        self.stream, self.first = stream, next(stream)

    def __next__(self):
        first, self.first = self.first, None
        return next(self.stream) if first is None else first

    def prefetch(self):
        self.stream.prefetch()

    @property
    def seconds(self):
        return self.stream.seconds


def measure(config):
    """Seconds of every timed step, and what is to be known of them."""
    before = torch.cuda.memory_allocated() if CUDA else 0
    with Stopping() as stopping, processes(config) as place, tokenizer_at_hand() as tokenizer:
        run = prepare(config, place)
        with run.log:
            stream = Peeked(start_stream(run, stopping))
            flops = step_flops(config.data.dataset_type, run.model, stream.first)
            passed = gate(run, stream, stopping.asked)
            samples, times = timed_steps(run, stream, stopping.asked)
            peak = torch.cuda.max_memory_allocated() - before if CUDA else None
    rate = run.batch / statistics.mean(samples)
    peaks = {"measured": product_rate(), "data sheet": DATA_SHEET.get(device_name())}
    facts = {
        "gate": vars(passed),
        "images_per_second": rate,
        "peak_bytes": peak,  # of all that the run holds, weights and optimizer too
        "model_flops_per_pair": flops,
        "peak_flops": peaks,
        "mfu": {name: top and flops * rate / top for name, top in peaks.items()},
        "grad_checkpointing": config.grad_checkpointing,
        "batch_size": config.batch_size,
        "accum_freq": config.accum_freq,
        "superpixels": "device" if run.dataset.labels is None else "workers",
        "tokenizer": tokenizer,
        "throughput": times.report(run.step),
    }
    return Result(samples, facts)


def gate(run, stream, asked):
    """The first step: its losses are those of `model.forward` on the same batch and noise."""
    batch = stream.first
    noise = run.model.draw_noise(batch.images, torch.Generator(DEVICE).manual_seed(0))
    with torch.no_grad(), autocast(PRECISION):
        expected = run.model(batch.images, batch.tokens, batch.superpixels, noise).named()
    run.model.draw_noise = lambda *_: noise
    try:
        taken = take_step(run, stream, throughput(run), 1, asked)
    finally:
        del run.model.draw_noise
    return passes(taken.losses.named(), expected, {}, TOLERANCES[PRECISION])


def timed_steps(run, stream, asked):
    """Seconds of each step once WARM_UP were made, the first by the gate, and the loop's own account."""
    times, samples = throughput(run), []  # which leaves its first two steps out: the last to warm up
    for number in range(2, WARM_UP + 1):
        step(run, stream, times, number, asked)
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    begin = last = time.perf_counter()
    for number in range(WARM_UP + 1, WARM_UP + 1 + STEPS):
        step(run, stream, times, number, asked)
        now = time.perf_counter()
        samples.append(now - last)
        last = now
        if len(samples) >= LEAST and now - begin > SECONDS:
            break
    synchronize()  # the last update
    samples[-1] += time.perf_counter() - last
    return samples, times


def step(run, stream, times, number, asked):
    """What `train()` does for a step between checkpoints."""
    taken = take_step(run, stream, times, number, asked)
    run.log.step(number, taken.values)
    note_damage(run, number, taken)
    if taken.values["skipped"]:
        raise RuntimeError(f"step {number}: expected a finite loss and gradient, got {taken.values}")


def throughput(run):
    return Throughput(run.batch, 1, run.config.data.workers)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def release():
    """Give the device's memory back."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


# --- operations and peaks

_counts = {}


def step_flops(source, model, batch):
    """Model FLOPs of a step per pair: 3 times the forward's, counted on the CPU on a part of the batch."""
    if source not in _counts:
        count = min(COUNTED, len(batch.images))
        twin = copy.deepcopy(model).cpu()
        images, labels = batch.images[:count].cpu(), batch.superpixels[:count].cpu()
        noise = twin.draw_noise(images, torch.Generator().manual_seed(0))
        with counted() as counter, force("auto"):
            twin(images, batch.tokens[:count], labels, noise)
        _counts[source] = 3 * counter.get_total_flops() / count
    return _counts[source]


@functools.cache
def product_rate():
    """FLOP/s of a large dense product in the training's precision, as in bench_ceilings.py."""
    side = 8192 if CUDA else 256
    a, b = (torch.rand(side, side, device=DEVICE).to(DTYPES[PRECISION]) for _ in range(2))
    rounds, seconds = (1, 0.0) if SMOKE else (7, 0.05)
    linear(a, b)
    samples = interleaved({"device": lambda _: linear(a, b)}, DEVICE, rounds, seconds)["device"]
    return 2 * side**3 / statistics.median(samples)


def device_name():
    return torch.cuda.get_device_name(DEVICE) if CUDA else None
