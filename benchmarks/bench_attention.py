"""attention: the twin (einsum, softmax, einsum) against what `auto` takes. Image patches and causal text.

`pytest benchmarks/bench_attention.py --benchmark-only`. Every rival's output and gradients are compared with
the twin in float64 before anything is timed.
"""

from __future__ import annotations

import torch
from harness.op_rivals import Case, Inputs, Op, enter_op, every_rival, generator
from harness.rivals import timed
from harness.settings import CUDA, DEVICE, PRECISIONS, SMOKE

from segclip_fast.ops import attention, attention_ref

pytestmark = timed
OP = Op("attention", attention, attention_ref, lambda out: {"out": out}, ("q", "k", "v"))
BATCHES = (96, 256) if CUDA else (2,) if SMOKE else (8,)
TOWERS = {
    "image": {"T": 196, "S": 196, "H": 12, "d": 64},
    "text": {"T": 32, "S": 32, "H": 8, "d": 64, "causal": 1},
}


def make(seed, shape, dtype):
    B, T, S, H, d = (shape[name] for name in "BTSHd")
    random = generator(seed)

    def draw(tokens):
        return torch.randn(B, tokens, H, d, device=DEVICE, generator=random).to(dtype)

    q, k, v = (draw(tokens).requires_grad_() for tokens in (T, S, S))
    return Inputs({"q": q, "k": k, "v": v, "causal": bool(shape.get("causal"))}, {"out": draw(T)})


CASES = [
    Case(
        OP,
        {"B": B} | shape,
        precision,
        make,
        f"{tower}, B {B}, T {shape['T']}, H {shape['H']}, d {shape['d']}",
        replay=False,  # inside a captured graph nothing can be chosen by measurement
        compiled="compiled at the largest batch only" if max(BATCHES) > B else None,
    )
    for tower, shape in TOWERS.items()
    for B in BATCHES
    for precision in PRECISIONS
]


@every_rival(CASES)
def test_attention(benchmark, case, direction, rival):
    enter_op(benchmark, case, direction, rival)
