"""felzenszwalb against scikit-image (stable argsort) and its twin; patch labels against plain loops."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.segmentation
import torch
from skimage import io
from torch._subclasses.fake_tensor import FakeTensorMode

from segclip_fast.ops import felzenszwalb, felzenszwalb_ref, patch_labels

PAPER = {"scale": 224.0, "sigma": 0.9, "min_size": 224}
# Pictures inside scikit-image's wheel: photographs, textures, micrographs, drawings.
PICTURES = [
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png",
    "coffee.png", "coins.png", "color.png", "grass.png", "gravel.png",
    "horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "page.png", "phantom.png", "retina.jpg", "rocket.jpg", "text.png",
]  # fmt: skip


def skimage_stable(image, **parameters):
    """scikit-image with a stable argsort; the default one orders ties as the CPU's SIMD sort happens to."""
    plain = np.argsort

    def stable(a, *args, **kwargs):
        return plain(a, kind="stable")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more than 3 channels
        patch.setattr(np, "argsort", stable)
        return skimage.segmentation.felzenszwalb(image, **parameters)


@pytest.fixture(scope="module")
def pictures():
    folder = Path(skimage.__file__).parent / "data"
    found = [io.imread(folder / name) for name in PICTURES if (folder / name).exists()]
    assert len(found) >= 10
    return [picture[..., :3] if picture.ndim == 3 else picture for picture in found]


