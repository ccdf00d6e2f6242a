"""The CUDA superpixels, run on the CPU from the same source, against the CPU op and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from superpixel_cases import MIDDLE, PAPER, SETTINGS, adversarial, crops, pictures, skimage_stable

from segclip_fast import _C
from segclip_fast.ops import felzenszwalb, patch_labels_ref
from segclip_fast.ops.felzenszwalb import _gaussian_taps

MAX_CHANNELS = 128


def emulated(image, scale, sigma, min_size, precision="float64", **options):
    """Labels (H, W) of one NumPy image, and the counts of what was done."""
    planar = np.ascontiguousarray((image[:, :, None] if image.ndim == 2 else image).transpose(2, 0, 1))[None]
    labels, counts = _C.felzenszwalb_emulated(
        planar, scale, min_size, list(_gaussian_taps(sigma)), single=precision == "float32", **options
    )
    return labels[0], counts[0]


def check(image, setting, case, **options):
    labels, _ = emulated(image, **setting, **options)
    precision = options.get("precision", "float64")
    np.testing.assert_array_equal(labels, felzenszwalb(image, **setting, precision=precision), err_msg=case)


# How the GPU may run: where the parents of the pixels lie, how many warps, lanes forwards or backwards.
WAYS = [
    pytest.param({"warps": 1, "parents_shared": True}, id="shared"),
    pytest.param({"warps": 1, "parents_shared": False, "reversed": True}, id="global-reversed"),
    pytest.param({"warps": 1, "precision": "float32"}, id="float32"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", range(2))
def test_equals_the_cpu_op_on_adversarial_images(way, block):
    for seed in range(block * 1000, block * 1000 + 1000):
        image, setting = adversarial(seed)
        if image.ndim == 2 or image.shape[2] <= MAX_CHANNELS:
            check(image, setting, f"seed {seed}: {image.shape} {image.dtype} {setting}", **way)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_cpu_op_on_crops(way, setting):
    for i, crop in enumerate(crops(8, 224, seed=3)):
        check(crop, SETTINGS[setting], f"crop {i}", **way)


def test_equals_skimage_on_crops():
    for i, crop in enumerate(crops(12, 224, seed=4)):
        labels, _ = emulated(crop, **PAPER)
        np.testing.assert_array_equal(labels, skimage_stable(crop, **PAPER), err_msg=f"crop {i}")


@pytest.mark.slow
def test_equals_skimage_on_300_crops():
    for i, crop in enumerate(crops(300, 224, seed=0)):
        labels, _ = emulated(crop, **PAPER, reversed=bool(i % 2))
        np.testing.assert_array_equal(labels, skimage_stable(crop, **PAPER), err_msg=f"crop {i}")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_cpu_op_on_whole_pictures(setting):
    for name, picture in pictures().items():
        check(picture, SETTINGS[setting], name, parents_shared=False)


@pytest.mark.parametrize("warps", [2, 5])
def test_warps_that_run_at_the_same_time(warps):
    for seed in range(3000, 3030):
        image, setting = adversarial(seed)
        if image.ndim == 2 or image.shape[2] <= MAX_CHANNELS:
            check(image, setting, f"seed {seed}", warps=warps)
    check(next(crops(1, 96, seed=5)), MIDDLE, "crop", warps=warps)


def test_every_way_through_the_code_is_taken():
    # Bins larger than a batch, zero weights, final components, a window of edges, rounds of the second pass.
    rng = np.random.default_rng(0)
    stripes = (np.arange(120)[:, None] // 3 % 2 * 40 + rng.integers(0, 2, (120, 120))).astype(np.uint8)
    labels, counts = emulated(stripes, scale=20.0, sigma=0.0, min_size=12)
    np.testing.assert_array_equal(labels, felzenszwalb(stripes, scale=20.0, sigma=0.0, min_size=12))
    for name in ("united", "batches", "large_exchanges", "exchanges", "rounds", "merges", "rejected"):
        assert counts[name] > 0, name
    _, of_crop = emulated(next(crops(1, 224, seed=4)), **PAPER)
    assert of_crop["small_rounds"] > 1
    assert counts["rounds"] < counts["survivors"] / 2  # more than one edge is merged at a time
    assert counts["survivors"] < counts["edges"] / 2  # most edges never need to be ordered


def test_more_pixels_than_shared_memory_holds():
    large = next(crops(1, 300, seed=6))
    assert large.shape[0] * large.shape[1] > 65536
    check(large, PAPER, "90,000 pixels", parents_shared=False)
    with pytest.raises(ValueError, match="more than 65536 pixels"):
        emulated(large, **PAPER, parents_shared=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_get_minus_one(bad):
    images = np.random.default_rng(1).random((3, 1, 9, 11))
    images[1, 0, 4, 7] = bad
    labels, _ = _C.felzenszwalb_emulated(images, 50.0, 3, list(_gaussian_taps(0.8)))
    assert (labels[1] == -1).all()
    for i in (0, 2):
        alone = felzenszwalb(images[i, 0], scale=50.0, sigma=0.8, min_size=3)
        np.testing.assert_array_equal(labels[i], alone)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("patch", [1, 2, 5, 8, 16])
def test_patch_labels(patch, mean, backwards):
    rng = np.random.default_rng(patch)
    for top in (1, 3, 40, 2**31):
        labels = rng.integers(-top, top, (2, 3 * patch, 4 * patch)).astype(np.int32)
        expected = patch_labels_ref(torch.from_numpy(labels), patch, "mean" if mean else "majority")
        found = _C.patch_labels_emulated(labels, patch, mean, backwards)
        np.testing.assert_array_equal(found, expected.numpy())
