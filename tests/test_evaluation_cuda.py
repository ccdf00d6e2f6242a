"""The evaluation on a GPU gives what it gives on the CPU: bits of the resize, label maps, counts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import small_model
from test_score_map import patch_map, random_map

from segclip_fast.data.images import resize_bilinear_tensor, resize_bilinear_uint8
from segclip_fast.data.sample import RawSample
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.evaluation.metric import ConfusionMatrix
from segclip_fast.evaluation.refine import label_pixels
from segclip_fast.evaluation.score_map import ScoreMap
from segclip_fast.evaluation.segmentation import segment_batch
from segclip_fast.evaluation.window_maps import PatchMap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LABELS = ["cat", "dog", "sofa", "grass"]


def photos(count=6):
    """Smooth pictures of several sizes, so that regions are larger than a patch."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        found.append(resize_bilinear_uint8(coarse, (40 + 9 * number, 90 - 7 * number)))
    return found


def models():
    torch.manual_seed(1)
    model = small_model().eval()
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("target", [(224, 299), (1, 1), (700, 640)], ids=str)
def test_resize_has_the_same_bits(target):
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    found = resize_bilinear_tensor(torch.from_numpy(image).cuda(), target)
    np.testing.assert_array_equal(found.cpu().numpy(), resize_bilinear_uint8(image, target))


@pytest.mark.parametrize("options", [{}, {"background": True}, {"snap": True}, {"pamr": True}], ids=str)
def test_label_maps(options):
    here, there = models()
    expected = segment_batch(here, photos(), LABELS, **options)
    found = segment_batch(there, photos(), LABELS, **options)
    for one, other in zip(found, expected, strict=True):
        assert (one.labels == other.labels).mean() > 0.995
        assert np.median(np.abs(one.scores - other.scores)) < 1e-3
        assert (one.regions == other.regions).mean() > 0.995


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_batches_change_nothing(batch_size):
    _, model = models()
    alone = [segment_batch(model, [photo], LABELS, batch_size=1)[0] for photo in photos()]
    together = segment_batch(model, photos(), LABELS, batch_size=batch_size)
    same = [(one.labels == other.labels).mean() for one, other in zip(alone, together, strict=True)]
    assert np.mean(same) > 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision):
    _, model = models()
    expected = segment_batch(model, photos(), LABELS)
    found = segment_batch(model, photos(), LABELS, precision=precision)
    same = [(one.labels == other.labels).mean() for one, other in zip(found, expected, strict=True)]
    assert np.mean(same) > 0.95


def test_maps_on_the_device():
    torch.manual_seed(0)
    here = random_map((24, 30), 20, 9, 6)
    there = ScoreMap(here.palette.cuda(), here.index.cuda(), here.owner.cuda())
    patches = patch_map()
    above = PatchMap(patches.grids.cuda(), patches.windows, patches.padded, patches.photo)
    ids = np.arange(57 * 100).reshape(57, 100) // 200
    for cpu, gpu in ((here, there), (patches, above)):
        for more in ({}, {"superpixels": ids}):
            expected, values = label_pixels(cpu, 57, 100, **more)
            found, best = label_pixels(gpu, 57, 100, **more)
            assert found.is_cuda
            torch.testing.assert_close(best.cpu(), values, atol=1e-5, rtol=0)
            assert (found.cpu() != expected).float().mean() < 2e-3


def test_counts_are_exact():
    rng = np.random.default_rng(0)
    pred, truth = rng.integers(0, 21, (300, 400)), rng.integers(0, 21, (300, 400))
    truth[:40] = 255
    here, there = ConfusionMatrix(21), ConfusionMatrix(21, device="cuda")
    here.update(pred, truth)
    there.update(torch.from_numpy(pred).cuda(), truth)
    assert there.total.is_cuda
    assert (there.counts == here.counts).all()
    with pytest.raises(ValueError, match="truth: expected labels 0 to 20, got 30"):
        there.update(pred, np.full_like(truth, 30))


class Planted:
    class_names = ("background", *LABELS)

    def __init__(self):
        masks = [np.random.default_rng(i).integers(0, 5, p.shape[:2]) for i, p in enumerate(photos())]
        self.samples = [RawSample(p, "", m) for p, m in zip(photos(), masks, strict=True)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_evaluation(workers):
    here, there = models()
    expected = evaluate_source(here, Planted())
    found = evaluate_source(there, Planted(), workers=workers)
    assert found.miou == pytest.approx(expected.miou, abs=2e-3)
    assert found.pixel_accuracy == pytest.approx(expected.pixel_accuracy, abs=2e-3)
