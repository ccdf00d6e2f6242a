"""Labels of felzenszwalb: in float64 scikit-image's (stable argsort), in both precisions its twin's."""

from __future__ import annotations

import numpy as np
import pytest
from superpixel_cases import PAPER, SETTINGS, adversarial, crops, pictures, skimage_stable

from segclip_fast.ops import felzenszwalb, felzenszwalb_ref

precisions = pytest.mark.parametrize("precision", ["float64", "float32"])
settings = pytest.mark.parametrize("setting", list(SETTINGS))


def assert_equal_to_skimage(image, case, **setting):
    np.testing.assert_array_equal(
        felzenszwalb(image, **setting), skimage_stable(image, **setting), err_msg=str(case)
    )


def assert_equal_to_twin(image, case, **setting):
    np.testing.assert_array_equal(
        felzenszwalb(image, **setting), felzenszwalb_ref(image, **setting), err_msg=str(case)
    )


# --- equality with scikit-image


@pytest.mark.slow
@settings
def test_equals_skimage_on_whole_pictures(setting):
    for name, picture in pictures().items():
        assert_equal_to_skimage(picture, name, **SETTINGS[setting])


@settings
def test_equals_skimage_on_every_picture_at_small_size(setting):
    for name, picture in pictures().items():
        step = max(1, min(picture.shape[:2]) // 100)
        small = picture[::step, ::step]
        if len(small) == 25 and not name.endswith("0]"):
            continue  # a tenth of the 200 small faces
        assert_equal_to_skimage(small, name, **SETTINGS[setting])


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="60"), pytest.param(300, id="300", marks=pytest.mark.slow)]
)
def test_equals_skimage_on_crops_at_the_paper_setting(count):
    for i, crop in enumerate(crops(count, 224, seed=count)):
        assert_equal_to_skimage(crop, i, **PAPER)


@pytest.mark.parametrize(
    ("scale", "sigma", "min_size"),
    [(1, 0.0, 20), (1, 0.8, 20), (100, 0.5, 20), (500, 0.0, 20), (500, 0.8, 0)],
)
def test_equals_skimage_at_other_settings(scale, sigma, min_size):
    for i, crop in enumerate(crops(12, 224, seed=1)):
        assert_equal_to_skimage(crop, i, scale=scale, sigma=sigma, min_size=min_size)


@pytest.mark.parametrize("block", range(4))
def test_equals_skimage_on_adversarial_images(block):
    for seed in range(block * 500, block * 500 + 500):
        image, setting = adversarial(seed)
        assert_equal_to_skimage(image, f"seed {seed}: {image.shape} {image.dtype} {setting}", **setting)


# --- equality with the twin


@precisions
def test_equals_the_twin_on_adversarial_images(precision):
    for seed in range(2000, 2500):
        image, setting = adversarial(seed)
        case = f"seed {seed}: {image.shape} {image.dtype} {setting}"
        assert_equal_to_twin(image, case, precision=precision, **setting)


@precisions
@settings
def test_equals_the_twin_on_crops(precision, setting):
    for i, crop in enumerate(crops(3, 80, seed=2)):
        assert_equal_to_twin(crop, i, precision=precision, **SETTINGS[setting])


# --- what is hard for the sort and for merging


@precisions
def test_weights_spread_over_many_binades(precision):
    # Steps far below the largest weight are sorted apart; with most of them small, all bits are sorted. The
    # last two images are denormal and zero in float32.
    rng = np.random.default_rng(0)
    for low, high in ((-12, 0), (-3, 0), (-44, -36), (-300, -290)):
        image = rng.random((32, 32)) * 10.0 ** np.linspace(low, high, 32)[:, None]
        for scale in (0.0, 1e-3, 1.0):
            setting = {"scale": scale, "sigma": 0.0, "min_size": 3}
            assert_equal_to_twin(image, (low, high, scale), precision=precision, **setting)
            if precision == "float64":
                assert_equal_to_skimage(image, (low, high, scale), **setting)


def test_min_size_pass_is_sequential():
    # Joining every small segment to its nearest neighbour at once would give two segments here.
    image = np.array([[0, 10, 15, 22, 23, 24]], np.uint8)
    labels = felzenszwalb(image, scale=0, sigma=0, min_size=3)
    np.testing.assert_array_equal(labels, np.zeros((1, 6)))


# --- float32


@pytest.mark.parametrize("op", [felzenszwalb, felzenszwalb_ref])
def test_float32_is_computed_in_float32(op):
    image = np.array([[0.5, 0.5 + 1e-9]])  # one value in float32
    setting = {"scale": 1e-12, "sigma": 0.0, "min_size": 0}
    np.testing.assert_array_equal(op(image, **setting), [[0, 1]])
    np.testing.assert_array_equal(op(image, precision="float32", **setting), [[0, 0]])


def test_float32_hardly_changes_labels_at_the_paper_setting():
    pairs = [
        (felzenszwalb(crop, **PAPER), felzenszwalb(crop, precision="float32", **PAPER))
        for crop in crops(100, 224, seed=3)
    ]
    assert sum(not np.array_equal(a, b) for a, b in pairs) <= 4  # flat drawings have ties to break
