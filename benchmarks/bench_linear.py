"""linear: PyTorch's own product (MKL on x86 CPUs), compiled and not, against oneDNN, which `auto` takes.

`pytest benchmarks/bench_linear.py --benchmark-only`. CPU only: elsewhere the op is PyTorch's own. The layers
of ViT-B/16 at batch 8. Output and gradients are compared with the twin in float64 before anything is timed.
"""

from __future__ import annotations

import pytest
import torch
from harness.op_rivals import Case, Inputs, Op, enter_op, every_rival, generator
from harness.rivals import timed
from harness.settings import CUDA, DEVICE, SMOKE

from segclip_fast.ops import linear, linear_ref

pytestmark = [timed, pytest.mark.skipif(CUDA, reason="on CUDA the op is PyTorch's own")]
OP = Op("linear", linear, linear_ref, lambda out: {"out": out}, ("x", "weight", "bias"))
SIZES = [(64, 128, 256)] if SMOKE else [(1952, 768, 3072), (1952, 3072, 768), (64, 768, 3072)]  # M, I, O


def make(seed, shape, dtype):
    M, I, O = (shape[name] for name in "MIO")  # noqa: E741
    random = generator(seed)
    sizes = {"x": (M, I), "weight": (O, I), "bias": (O,)}
    tensors = {
        name: torch.randn(size, device=DEVICE, generator=random).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }
    return Inputs(tensors, {"out": torch.randn((M, O), device=DEVICE, generator=random).to(dtype)})


CASES = [
    Case(OP, {"M": M, "I": I, "O": O}, "fp32", make, f"M {M}, I {I}, O {O}")
    for M, I, O in SIZES  # noqa: E741
]


@every_rival(CASES)
def test_linear(benchmark, case, direction, rival):
    enter_op(benchmark, case, direction, rival)
