"""felzenszwalb against scikit-image and OpenCV's graph segmentation: 224 x 224 x 3 crops of photographs.

`pytest benchmarks/bench_felzenszwalb.py --benchmark-only`. Times are per round of CROPS images, on one thread
unless the name says otherwise, or per batch. Labels are compared before anything is timed, on the CPU with
scikit-image's, on CUDA with the CPU's.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from harness import pictures
from harness.settings import CUDA, DEVICE, SMOKE
from harness.timing import interleaved, measured_seconds, play

from segclip_fast.ops import felzenszwalb, felzenszwalb_ref, patch_labels, patch_labels_ref
from segclip_fast.ops.felzenszwalb import PRECISIONS

CROPS = 2 if SMOKE else 16
BATCHES = (2,) if SMOKE else (32, 96, 256)
SETTINGS = {
    "paper": pictures.PAPER,
    "scale100": {"scale": 100.0, "sigma": 0.8, "min_size": 20},
    "default": {"scale": 1.0, "sigma": 0.8, "min_size": 20},
}
settings = pytest.mark.parametrize("setting", list(SETTINGS))
on_cpu = pytest.mark.skipif(CUDA, reason="measured with SEGCLIP_BENCH_DEVICE=cpu")
on_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(scope="module")
def crops():
    return pictures.crops(CROPS)


@pytest.fixture(scope="module")
def gate(crops):
    """Equality with scikit-image on every timed image; its argsort is made stable for this check only."""
    segmentation = pytest.importorskip("skimage.segmentation")
    plain = np.argsort
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "argsort", lambda a, *_, **__: plain(a, kind="stable"))
        for setting in SETTINGS.values():
            for crop in crops:
                expected = segmentation.felzenszwalb(crop, **setting)
                np.testing.assert_array_equal(felzenszwalb(crop, **setting), expected)
    corner = crops[0][:64, :64]
    for setting in SETTINGS.values():  # scikit-image has no float32: the twin, which is slow
        single = setting | {"precision": "float32"}
        np.testing.assert_array_equal(felzenszwalb(corner, **single), felzenszwalb_ref(corner, **single))


def time_each(benchmark, function, crops, setting, group):
    benchmark.group = f"felzenszwalb {group}, {CROPS} crops 224x224x3"
    benchmark.extra_info.update(images=CROPS, threads=1, **SETTINGS[setting])
    benchmark.pedantic(lambda: [function(crop) for crop in crops], rounds=5, warmup_rounds=1)


@on_cpu
@settings
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ours(benchmark, crops, gate, setting, precision):
    chosen = SETTINGS[setting] | {"threads": 1, "precision": precision}
    time_each(benchmark, lambda crop: felzenszwalb(crop, **chosen), crops, setting, setting)


@on_cpu
@settings
def test_skimage(benchmark, crops, gate, setting):
    from skimage.segmentation import felzenszwalb as skimage_felzenszwalb

    time_each(
        benchmark, lambda crop: skimage_felzenszwalb(crop, **SETTINGS[setting]), crops, setting, setting
    )


@on_cpu
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


@on_cpu
@pytest.mark.parametrize("threads", sorted({1, 2, len(os.sched_getaffinity(0))}))
def test_ours_batch(benchmark, crops, gate, threads):
    batch = torch.from_numpy(np.stack(crops * 4)).permute(0, 3, 1, 2)  # (B, C, H, W)
    benchmark.group = f"felzenszwalb paper, batch of {len(batch)}"
    benchmark.extra_info.update(images=len(batch), threads=threads, **SETTINGS["paper"])
    benchmark.pedantic(
        lambda: felzenszwalb(batch, threads=threads, **SETTINGS["paper"]), rounds=5, warmup_rounds=1
    )


@on_cpu
@pytest.mark.parametrize("which", ["compiled", "twin"])
def test_patch_labels(benchmark, crops, which):
    batch = torch.from_numpy(np.stack(crops * 4)).permute(0, 3, 1, 2)
    labels = felzenszwalb(batch, **SETTINGS["paper"])
    assert torch.equal(patch_labels(labels, 16), patch_labels_ref(labels, 16))
    function = {"compiled": patch_labels, "twin": patch_labels_ref}[which]
    benchmark.group = f"patch_labels, batch of {len(batch)}, patches of 16 x 16"
    benchmark.extra_info.update(
        images=len(batch), implementation=f"{which}, {torch.get_num_threads()} threads"
    )
    benchmark.pedantic(lambda: function(labels, 16), rounds=10, warmup_rounds=2)


@pytest.fixture(scope="module", params=BATCHES, ids="B{}".format)
def cuda_samples(request):
    """Seconds per batch of every implementation, in turn; their labels are equal."""
    size = request.param
    host = torch.from_numpy(np.stack(pictures.crops(size))).permute(0, 3, 1, 2).contiguous()
    sets = [host.to(DEVICE).roll(i, dims=0) for i in range(4)]
    calls = {}
    for precision in PRECISIONS:
        chosen = SETTINGS["paper"] | {"precision": precision}
        expected = felzenszwalb(host, **chosen)
        found = felzenszwalb(sets[0], **chosen)
        assert torch.equal(found.cpu(), expected), f"{precision}: labels differ from the CPU's"
        calls[f"cuda {precision}"] = lambda i, chosen=chosen: felzenszwalb(sets[i % 4], **chosen)
    labels = felzenszwalb(sets[0], **SETTINGS["paper"])
    assert torch.equal(patch_labels(labels, 16).cpu(), patch_labels(labels.cpu(), 16))
    calls["cuda patch_labels"] = lambda i: patch_labels(labels, 16)
    samples = interleaved(calls, DEVICE, rounds=10, seconds=0.05)
    threads = len(os.sched_getaffinity(0))
    cpu = {f"cpu {threads} threads": lambda i: felzenszwalb(host, **SETTINGS["paper"])}
    return size, samples | interleaved(cpu, torch.device("cpu"), rounds=3, seconds=0.0)


@on_cuda
@pytest.mark.benchmark(timer=measured_seconds)
@pytest.mark.parametrize("which", ["cuda float64", "cuda float32", "cuda patch_labels", "cpu"])
def test_batch(benchmark, cuda_samples, which):
    size, samples = cuda_samples
    name = next(name for name in samples if name.startswith(which))
    benchmark.group = f"felzenszwalb paper, batch of {size} crops 224x224x3"
    benchmark.extra_info.update(images=size, implementation=name, **SETTINGS["paper"])
    benchmark.extra_info.update(device="cuda", device_name=torch.cuda.get_device_name())
    play(benchmark, samples[name])
