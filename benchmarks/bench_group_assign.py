"""group_assign: the twin, compiled and not, against what `auto` takes, with the same given noise for all.

`pytest benchmarks/bench_group_assign.py --benchmark-only`. Every rival's outputs and gradients are compared
with the twin in float64 before anything is timed. The noise of the timed inputs leaves no near ties, so every
rival must assign every patch alike, whatever its rounding. bf16: as in an autocast step, patches in bf16 and
everything else in float32.
"""

from __future__ import annotations

import torch
from harness.op_rivals import Case, Inputs, Op, enter_op, every_rival, generator
from harness.rivals import timed
from harness.settings import CUDA, DEVICE, PRECISIONS, SMOKE

from segclip_fast.ops import group_assign, group_assign_ref

pytestmark = timed
TAU = 0.9
MARGINS = {torch.float32: 0.1, torch.bfloat16: 2.0}  # least lead of the best center over the second
OP = Op(
    "group_assign",
    group_assign,
    group_assign_ref,
    lambda out: {"pooled": out.pooled, "logits": out.logits, "hard": out.hard},
    ("centers", "patches", "key_weight", "value_weight", "noise"),
)
BATCHES = (96, 256) if CUDA else (2,) if SMOKE else (8, 32)
SHAPE = {"N": 196, "D": 768, "L": 8, "W": 64}


def make(seed, shape, dtype):
    B, N, D, L, W = (shape[name] for name in "BNDLW")
    random = generator(seed)

    def draw(*size, scale=1.0):
        return scale * torch.randn(size, device=DEVICE, generator=random)

    arguments = {
        "centers": draw(B, L, D),
        "patches": draw(B, N, D).to(dtype),
        "key_weight": draw(D, W, scale=W**-0.5),
        "key_gain": 1 + draw(D, scale=0.1),
        "key_bias": draw(D, scale=0.1),
        "value_weight": draw(D, W, scale=W**-0.5),
    }
    gumbel = -torch.empty(B, L, N, device=DEVICE).exponential_(generator=random).clamp(min=1e-30).log()
    noise = without_near_ties(arguments, gumbel, MARGINS[dtype])
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}
    gradients = {"pooled": draw(B, L, D), "logits": draw(B, L, N), "hard": draw(B, L, N)}
    return Inputs(leaves | {"noise": noise, "tau": TAU}, gradients)


@torch.no_grad()
def without_near_ties(arguments, noise, margin):
    """The noise, raised by `margin` at the best center of each patch that the second comes close to."""
    exact = {name: x.detach().float() for name, x in arguments.items()}
    scores = group_assign_ref(**exact).logits + noise  # (B, L, N)
    best, second = scores.topk(2, dim=1).values.unbind(1)
    near = best - second < margin  # (B, N)
    winner = scores.argmax(dim=1, keepdim=True)
    return noise.scatter_add(1, winner, margin * near[:, None].to(noise.dtype))


CASES = [
    Case(
        OP,
        {"B": B} | SHAPE,
        precision,
        make,
        f"B {B}, N {SHAPE['N']}, D {SHAPE['D']}, L {SHAPE['L']}",
        autocast=precision == "bf16",
    )
    for B in BATCHES
    for precision in PRECISIONS
]


@every_rival(CASES)
def test_group_assign(benchmark, case, direction, rival):
    enter_op(benchmark, case, direction, rival)
