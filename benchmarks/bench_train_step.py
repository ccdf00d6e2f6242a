"""A training step of ViT-B/16 with all three losses: the reference path, compiled and not, against the fast.

`pytest benchmarks/bench_train_step.py --benchmark-only`. Gradients cleared, forward with given noise,
backward; on CUDA in bf16 also with fused AdamW. Losses and every parameter's gradient are compared with the
fp32 reference path before anything is timed.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness.models import PLAIN, batch, model, step_rival
from harness.models import RIVALS as PATHS
from harness.rivals import Plan, compare, enter, timed
from harness.settings import CUDA, PRECISIONS, SMOKE

pytestmark = timed
RIVALS = PATHS if CUDA else (*PATHS, PLAIN)
BATCHES = (96, 256) if CUDA else (2,) if SMOKE else (8,)
KINDS = ("step", "step with AdamW") if CUDA else ("step",)
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}


@functools.lru_cache(maxsize=1)
def results(B, precision, kind):
    given = batch(B, precision)

    @functools.cache
    def exact():
        return step_rival("reference", "fp32", given).values()

    def rival(name):
        optimizer = None
        if kind != "step":  # a rate of 0: the work of an update, and weights that stay the same
            optimizer = torch.optim.AdamW(model().parameters(), lr=0.0, weight_decay=0.0, fused=True)
        return step_rival(name, precision, given, optimizer)

    names = RIVALS if kind == "step" and max(BATCHES) == B else [n for n in RIVALS if "compiled" not in n]
    makers = {name: functools.partial(rival, name) for name in names}
    return compare(makers, exact, Plan(TOLERANCES[precision], rounds=5, seconds=0.3 if CUDA else 0.0))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("B", BATCHES)
def test_train_step(benchmark, B, precision, kind, rival):
    if rival.endswith("compiled") and max(BATCHES) > B:
        pytest.skip("compiled at the largest batch only, to save time")
    if kind != "step" and (precision == "fp32" or max(BATCHES) > B or rival.endswith("compiled")):
        pytest.skip("with the optimizer: eager bf16 at the largest batch only, to save time")
    enter(
        benchmark,
        f"training step, B {B}, {precision}, {kind}",
        results(B, precision, kind),
        rival,
        op="training step",
        size=f"ViT-B/16, B {B}",
        shape={"B": B},
        dtype=precision,
        direction=kind,
    )
