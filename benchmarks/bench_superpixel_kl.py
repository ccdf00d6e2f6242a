"""superpixel_kl: the text-book form with its N x N matrix, compiled and not, against what `auto` takes.

`pytest benchmarks/bench_superpixel_kl.py --benchmark-only`. Superpixels of photographs, random one-hot
assignments. Loss and gradient are compared with the twin in float64 before anything is timed.
"""

from __future__ import annotations

import torch
from harness.op_rivals import Case, Inputs, Op, enter_op, every_rival, generator
from harness.pictures import SIDE, patch_superpixels
from harness.rivals import timed
from harness.settings import CUDA, DEVICE, PRECISIONS, SMOKE

from segclip_fast.ops import superpixel_kl, superpixel_kl_ref

pytestmark = timed
OP = Op(
    "superpixel_kl", superpixel_kl, superpixel_kl_ref, lambda loss: {"loss": loss}, ("labels", "assignment")
)
L = 8
SIZES = [(96, 196), (256, 196)] if CUDA else [(2, 196)] if SMOKE else [(8, 196), (32, 784)]  # B, N


def make(seed, shape, dtype):
    B, N, L = (shape[name] for name in "BNL")
    labels = patch_superpixels(B, SIDE // round(N**0.5)).flatten(1).to(DEVICE)
    choice = torch.randint(L, (B, N), device=DEVICE, generator=generator(seed))
    assignment = torch.nn.functional.one_hot(choice, L).to(dtype).requires_grad_()
    gradient = torch.ones((), device=DEVICE, dtype=dtype)
    return Inputs({"labels": labels.clone(), "assignment": assignment}, {"loss": gradient})


CASES = [
    Case(OP, {"B": B, "N": N, "L": L}, precision, make, f"B {B}, N {N}, L {L}")
    for B, N in SIZES
    for precision in PRECISIONS
]


@every_rival(CASES)
def test_superpixel_kl(benchmark, case, direction, rival):
    enter_op(benchmark, case, direction, rival)
