"""Inference with ViT-B/16: a batch of windows through the image encoder, and one photograph segmented.

`pytest benchmarks/bench_inference.py --benchmark-only`. Features and region assignments are compared with the
fp32 reference path before anything is timed, the label map with that of the reference path.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness.gate import full_precision
from harness.models import MARGINS, RIVALS, SCOPES, entry_point, graph_breaks, model
from harness.pictures import images, photo_paths
from harness.rivals import Plan, Rival, compare, enter, timed
from harness.settings import CUDA, DEVICE, PRECISIONS, SMOKE

from segclip_fast.ops._dispatch import force

pytestmark = timed
B = 64 if CUDA else 2 if SMOKE else 8
LABELS = ("cat", "coffee cup", "rocket", "astronaut", "sky", "table")
EAGER = ("reference", "fast")  # segment resizes and merges on the host; encode_image is the part to compile
FLIPS = 500  # pixels of the photograph's 262,144 on which two regions or labels score alike
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}


@functools.lru_cache(maxsize=1)
def encoded(precision):
    windows = images(B).to(DEVICE)
    model().eval()
    with torch.no_grad(), full_precision(), force("reference"):
        best, second = model().encode_image(windows).logits.topk(2, dim=1).values.unbind(1)
    near_ties = int((best - second < MARGINS[precision]).sum())  # rounding may assign these otherwise

    def rival(name, at):
        torch._dynamo.utils.counters.clear()
        encode = entry_point(name, at, model().encode_image)

        def call(_=0):
            with torch.no_grad():
                return encode(windows)

        def values():
            found = call()
            features = {"image": found.image, "regions": found.regions, "logits": found.logits}
            return features | {"assignment": found.hard.argmax(dim=1)}

        return Rival(call, values, facts=graph_breaks if name.endswith("compiled") else dict)

    makers = {name: functools.partial(rival, name, precision) for name in RIVALS}
    plan = Plan(TOLERANCES[precision], rounds=7, seconds=0.1, flips_allowed=near_ties)
    return compare(makers, rival("reference", "fp32").values, plan)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rival", RIVALS)
def test_encode_image(benchmark, precision, rival):
    enter(
        benchmark,
        f"encode_image, B {B}, {precision}",
        encoded(precision),
        rival,
        op="encode_image",
        size=f"ViT-B/16, B {B}",
        shape={"B": B},
        dtype=precision,
        direction="forward",
    )


@functools.lru_cache(maxsize=1)
def segmented():
    path = photo_paths()[0]
    model().eval()

    def rival(name):
        def call(_=0):
            with force(SCOPES[name]):
                return model().segment(path, labels=LABELS)

        return Rival(call, lambda: {"labels": torch.from_numpy(call().labels)})

    makers = {name: functools.partial(rival, name) for name in EAGER}
    return compare(makers, lambda: rival("reference").values(), Plan(0.0, rounds=7, flips_allowed=FLIPS))


@pytest.mark.parametrize("rival", EAGER)
def test_segment(benchmark, rival):
    if not photo_paths():
        pytest.skip("this installation of scikit-image has no photographs")
    pytest.importorskip("open_clip", reason="segment needs CLIP's tokenizer, from open_clip_torch")
    name = photo_paths()[0].name
    enter(
        benchmark,
        f"segment {name}, fp32",
        segmented(),
        rival,
        op="segment",
        size=f"ViT-B/16, {name}, {len(LABELS)} labels",
        shape={"B": 1},
        dtype="fp32",
        direction="forward",
    )
