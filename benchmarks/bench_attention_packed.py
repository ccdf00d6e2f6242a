"""attention_packed: captions of different lengths end to end, against the twin's loop over them.

`pytest benchmarks/bench_attention_packed.py --benchmark-only`. What packing is worth against padding shows in
bench_train_step.py. Output and gradients are compared with the twin in float64 before anything is timed.
"""

from __future__ import annotations

import torch
from harness.op_rivals import Case, Inputs, Op, enter_op, every_rival, generator
from harness.pictures import tokens
from harness.rivals import timed
from harness.settings import CUDA, DEVICE, PRECISIONS, SMOKE

from segclip_fast.ops import attention_packed, attention_packed_ref

pytestmark = timed
OP = Op(
    "attention_packed",
    attention_packed,
    attention_packed_ref,
    lambda out: {"out": out},
    ("q", "k", "v", "starts"),
)
BATCHES = (96, 256) if CUDA else (2,) if SMOKE else (8,)
H, WIDTH = 8, 64


def lengths(B):
    return tokens(B).argmax(dim=1) + 1  # up to the end token, which is the largest id


def make(seed, shape, dtype):
    random = generator(seed)
    sizes = lengths(shape["B"])
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(DEVICE, torch.int32)

    def draw():
        size = (shape["total"], shape["H"], shape["d"])
        return torch.randn(size, device=DEVICE, generator=random).to(dtype)

    q, k, v = (draw().requires_grad_() for _ in range(3))
    plain = {"starts": starts, "longest": int(sizes.max()), "causal": True, "lengths": sizes.tolist()}
    return Inputs({"q": q, "k": k, "v": v} | plain, {"out": draw()})


def shape_of(B):
    sizes = lengths(B)
    pairs = int((sizes * (sizes + 1) // 2).sum())
    return {"B": B, "total": int(sizes.sum()), "pairs": pairs, "H": H, "d": WIDTH}


CASES = [
    Case(
        OP,
        shape_of(B),
        precision,
        make,
        f"text, B {B}, {shape_of(B)['total']} tokens, H {H}, d {WIDTH}",
        replay=False,  # inside a captured graph nothing can be chosen by measurement
        compiled="the twin loops over the sequences: its compiled form would be unrolled by length",
    )
    for B in BATCHES
    for precision in PRECISIONS
]


@every_rival(CASES)
def test_attention_packed(benchmark, case, direction, rival):
    enter_op(benchmark, case, direction, rival)
