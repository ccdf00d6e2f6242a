"""Superpixels and patch labels on a GPU: equal to the CPU's, on the caller's stream, without a wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from superpixel_cases import MIDDLE, PAPER, SETTINGS, adversarial, crops, drawn

from segclip_fast.ops import felzenszwalb, felzenszwalb_cuda, patch_labels, patch_labels_ref
from segclip_fast.ops.felzenszwalb import PRECISIONS

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def as_batch(image):
    pixels = image[:, :, None] if image.ndim == 2 else image
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


def check(batch, setting, case=""):
    for precision in PRECISIONS:
        expected = felzenszwalb(batch, **setting, precision=precision)
        found = felzenszwalb(batch.to(CUDA), **setting, precision=precision)
        assert found.device.type == "cuda"
        assert found.dtype == torch.int32
        assert torch.equal(found.cpu(), expected), f"{case} {precision} {setting}"


def pictures(count, side, seed):
    """(count, 3, side, side) uint8; needs no files."""
    return torch.from_numpy(drawn(count, side, seed)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("setting", SETTINGS)
def test_crops_of_photographs(setting):
    colour = [crop if crop.ndim == 3 else np.stack([crop] * 3, axis=-1) for crop in crops(300, 224, 0)]
    check(torch.cat([as_batch(crop) for crop in colour]), SETTINGS[setting])


@pytest.mark.parametrize("setting", SETTINGS)
def test_drawn_pictures(setting):
    check(pictures(64, 224, 0), SETTINGS[setting])


def test_adversarial_images():
    for seed in range(2000):
        image, setting = adversarial(seed)
        if image.ndim == 2 or image.shape[2] <= felzenszwalb_cuda.MAX_CHANNELS:
            check(as_batch(image), setting, f"seed {seed}")


@pytest.mark.parametrize("side", [256, 257, 300])
def test_sizes_around_what_shared_memory_holds(side):
    check(pictures(4, side, 1), MIDDLE)


def test_large_image():
    image = torch.rand(1, 3, 1024, 1500, generator=torch.Generator().manual_seed(0))
    check(image, PAPER)
    check((image * 3).to(torch.uint8), MIDDLE)  # ties all over


def test_layouts_and_dtypes():
    image = torch.randint(
        0, 256, (5, 3, 61, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    for pixels in (image, image.float() / 255, image.double() / 255):
        views = [
            pixels,
            pixels.contiguous(memory_format=torch.channels_last),
            pixels[:, :, ::2, 1:],
            pixels.transpose(2, 3),
            pixels[:1].expand(3, -1, -1, -1),
            pixels[:0],
        ]
        for view in views:
            assert torch.equal(felzenszwalb(view.to(CUDA), **MIDDLE).cpu(), felzenszwalb(view, **MIDDLE))
        strided = pixels.to(CUDA)[:, :, ::2, 1:]
        assert not strided.is_contiguous()
        assert torch.equal(
            felzenszwalb(strided, **MIDDLE).cpu(), felzenszwalb(pixels[:, :, ::2, 1:], **MIDDLE)
        )


def test_batch_in_parts(monkeypatch):
    images = pictures(7, 96, 2)
    expected = felzenszwalb(images, **PAPER)
    monkeypatch.setattr(felzenszwalb_cuda, "WORKSPACE_BYTES", 3 << 20)
    assert torch.equal(felzenszwalb(images.to(CUDA), **PAPER).cpu(), expected)


def test_same_labels_every_run():
    images = pictures(64, 224, 3).to(CUDA)
    first = felzenszwalb(images, **PAPER)
    assert all(torch.equal(felzenszwalb(images, **PAPER), first) for _ in range(10))


def test_wide_blur():
    check(pictures(1, 96, 4), {"scale": 50.0, "sigma": 40.0, "min_size": 5})


def test_images_that_are_not_finite_get_minus_one():
    images = torch.rand(3, 2, 20, 30, device=CUDA)
    images[1, 1, 3, 4] = torch.nan
    labels = felzenszwalb(images, **MIDDLE)
    assert (labels[1] == -1).all()
    assert torch.equal(labels[::2].cpu(), felzenszwalb(images[::2].cpu(), **MIDDLE))


def test_does_not_wait_and_runs_on_the_callers_stream():
    images = torch.rand(8, 3, 96, 96, device=CUDA)
    expected = felzenszwalb(images.cpu(), **PAPER)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # set up what is set up once, and memory of this stream
        patch_labels(felzenszwalb(images, **PAPER), 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)  # about 0.5 s
            labels = felzenszwalb(images, **PAPER)
            patches = patch_labels(labels, 16)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(labels.cpu(), expected)
    assert torch.equal(patches.cpu(), patch_labels(expected, 16))


def test_inside_a_cuda_graph():
    images = torch.rand(4, 3, 64, 64, device=CUDA)
    felzenszwalb(images, **MIDDLE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = felzenszwalb(images, **MIDDLE)
    images.copy_(torch.rand_like(images))
    graph.replay()
    assert torch.equal(labels.cpu(), felzenszwalb(images.cpu(), **MIDDLE))


def test_limits():
    with pytest.raises(ValueError, match=r"image: expected at most 2\^24 pixels and 128 channels on CUDA"):
        felzenszwalb(torch.zeros(1, 129, 4, 4, device=CUDA))
    with pytest.raises(ValueError, match=r"image: expected at most 2\^24 pixels"):
        felzenszwalb(torch.zeros(1, 1, 1, 1, device=CUDA).expand(1, 1, 4097, 4096))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("how", ["majority", "mean"])
def test_patch_labels(how, dtype):
    generator = torch.Generator().manual_seed(0)
    for top in (1, 3, 250):
        for patch in (1, 5, 16, 32):
            labels = torch.randint(0, top, (3, 4 * patch, 7 * patch), generator=generator).to(dtype)
            expected = patch_labels_ref(labels, patch, how)
            assert torch.equal(patch_labels(labels.to(CUDA), patch, how).cpu(), expected)
            turned = labels.transpose(1, 2)
            assert torch.equal(
                patch_labels(turned.to(CUDA), patch, how).cpu(), patch_labels_ref(turned, patch, how)
            )


def test_opcheck():
    torch.library.opcheck(
        torch.ops.segclip_fast.felzenszwalb, (torch.rand(2, 3, 12, 10, device=CUDA), 10.0, 0.8, 5, 1, False)
    )
    labels = torch.randint(0, 5, (2, 8, 12), device=CUDA)
    torch.library.opcheck(torch.ops.segclip_fast.patch_labels, (labels, 4, False))
