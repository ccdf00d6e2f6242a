"""What this machine can do: bytes per second of a large copy, operations per second of a large product.

`pytest benchmarks/bench_ceilings.py --benchmark-only`. The floors of the ops are divided by these.
"""

from __future__ import annotations

import pytest
import torch
from harness.rivals import Result, enter, timed
from harness.settings import CUDA, DEVICE, DTYPES, PRECISIONS, SMOKE
from harness.timing import interleaved

from segclip_fast.ops import linear

pytestmark = timed
COPIED = 2**20 if SMOKE else 2**30 if CUDA else 2**28  # bytes
SIDE = 256 if SMOKE else 8192 if CUDA else 2048


def measure(call):
    rounds, seconds = (1, 0.0) if SMOKE else (10, 0.05)
    return interleaved({"device": call}, DEVICE, rounds, seconds)["device"]


def test_copy(benchmark):
    source = torch.rand(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    result = Result(measure(lambda _: target.copy_(source)))
    facts = {"op": "copy", "size": f"{COPIED / 2**20:.0f} MiB", "dtype": "fp32", "direction": "forward"}
    enter(
        benchmark, "copy", {"device": result}, "device", floor_bytes=2 * COPIED, floor_operations=0, **facts
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_product(benchmark, precision):
    a, b = (torch.rand(SIDE, SIDE, device=DEVICE).to(DTYPES[precision]) for _ in range(2))
    result = Result(measure(lambda _: linear(a, b)))  # by the best library at hand
    facts = {"op": "product", "size": f"{SIDE} x {SIDE}", "dtype": precision, "direction": "forward"}
    floors = {"floor_bytes": 3 * a.nbytes, "floor_operations": 2 * SIDE**3}
    enter(benchmark, f"product, {precision}", {"device": result}, "device", **floors, **facts)
