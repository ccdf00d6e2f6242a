"""felzenszwalb as an op: layouts, threads, torch, refusals. test_felzenszwalb_exact.py tests its labels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from superpixel_cases import PAPER, crops, skimage_stable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from segclip_fast.ops import felzenszwalb, felzenszwalb_cuda, felzenszwalb_ref, patch_labels

precisions = pytest.mark.parametrize("precision", ["float64", "float32"])


# --- batches, layouts, threads


@precisions
def test_result_types(precision):
    crop = next(crops(1, 40, seed=3))
    labels = felzenszwalb(crop, precision=precision)
    assert labels.dtype == np.int64
    assert labels.shape == (40, 40)
    batch = felzenszwalb(torch.from_numpy(crop).permute(2, 0, 1)[None], precision=precision)
    assert batch.dtype == torch.int32
    assert batch.shape == (1, 40, 40)
    np.testing.assert_array_equal(batch[0].numpy(), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 9])
@precisions
def test_batch_equals_single_images_for_every_layout_and_thread_count(dtype, channels, precision):
    generator = torch.Generator().manual_seed(0)
    planar = torch.randint(0, 256, (5, channels, 31, 23), generator=generator, dtype=torch.uint8)
    planar = planar if dtype == torch.uint8 else planar.to(dtype) / 255
    setting = {"scale": 50.0, "sigma": 0.7, "min_size": 9, "precision": precision}
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


def test_array_views():
    crop = next(crops(1, 64, seed=4))
    for view in (crop[::-1], crop[:, ::2], crop.transpose(1, 0, 2), crop[..., ::-1], crop[..., 1]):
        np.testing.assert_array_equal(felzenszwalb(view, **PAPER), felzenszwalb(view.copy(), **PAPER))
    packed = np.zeros((20, 20), np.dtype([("skip", "u1"), ("value", "<f8")]))
    packed["value"] = np.random.default_rng(0).random((20, 20))
    assert packed["value"].strides[1] % 8  # neither aligned nor a multiple of the item size
    np.testing.assert_array_equal(felzenszwalb(packed["value"]), felzenszwalb(packed["value"].copy()))


@precisions
def test_workspace_does_not_leak_between_images_of_different_sizes(precision):
    rng = np.random.default_rng(5)
    images = [
        rng.integers(0, 256, (int(h), int(w), 3)).astype(np.uint8) for h, w in rng.integers(1, 60, (20, 2))
    ]
    setting = {"scale": 10.0, "sigma": 0.5, "min_size": 4}
    first = [felzenszwalb(image, precision=precision, **setting) for image in images]
    again = [felzenszwalb(image, precision=precision, **setting) for image in reversed(images)][::-1]
    for a, b, image in zip(first, again, images, strict=True):
        np.testing.assert_array_equal(a, b)
        if precision == "float64":
            np.testing.assert_array_equal(a, skimage_stable(image, **setting))
        else:
            np.testing.assert_array_equal(a, felzenszwalb_ref(image, precision=precision, **setting))


@precisions
def test_workers_keep_their_workspaces_for_batches_of_other_sizes_and_counts(precision):
    rng = np.random.default_rng(6)
    for count, threads, side in [(5, 4, 20), (2, 1, 33), (9, 7, 8), (3, 2, 41)]:
        images = rng.integers(0, 256, (count, 3, side, side + 1)).astype(np.uint8)
        labels = felzenszwalb(torch.from_numpy(images), threads=threads, precision=precision)
        for image, found in zip(images, labels, strict=True):
            expected = felzenszwalb_ref(image.transpose(1, 2, 0), precision=precision)
            np.testing.assert_array_equal(found.numpy(), expected)


class ThreadsAskedFor(Dataset):
    """Item i: how many threads the op asks the extension for, given threads=i, in this process."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        asked = []

        def segment(batch, scale, sigma, min_size, threads, **_):
            asked.append(threads)
            return np.zeros((batch.shape[0], *batch.shape[2:]), np.int32)

        module = sys.modules["segclip_fast.ops.felzenszwalb"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "extension", lambda: SimpleNamespace(felzenszwalb=segment))
            felzenszwalb(torch.zeros(1, 1, 2, 2), threads=i)
        return asked[0]


def test_one_thread_in_the_workers_of_a_data_loader():
    dataset = ThreadsAskedFor()
    assert [dataset[i] for i in range(3)] == [0, 1, 2]  # 0: every core
    assert [int(x) for x in DataLoader(dataset, num_workers=2)] == [1, 1, 2]


def test_empty_batch():
    assert felzenszwalb(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5)


# --- torch


@pytest.mark.parametrize("single", [False, True])
def test_opcheck(single):
    image = torch.rand(2, 3, 12, 10)
    torch.library.opcheck(torch.ops.segclip_fast.felzenszwalb, (image, 10.0, 0.8, 5, 1, single))


def test_compiles_without_a_graph_break():
    image = torch.rand(2, 3, 32, 32)

    def labels(x):
        return patch_labels(felzenszwalb(x * 0.5, scale=20.0, min_size=8, precision="float32"), 16)

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
        (
            np.broadcast_to(np.float32(0), (2**31 + 1, 1)),
            ValueError,
            r"image: expected at most 2\^30 pixels, got shape \(2147483649, 1\)",
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
        ({"precision": "float16"}, r"precision: expected one of \('float64', 'float32'\), got 'float16'"),
        ({"threads": -2}, r"threads: expected an integer from 0 \(all cores\) to 2147483647, got -2"),
    ],
)
def test_bad_parameters(op, parameters, message):
    with pytest.raises(ValueError, match=message):
        op(np.zeros((4, 4)), **parameters)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@precisions
def test_one_bad_pixel_of_a_batch_is_refused(value, dtype, precision):
    images = torch.zeros(6, 2, 9, 40, dtype=dtype)
    images[4, 1, 8, 39] = value
    for threads in (1, 3):
        for sigma in (0.0, 0.8):
            with pytest.raises(ValueError, match="image: expected finite values, got NaN or infinity"):
                felzenszwalb(images, sigma=sigma, threads=threads, precision=precision)
    felzenszwalb(images[:4], precision=precision)


@pytest.mark.parametrize("op", [felzenszwalb, felzenszwalb_ref])
def test_values_beyond_float32_are_refused_there(op):
    image = np.array([[0.0, 1e100]])
    assert op(image).shape == (1, 2)
    with pytest.raises(ValueError, match="image: expected finite values, got NaN or infinity"):
        op(image, precision="float32")


def test_other_devices_are_refused():
    with FakeTensorMode():  # the refusal needs no such device
        image = torch.empty(1, 3, 4, 4, device="xpu")
    with pytest.raises(NotImplementedError, match=r"CPU or CUDA, got one on xpu:0; pass image.cpu\(\)"):
        felzenszwalb(image)


def test_cuda_tensor_without_the_cuda_part_is_refused():
    built = SimpleNamespace(cuda_build=lambda: {"compiled": False})
    with pytest.raises(NotImplementedError, match=r"built without CUDA; build it where nvcc is"):
        felzenszwalb_cuda.segment(built, torch.zeros(1, 3, 4, 4), 1.0, (), 20, False)


@pytest.mark.parametrize("shape", [(1, 129, 4, 4), (1, 1, 4097, 4096)])
def test_sizes_that_cuda_refuses(shape):
    built = SimpleNamespace(cuda_build=lambda: {"compiled": True})
    with pytest.raises(ValueError, match=r"at most 2\^24 pixels and 128 channels on CUDA, got shape"):
        felzenszwalb_cuda.segment(built, torch.zeros(()).expand(shape), 1.0, (), 20, False)


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
