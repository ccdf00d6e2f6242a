"""patch_labels against plain loops and its twin."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from superpixel_cases import MIDDLE, crops

from segclip_fast.ops import felzenszwalb, patch_labels, patch_labels_ref

hows = pytest.mark.parametrize("how", ["majority", "mean"])
ops = pytest.mark.parametrize("op", [patch_labels, patch_labels_ref])


def patch_labels_loop(labels, patch, how):
    B, H, W = labels.shape
    out = np.zeros((B, H // patch, W // patch), np.int64)
    for b, y, x in np.ndindex(out.shape):
        cell = labels[b, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].ravel().tolist()
        counts = Counter(cell)
        majority = min(label for label in counts if counts[label] == max(counts.values()))
        out[b, y, x] = majority if how == "majority" else int(np.mean(cell))
    return out


@hows
@pytest.mark.parametrize("patch", [1, 2, 3, 4])
@pytest.mark.parametrize("top", [2, 4, 300])
@ops
def test_patch_labels(how, patch, top, op):
    labels = np.random.default_rng(patch + top).integers(-1, top, (2, 12, 24)).astype(np.int32)
    expected = patch_labels_loop(labels, patch, how)
    result = op(torch.from_numpy(labels), patch, how)
    assert result.dtype == torch.int64
    np.testing.assert_array_equal(result.numpy(), expected)
    array = op(labels[1], patch, how)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, expected[1])


@hows
def test_equals_the_twin_on_superpixels_and_noise(how):
    superpixels = np.stack([felzenszwalb(crop, **MIDDLE) for crop in crops(3, 112, seed=0)])
    noise = np.random.default_rng(0).integers(-(2**63), 2**63, (3, 112, 112))
    few = noise % 7 - 3
    edges = np.where(noise % 3 == 0, -(2**63), 2**63 - 1)  # sums wrap around
    for labels in (superpixels, noise, few, edges):
        for patch in (1, 2, 7, 16, 56, 112):
            np.testing.assert_array_equal(
                patch_labels(labels, patch, how), patch_labels_ref(labels, patch, how)
            )


@hows
@pytest.mark.parametrize("count", [0, 1, 15, 33, 100])
def test_batches_of_any_size(how, count):
    labels = torch.randint(-2, 5, (count, 12, 18), dtype=torch.int32)
    assert torch.equal(patch_labels(labels, 6, how), patch_labels_ref(labels, 6, how))


@hows
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "u4", "i4", "i8", ">i4", ">i8"])
def test_dtypes_and_layouts(how, dtype):
    labels = np.random.default_rng(0).integers(0, 100, (3, 24, 36)).astype(dtype)
    expected = patch_labels_loop(labels, 4, how)
    views = {
        "plain": labels,
        "transposed": labels.transpose(0, 2, 1).copy().transpose(0, 2, 1),
        "strided": labels.repeat(2, axis=2)[..., ::2],
        "reversed": labels[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    }
    for name, view in views.items():
        np.testing.assert_array_equal(patch_labels(view, 4, how), expected, err_msg=name)
    np.testing.assert_array_equal(
        patch_labels(np.broadcast_to(labels[:1], (4, 24, 36)), 4, how), expected[[0] * 4]
    )


def test_unaligned_labels():
    packed = np.zeros((3, 8, 8), np.dtype([("skip", "u1"), ("value", "i4")]))
    packed["value"] = np.random.default_rng(0).integers(0, 3, (3, 8, 8))
    np.testing.assert_array_equal(
        patch_labels(packed["value"], 4), patch_labels_loop(packed["value"], 4, "majority")
    )


# --- torch


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(2, 8, 12), (8, 12)])
@pytest.mark.parametrize("mean", [False, True])
def test_opcheck(dtype, shape, mean):
    labels = torch.randint(0, 9, shape, dtype=dtype)
    torch.library.opcheck(torch.ops.segclip_fast.patch_labels, (labels, 4, mean))


@hows
def test_compiles_without_a_graph_break(how):
    labels = torch.randint(0, 9, (2, 8, 12))
    compiled = torch.compile(
        lambda x: patch_labels(x + 1, 4, how) * 2, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for x in (labels, labels[:1], labels[:, :4]):
        assert torch.equal(compiled(x), patch_labels(x + 1, 4, how) * 2)


def test_without_the_extension_the_twin_serves_and_says_so_once():
    code = (
        "import logging, sys; sys.modules['segclip_fast._C'] = None\n"
        "import torch\n"
        "from segclip_fast.ops import patch_labels, patch_labels_ref\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "x = torch.arange(64).reshape(8, 8) % 5\n"
        "for _ in range(2):\n"
        "    assert torch.equal(patch_labels(x, 4), patch_labels_ref(x, 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("patch_labels: served by plain PyTorch") == 1


# --- refusals


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
        (np.zeros((4, 4), bool), 2, "mean", TypeError, "labels: expected integers, got torch.bool"),
        (np.zeros((4, 4)), 2, "mean", TypeError, "labels: expected integers, got torch.float64"),
        (np.zeros((4, 4), int), 0, "mean", ValueError, "labels: expected sides divisible by patch 0"),
        (np.zeros((4, 4), int), 2, "mode", ValueError, "how: expected one of"),
    ],
)
@ops
def test_bad_patch_labels(labels, patch, how, error, message, op):
    with pytest.raises(error, match=message):
        op(labels, patch, how)
