"""Counted, not timed: what the CUDA superpixels do for a batch, and the time that follows on an H200.

    python benchmarks/superpixel_counts.py   # a minute; prints a table, writes results/superpixel_counts.json

The counts come from the same source run on the CPU (csrc/felzenszwalb_emulated.cpp), on 224 x 224 crops of
scikit-image's photographs at the paper's setting, after the labels were found equal to the CPU op's. The
time is a prediction: counts times the latencies below, images handed to multiprocessors in order. It was made
without a GPU and may be wrong by a factor of two.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.machine import commit, versions
from harness.pictures import PAPER, SIDE, crops
from reporting.superpixel_counts import counts_table

from segclip_fast import _C
from segclip_fast.ops import felzenszwalb
from segclip_fast.ops.felzenszwalb import _gaussian_taps

RESULT = Path(__file__).parent / "results" / "superpixel_counts.json"
BATCHES = (96, 256)
REAL = {"float64": 8, "float32": 4}  # bytes
CHANNELS, CODE, COMPONENT, PARENT = 3, 4, 8, 2


@dataclass(frozen=True)
class Gpu:
    """An H200, in cycles unless said otherwise; assumed, not measured.

    Attributes:
        clock: cycles per second.
        multiprocessors: each has room for two images (their parents and batches fill its shared memory).
        bandwidth: bytes per second.
        launch: seconds between two kernels of a stream.
        threads: of the block of an image.
        far: load from global memory that is in no cache of the multiprocessor.
        near: load from the multiprocessor's cache.
        shared: load from shared memory with its address.
        claim: atomic minimum in shared memory, until a load sees it.
        division: of double precision.
        sync: barrier of the preparing warps.
        issue: instructions of a round or a step besides.
    """

    clock: float = 1.83e9
    multiprocessors: int = 132
    bandwidth: float = 4.3e12
    launch: float = 6e-6
    threads: int = 512
    far: int = 600
    near: int = 155  # half of them after all from the second-level cache: (40 + 270) / 2
    shared: int = 45
    claim: int = 80
    division: int = 200
    sync: int = 60
    issue: int = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON to write")
    options = parser.parse_args()
    run = count()
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(run, indent=1) + "\n")
    print(counts_table(run))


def count() -> dict[str, Any]:
    """Counts of both precisions and batch sizes."""
    images = np.ascontiguousarray(np.stack(crops(max(BATCHES))).transpose(0, 3, 1, 2))  # (B, C, H, W)
    taps = list(_gaussian_taps(PAPER["sigma"]))
    rows = []
    for precision in REAL:
        labels, counts = _C.felzenszwalb_emulated(
            images, PAPER["scale"], int(PAPER["min_size"]), taps, single=precision == "float32"
        )
        expected = felzenszwalb(torch.from_numpy(images), **PAPER, precision=precision)
        np.testing.assert_array_equal(labels, expected.numpy())
        rows += [row(precision, counts[:batch]) for batch in BATCHES]
    return {
        "command": "python benchmarks/superpixel_counts.py",
        "commit": commit(),
        "versions": versions(),
        "setting": PAPER,
        "side": SIDE,
        "assumed": asdict(Gpu()),
        "rows": rows,
    }


def row(precision: str, counts: list[dict[str, int]]) -> dict[str, Any]:
    """One batch: mean and largest counts per image, bytes of global memory, predicted time."""
    gpu, pixels = Gpu(), SIDE * SIDE
    planes = moved_by_planes(pixels, REAL[precision]) * len(counts)
    blocks = sum(moved_by_block(pixels, REAL[precision], c) for c in counts)
    times = [block_cycles(pixels, c, gpu) / gpu.clock for c in counts]
    before = 4 * gpu.launch + planes / gpu.bandwidth
    seconds = before + max(makespan(times, 2 * gpu.multiprocessors), blocks / gpu.bandwidth)
    return {
        "precision": precision,
        "batch": len(counts),
        "mean": {name: sum(c[name] for c in counts) / len(counts) for name in counts[0]},
        "largest": {name: max(c[name] for c in counts) for name in counts[0]},
        "bytes": planes + blocks,
        "image_ms": {"mean": 1e3 * sum(times) / len(times), "largest": 1e3 * max(times)},
        "predicted_ms": 1e3 * seconds,
        "predicted_images_per_second": len(counts) / seconds,
    }


def moved_by_planes(pixels: int, real: int) -> int:
    """Bytes of one image for uint8 pixels in, blurred twice, four weights out; neighbours from caches."""
    values = CHANNELS * pixels
    return values + 2 * 2 * values * real + 4 * pixels * real


def moved_by_block(pixels: int, real: int, c: dict[str, int]) -> int:
    """Bytes of one image for bins, batches, components, the second pass and labels."""
    edges = c["edges"]
    bins = 2 * 4 * pixels * real + edges * CODE
    batches = edges * CODE + c["survivors"] * 32  # a weight is fetched with its sector
    components = 2 * pixels * COMPONENT + 2 * 2 * c["survivors"] * COMPONENT
    small = c["small_visits"] * (2 * CODE + 3 * 32)
    labels = pixels * (4 * 4 + 4 * real)
    return bins + batches + components + small + labels


def block_cycles(pixels: int, c: dict[str, int], gpu: Gpu) -> float:
    """Cycles of the block of one image."""
    per_pixel = math.ceil(pixels / gpu.threads)
    fill = 2 * per_pixel * (gpu.far + 4 * gpu.claim)
    start = 3 * per_pixel * gpu.far
    round_ = 4 * gpu.shared + gpu.near + gpu.claim + gpu.division + gpu.issue
    merging = c["rounds"] * round_ + c["round_steps"] * gpu.shared
    tiles = math.ceil(c["edges"] / max(c["batches"], 1) / (gpu.threads - 32))
    steps = 3  # of the roots of an edge: filter_steps / edges
    filtering = c["batches"] * (4 * gpu.sync + tiles * (2 * gpu.far + steps * gpu.shared + gpu.issue))
    preparing = filtering + c["stages"] * (gpu.sync + 2 * gpu.shared)
    small = math.ceil(c["small_visits"] / gpu.threads) * 5 * gpu.far + c["small_rounds"] * 6 * gpu.sync
    labels = 5 * per_pixel * gpu.far
    return fill + start + max(merging, preparing) + small + labels


def makespan(times: list[float], slots: int) -> float:
    """Seconds until all are done if each, in order, goes to the first free slot."""
    free = [0.0] * slots
    for time in times:
        heapq.heappush(free, heapq.heappop(free) + time)
    return max(free)


if __name__ == "__main__":
    main()