def random_crops(pictures, count, side, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        picture = pictures[i % len(pictures)]
        y, x = (int(rng.integers(0, max(n - side, 0) + 1)) for n in picture.shape[:2])
        yield np.ascontiguousarray(picture[y : y + side, x : x + side]).astype(np.uint8)


def adversarial(seed):
    """A tiny image with many ties, and parameters."""
    rng = np.random.default_rng(seed)
    H, W = [(1, rng.integers(1, 65)), (rng.integers(1, 65), 1), (1, 1), *[tuple(rng.integers(1, 13, 2))] * 5][
        rng.integers(0, 8)
    ]
    C = int(rng.choice([1, 1, 2, 3, 3, 3, 5, 7, 8, 9, 17, 130]))
    y, x, c = np.ogrid[:H, :W, :C]
    levels = int(rng.integers(2, 5))
    kinds = [
        rng.integers(0, levels, (H, W, C)) * (255 // (levels - 1)),
        np.full((H, W, C), rng.integers(0, 256)),
        (y + x + c) % 2 * rng.integers(1, 256),
        (y * rng.integers(0, 9) + x * rng.integers(0, 9) + c) % 256,
        rng.integers(0, 256, (H, W, C)),
        (y // 2 + x // 3) % levels * 40 + c % 2,
    ]
    image = np.broadcast_to(kinds[rng.integers(0, len(kinds))], (H, W, C)).astype(np.uint8)
    image = [image, image / 255, (image / 255).astype(np.float32), rng.random((H, W, C))][rng.integers(0, 4)]
    image = image[:, :, 0] if C == 1 and rng.integers(0, 2) else image
    scale = float(rng.choice([0, 1, 20, 100, 224, 1000, 5000]))
    sigma = float(rng.choice([0, 0, 0.3, 0.5, 0.8, 0.9, 2, rng.uniform(0, 2)]))
    return image, {"scale": scale, "sigma": sigma, "min_size": int(rng.choice([0, 1, 2, 3, 5, 20, 224]))}


# --- equality with scikit-image


def test_equals_skimage_on_crops_at_the_paper_setting(pictures):
    for i, crop in enumerate(random_crops(pictures, 200, 224, seed=0)):
        np.testing.assert_array_equal(
            felzenszwalb(crop, **PAPER), skimage_stable(crop, **PAPER), err_msg=str(i)
        )


@pytest.mark.parametrize(
    ("scale", "sigma", "min_size"),
    [(1, 0.0, 20), (1, 0.8, 20), (100, 0.5, 20), (500, 0.0, 20), (500, 0.8, 0)],
)
def test_equals_skimage_at_other_settings(pictures, scale, sigma, min_size):
    setting = {"scale": scale, "sigma": sigma, "min_size": min_size}
    for i, crop in enumerate(random_crops(pictures, 20, 224, seed=1)):
        np.testing.assert_array_equal(
            felzenszwalb(crop, **setting), skimage_stable(crop, **setting), err_msg=str(i)
        )


@pytest.mark.slow
def test_equals_skimage_on_whole_pictures(pictures):
    for setting in (
        PAPER,
        {"scale": 100, "sigma": 0.8, "min_size": 20},
        {"scale": 1, "sigma": 0.0, "min_size": 5},
    ):
        for name, picture in zip(PICTURES, pictures, strict=True):
            image = picture.astype(np.uint8)
            np.testing.assert_array_equal(
                felzenszwalb(image, **setting), skimage_stable(image, **setting), err_msg=name
            )


@pytest.mark.parametrize("block", range(4))
def test_equals_skimage_on_adversarial_images(block):
    for seed in range(block * 200, block * 200 + 200):
        image, setting = adversarial(seed)
        case = f"seed {seed}: {image.shape} {image.dtype} {setting}"
        np.testing.assert_array_equal(
            felzenszwalb(image, **setting), skimage_stable(image, **setting), err_msg=case
        )


def test_twin_equals_op_on_adversarial_images():
    for seed in range(1000, 1300):
        image, setting = adversarial(seed)
        case = f"seed {seed}: {image.shape} {image.dtype} {setting}"
        np.testing.assert_array_equal(
            felzenszwalb(image, **setting), felzenszwalb_ref(image, **setting), err_msg=case
        )


def test_twin_equals_op_on_a_crop(pictures):
    crop = next(random_crops(pictures, 1, 96, seed=2))
    np.testing.assert_array_equal(felzenszwalb(crop, **PAPER), felzenszwalb_ref(crop, **PAPER))


def test_weights_spread_over_many_binades():
    # Steps far below the largest weight are sorted apart; with most of them small, all bits are sorted.
    rng = np.random.default_rng(0)
    for exponents in (np.linspace(-12, 0, 32), np.linspace(-3, 0, 32), np.linspace(-300, -290, 32)):
        image = rng.random((32, 32)) * 10.0 ** exponents[:, None]
        for scale in (0.0, 1e-3, 1.0):
            setting = {"scale": scale, "sigma": 0.0, "min_size": 3}
            np.testing.assert_array_equal(felzenszwalb(image, **setting), skimage_stable(image, **setting))


def test_min_size_pass_is_sequential():
    # Joining every small segment to its nearest neighbour at once would give two segments here.
    image = np.array([[0, 10, 15, 22, 23, 24]], np.uint8)
    labels = felzenszwalb(image, scale=0, sigma=0, min_size=3)
    np.testing.assert_array_equal(labels, np.zeros((1, 6)))


# --- batches, layouts, threads


def test_result_types(pictures):
    crop = next(random_crops(pictures, 1, 40, seed=3))
    labels = felzenszwalb(crop)
    assert labels.dtype == np.int64
    assert labels.shape == (40, 40)
    batch = felzenszwalb(torch.from_numpy(crop).permute(2, 0, 1)[None])
    assert batch.dtype == torch.int32
    assert batch.shape == (1, 40, 40)
    np.testing.assert_array_equal(batch[0].numpy(), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 9])
def test_batch_equals_single_images_for_every_layout_and_thread_count(dtype, channels):
    generator = torch.Generator().manual_seed(0)
    planar = torch.randint(0, 256, (5, channels, 31, 23), generator=generator, dtype=torch.uint8)
    planar = planar if dtype == torch.uint8 else planar.to(dtype) / 255
    setting = {"scale": 50.0, "sigma": 0.7, "min_size": 9}
    single = np.stack([felzenszwalb(image.permute(1, 2, 0).numpy().copy(), **setting) for image in planar])
    views = {
        "planar": planar,
        "channels last": planar.contiguous(memory_format=torch.channels_last),
        "strided": planar.repeat_interleave(2, dim=3)[..., ::2],
        "transposed": planar.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, view in views.items():
        for threads in (0, 1, 2, 7):
            labels = felzenszwalb(view, threads=threads, **setting)
            np.testing.assert_array_equal(labels.numpy(), single, err_msg=f"{name}, {threads} threads")


def test_array_views(pictures):
    crop = next(random_crops(pictures, 1, 64, seed=4))
    for view in (crop[::-1], crop[:, ::2], crop.transpose(1, 0, 2), crop[..., ::-1], crop[..., 1]):
        np.testing.assert_array_equal(felzenszwalb(view, **PAPER), felzenszwalb(view.copy(), **PAPER))
    packed = np.zeros((20, 20), np.dtype([("skip", "u1"), ("value", "<f8")]))
    packed["value"] = np.random.default_rng(0).random((20, 20))
    assert packed["value"].strides[1] % 8  # neither aligned nor a multiple of the item size
    np.testing.assert_array_equal(felzenszwalb(packed["value"]), felzenszwalb(packed["value"].copy()))


def test_workspace_does_not_leak_between_images_of_different_sizes():
    rng = np.random.default_rng(5)
    images = [
        rng.integers(0, 256, (int(h), int(w), 3)).astype(np.uint8) for h, w in rng.integers(1, 60, (20, 2))
    ]
    first = [felzenszwalb(image, scale=10, sigma=0.5, min_size=4) for image in images]
    again = [felzenszwalb(image, scale=10, sigma=0.5, min_size=4) for image in reversed(images)][::-1]
    for a, b, image in zip(first, again, images, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, skimage_stable(image, scale=10, sigma=0.5, min_size=4))


def test_empty_batch():
    assert felzenszwalb(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5)


# --- torch


def test_opcheck():
    image = torch.rand(2, 3, 12, 10)
    torch.library.opcheck(torch.ops.segclip_fast.felzenszwalb, (image, 10.0, 0.8, 5, 1))


def test_compiles_without_a_graph_break():
    image = torch.rand(2, 3, 32, 32)

    def labels(x):
        return patch_labels(felzenszwalb(x * 0.5, scale=20.0, min_size=8), 16)

    compiled = torch.compile(labels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), labels(image))


# --- refusals


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[0, 1]], TypeError, "image: expected a NumPy array or a tensor, got list"),
        (np.zeros((4, 4), np.int64), TypeError, "image: expected uint8, float32 or float64, got int64"),
        (np.zeros((4, 4), ">f8"), TypeError, "image: expected uint8, float32 or float64, got >f8"),
        (
            torch.zeros(1, 3, 4, 4).half(),
            TypeError,
            "image: expected uint8, float32 or float64, got torch.float16",
        ),
        (np.zeros(4), ValueError, r"image: expected an array \(H, W\) or \(H, W, C\), got shape \(4,\)"),
        (np.zeros((1, 4, 4, 3)), ValueError, r"image: expected an array .* got shape \(1, 4, 4, 3\)"),
        (torch.zeros(3, 4, 4), ValueError, r"image: expected a tensor \(B, C, H, W\), got shape \(3, 4, 4\)"),
        (
            np.zeros((0, 4)),
            ValueError,
            r"image: expected at least one pixel and one channel, got shape \(0, 4\)",
        ),
        (np.zeros((4, 4, 0)), ValueError, "image: expected at least one pixel and one channel"),
        (torch.zeros(1, 0, 4, 4), ValueError, "image: expected at least one pixel and one channel"),
        (np.array([[0.0, np.nan]]), ValueError, "image: expected finite values, got NaN or infinity"),
        (
            torch.full((1, 1, 2, 2), torch.inf),
            ValueError,
            "image: expected finite values, got NaN or infinity",
        ),
        (
            np.broadcast_to(np.uint8(0), (2**16, 2**15)),
            ValueError,
            r"image: expected at most 2\^30 pixels, got shape \(65536, 32768\)",
        ),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        felzenszwalb(image)
    if isinstance(image, np.ndarray):
        with pytest.raises(error, match=message):
            felzenszwalb_ref(image)


