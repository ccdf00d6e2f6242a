"""felzenszwalb against scikit-image and OpenCV's graph segmentation: 224 x 224 x 3 crops of photographs, CPU.

`pytest benchmarks/bench_felzenszwalb.py --benchmark-only`. Times are per round of CROPS images, on one thread
unless the name says otherwise. Labels are compared with scikit-image's before anything is timed.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import skimage.segmentation
import torch
from harness import pictures

from segclip_fast.ops import felzenszwalb

CROPS = 16
SETTINGS = {
    "paper": pictures.PAPER,
    "scale100": {"scale": 100.0, "sigma": 0.8, "min_size": 20},
    "default": {"scale": 1.0, "sigma": 0.8, "min_size": 20},
}
settings = pytest.mark.parametrize("setting", list(SETTINGS))


@pytest.fixture(scope="module")
def crops():
    return pictures.crops(CROPS)


@pytest.fixture(scope="module")
def gate(crops):
    """Equality with scikit-image on every timed image; its argsort is made stable for this check only."""
    plain = np.argsort
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "argsort", lambda a, *_, **__: plain(a, kind="stable"))
        for setting in SETTINGS.values():
            for crop in crops:
                expected = skimage.segmentation.felzenszwalb(crop, **setting)
                np.testing.assert_array_equal(felzenszwalb(crop, **setting), expected)


def time_each(benchmark, function, crops, setting, group):
    benchmark.group = f"felzenszwalb {group}, {CROPS} crops 224x224x3"
    benchmark.extra_info.update(images=CROPS, threads=1, **SETTINGS[setting])
    benchmark.pedantic(lambda: [function(crop) for crop in crops], rounds=5, warmup_rounds=1)


@settings
def test_ours(benchmark, crops, gate, setting):
    time_each(
        benchmark, lambda crop: felzenszwalb(crop, threads=1, **SETTINGS[setting]), crops, setting, setting
    )


@settings
def test_skimage(benchmark, crops, gate, setting):
    time_each(
        benchmark,
        lambda crop: skimage.segmentation.felzenszwalb(crop, **SETTINGS[setting]),
        crops,
        setting,
        setting,
    )


@settings
def test_opencv(benchmark, crops, gate, setting):
    """A rival in speed only: its blur and edges differ, so its labels do too."""
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "ximgproc"):
        pytest.skip("cv2.ximgproc is missing (pip install opencv-contrib-python-headless)")
    cv2.setNumThreads(1)
    s = SETTINGS[setting]
    segmenter = cv2.ximgproc.segmentation.createGraphSegmentation(s["sigma"], s["scale"], s["min_size"])
    time_each(benchmark, segmenter.processImage, crops, setting, setting)


@pytest.mark.parametrize("threads", sorted({1, 2, len(os.sched_getaffinity(0))}))
def test_ours_batch(benchmark, crops, gate, threads):
    batch = torch.from_numpy(np.stack(crops * 4)).permute(0, 3, 1, 2)  # (B, C, H, W)
    benchmark.group = f"felzenszwalb paper, batch of {len(batch)}"
    benchmark.extra_info.update(images=len(batch), threads=threads, **SETTINGS["paper"])
    benchmark.pedantic(
        lambda: felzenszwalb(batch, threads=threads, **SETTINGS["paper"]), rounds=5, warmup_rounds=1
    )