@pytest.mark.parametrize("op", [felzenszwalb, felzenszwalb_ref])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scale": -1.0}, "scale: expected a finite number >= 0, got -1.0"),
        ({"scale": float("nan")}, "scale: expected a finite number >= 0, got nan"),
        ({"sigma": -0.1}, "sigma: expected a number from 0 to 10000, got -0.1"),
        ({"sigma": float("inf")}, "sigma: expected a number from 0 to 10000, got inf"),
        ({"min_size": -1}, "min_size: expected an integer from 0 to 2147483647, got -1"),
        ({"min_size": 2**31}, "min_size: expected an integer from 0 to 2147483647, got 2147483648"),
        ({"threads": -2}, r"threads: expected an integer from 0 \(all cores\) to 2147483647, got -2"),
    ],
)
def test_bad_parameters(op, parameters, message):
    with pytest.raises(ValueError, match=message):
        op(np.zeros((4, 4)), **parameters)


def test_cuda_tensor_is_refused():
    with FakeTensorMode():  # the refusal needs no GPU
        image = torch.empty(1, 3, 4, 4, device="cuda")
    with pytest.raises(NotImplementedError, match=r"got one on cuda:0; .* pass image.cpu\(\)"):
        felzenszwalb(image)


def test_missing_extension_speaks_on_first_use():
    code = (
        "import sys; sys.modules['segclip_fast._C'] = None\n"
        "import numpy as np\n"
        "from segclip_fast.ops import felzenszwalb, patch_labels\n"
        "assert patch_labels(np.zeros((4, 4), int), 2).shape == (2, 2)\n"
        "try:\n    felzenszwalb(np.zeros((4, 4)))\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "segclip_fast._C: the compiled extension is missing" in done.stdout
    assert "pip install -e ." in done.stdout


# --- patch labels


def patch_labels_loop(labels, patch, how):
    B, H, W = labels.shape
    out = np.zeros((B, H // patch, W // patch), np.int64)
    for b, y, x in np.ndindex(out.shape):
        cell = labels[b, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].ravel().tolist()
        counts = Counter(cell)
        majority = min(label for label in counts if counts[label] == max(counts.values()))
        out[b, y, x] = majority if how == "majority" else int(np.mean(cell))
    return out


@pytest.mark.parametrize("how", ["majority", "mean"])
@pytest.mark.parametrize("patch", [1, 2, 3, 4])
@pytest.mark.parametrize("top", [2, 4, 300])
def test_patch_labels(how, patch, top):
    labels = np.random.default_rng(patch + top).integers(-1, top, (2, 12, 24)).astype(np.int32)
    expected = patch_labels_loop(labels, patch, how)
    result = patch_labels(torch.from_numpy(labels), patch, how)
    assert result.dtype == torch.int64
    np.testing.assert_array_equal(result.numpy(), expected)
    array = patch_labels(labels[1], patch, how)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, expected[1])


@pytest.mark.parametrize(
    ("labels", "patch", "how", "error", "message"),
    [
        (torch.zeros(1, 4, 4), 2, "mean", TypeError, "labels: expected integers, got torch.float32"),
        (
            torch.zeros(4, dtype=torch.int32),
            2,
            "mean",
            ValueError,
            r"labels: expected \(B, H, W\) or \(H, W\)",
        ),
        (
            np.zeros((4, 6), int),
            4,
            "mean",
            ValueError,
            r"labels: expected sides divisible by patch 4, got \(4, 6\)",
        ),
        (np.zeros((4, 4), int), 0, "mean", ValueError, "labels: expected sides divisible by patch 0"),
        (np.zeros((4, 4), int), 2, "mode", ValueError, "how: expected one of"),
    ],
)
def test_bad_patch_labels(labels, patch, how, error, message):
    with pytest.raises(error, match=message):
        patch_labels(labels, patch, how)
