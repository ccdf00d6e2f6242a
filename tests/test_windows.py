"""Sliding windows: geometry, scores of one window, averaging, and the final resize in bounded memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segclip_fast.data.transforms import CLIP_MEAN, CLIP_STD, normalise
from segclip_fast.evaluation.score_map import ScoreMap, bilinear_taps, merge_windows
from segclip_fast.evaluation.scoring import (
    add_background,
    effective_threshold,
    label_affinity,
    paper_affinity,
    upsample_regions,
)
from segclip_fast.evaluation.windows import (
    Sliding,
    Window,
    evaluation_mode,
    pad_to_patch,
    plan_windows,
    resize_short_side,
    score_images,
    short_side_size,
    window_starts,
)
from segclip_fast.model.segclip import ImageFeatures

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
GREY = (128, 128, 128)
WORDS = [*COLOURS, "thing"]


class ColourModel(nn.Module):
    """Regions are the patches of one colour, texts are colour words; grey looks like every colour alike."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patch_size = 32, 8
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))
        self.words = nn.Parameter(torch.eye(len(WORDS)))
        self.windows: list[tuple[int, ...]] = []  # shape of every encoded batch
        self.prompts: list[str] = []  # every text tokenized

    def tokenize(self, texts):
        self.prompts += texts
        known = [next((i for i, w in enumerate(WORDS) if w in text), len(WORDS) - 1) for text in texts]
        return torch.tensor(known)[:, None]

    def encode_text(self, tokens):
        return 3.0 * self.words[tokens[:, 0]]

    def encode_image(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.shape[2] % 8 == 0
        assert images.shape[3] % 8 == 0
        self.windows.append(tuple(images.shape))
        rgb = images * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
        patches = nn.functional.avg_pool2d(rgb, 8).flatten(2)  # (B, 3, N)
        known = torch.tensor([*COLOURS.values(), GREY]) / 255.0  # (L, 3)
        logits = -30 * torch.cdist(known[None].expand(len(images), -1, -1), patches.mT)  # (B, L, N)
        hard = nn.functional.one_hot(logits.argmax(1), len(known)).mT.float()
        count = hard.sum(-1, keepdim=True)  # (B, L, 1)
        seen = (count > 0) & (torch.arange(len(known)) < len(COLOURS))[:, None]
        regions = torch.where(seen, 7.0 * torch.eye(len(known), len(WORDS)), 1.0)  # grey or empty: like all
        image = (count * regions).sum(1)
        return ImageFeatures(image, regions, logits, logits.softmax(1), hard)


def painted(*columns: tuple[int, int, int], size: int = 32, height: int = 64) -> np.ndarray:
    """A photo of vertical stripes, each `size` wide."""
    row = np.repeat(np.array(columns, dtype=np.uint8), size, axis=0)
    return np.repeat(row[None], height, axis=0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 451), (224, 337)),
        ((400, 600), (224, 336)),
        ((512, 512), (224, 224)),
        ((1, 1), (224, 224)),
        ((100, 2000), (102, 2048)),  # the long side decides
        ((1, 4000), (1, 2048)),
        ((1, 10000), (1, 2048)),  # the official rule would round to no rows
    ],
    ids=str,
)
def test_short_side_size(size, expected):
    assert short_side_size(*size, short=224) == expected
    assert short_side_size(*size[::-1], short=224) == expected[::-1]


def test_resize_short_side_leaves_the_right_size_alone():
    image = np.zeros((224, 300, 3), np.uint8)
    assert resize_short_side(image, 224) is image
    assert resize_short_side(image, 112).shape == (112, 150, 3)


@pytest.mark.parametrize(
    ("side", "crop", "stride", "expected"),
    [
        (224, 224, 224, [0]),
        (225, 224, 224, [0, 1]),
        (337, 224, 224, [0, 113]),
        (448, 224, 224, [0, 224]),
        (448, 224, 112, [0, 112, 224]),
        (449, 224, 112, [0, 112, 224, 225]),
        (100, 224, 224, [0]),
        (1, 224, 112, [0]),
    ],
    ids=str,
)
def test_window_starts(side, crop, stride, expected):
    assert window_starts(side, crop, stride) == expected


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_windows_cover_the_photo(stride):
    for height, width in [(1, 30), (8, 8), (9, 23), (17, 16), (5, 40)]:
        covered = np.zeros((height, width), int)
        for window in plan_windows(height, width, 8, stride):
            assert (window.height, window.width) == (min(8, height), min(8, width))
            assert window.top + window.height <= height
            assert window.left + window.width <= width
            covered[window.slices] += 1
        assert covered.min() > 0


def test_normalise():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    mean, std = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)
    expected = ((image - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    assert np.abs(normalise(image).numpy() - expected).max() < 1e-6
    assert normalise(image[:, ::-1]).shape == (3, 5, 7)  # views with negative strides too


@pytest.mark.parametrize(
    ("size", "expected"), [((8, 8), (8, 8)), ((1, 32), (8, 32)), ((9, 3), (16, 8))], ids=str
)
def test_pad_to_patch(size, expected):
    images = torch.rand(2, 3, *size)
    padded = pad_to_patch(images, 8)
    assert padded.shape[2:] == expected
    assert (padded[:, :, : size[0], : size[1]] == images).all()
    assert (padded[:, :, -1, -1] == images[:, :, -1, -1]).all()


# --- one window


def test_upsample_regions_is_bilinear_then_arg_max():
    soft = torch.zeros(1, 2, 2)  # two patches, one region each
    soft[0, 0] = torch.tensor([1.0, 0.2])
    soft[0, 1] = torch.tensor([0.0, 0.8])
    found = upsample_regions(soft, (1, 2), (8, 16))
    assert found.shape == (1, 8, 16)
    # shares cross at 5/8 of the way between the patch centres x = 4 and x = 12: at x = 9
    assert found[0, 3].tolist() == [0] * 9 + [1] * 7


def slow_affinity(image, regions, labels, scale, top):
    """Protocol step 4 word by word for one window, in float64."""
    similarity = np.array([[scale * (r @ t) / np.linalg.norm(r) for t in labels] for r in regions])
    likely = np.array([image @ t for t in labels])
    kept = np.argsort(-likely)[:top]
    whole = np.exp(similarity) / np.exp(similarity).sum(1, keepdims=True)
    part = np.zeros_like(whole)
    part[:, kept] = np.exp(similarity[:, kept]) / np.exp(similarity[:, kept]).sum(1, keepdims=True)
    return whole * part


@pytest.mark.parametrize("C", [1, 3, 5, 6, 20])
def test_label_affinity(C):
    torch.manual_seed(C)
    image, regions = torch.randn(4, 16).double(), torch.randn(4, 8, 16).double()
    labels, scale = F.normalize(torch.randn(C, 16), dim=-1).double(), torch.tensor(20.0)
    found = label_affinity(image, regions, labels, scale)
    assert found.shape == (4, 8, C)
    for b in range(4):
        expected = slow_affinity(image[b].numpy(), regions[b].numpy(), labels.numpy(), 20.0, 5)
        assert np.abs(found[b].numpy() - expected).max() < 1e-12
    assert ((found > 0).any(1).sum(1) == min(C, 5)).all()
    paper = paper_affinity(regions, labels, scale)
    assert torch.allclose(paper.sum(-1), torch.ones(4, 8).double())


def test_background():
    affinity = torch.tensor([[[0.9, 0.1], [0.5, 0.2]], [[0.3, 0.1], [0.2, 0.2]]])  # (2 windows, 2 regions, 2)
    limit = effective_threshold(affinity, 0.8)
    assert limit.tolist() == pytest.approx([0.8, 0.3])
    full = add_background(affinity, limit)
    assert full[..., 0].tolist() == [[0.0, 1.0], [0.0, 1.0]]  # the best region of a window always stays
    assert (full[..., 1:] == affinity).all()
    assert add_background(affinity, 0.8)[..., 0].tolist() == [[0.0, 1.0], [1.0, 1.0]]


# --- one photo


def brute_merge(size, windows, parts):
    total, count = torch.zeros(parts[0][1].shape[1], *size), torch.zeros(size)
    for window, (region, score) in zip(windows, parts, strict=True):
        total[(slice(None), *window.slices)] += score[region].permute(2, 0, 1)
        count[window.slices] += 1
    return total / count


@pytest.mark.parametrize("stride", [2, 5, 8])
def test_merge_is_the_mean_over_windows(stride):
    torch.manual_seed(stride)
    windows = plan_windows(13, 21, 8, stride)
    parts = [(torch.randint(4, (8, 8)), torch.rand(4, 6)) for _ in windows]
    merged = merge_windows((13, 21), windows, parts)
    torch.testing.assert_close(merged.dense(), brute_merge((13, 21), windows, parts))
    assert len(merged.palette) == merged.index.max() + 1
    assert (merged.regions[:8, :8] == merged.regions[:8, :8].min() + parts[0][0]).all()


def random_map(size, rows, labels, block):
    coarse = torch.randint(rows, (math.ceil(size[0] / block), math.ceil(size[1] / block)))
    index = coarse.repeat_interleave(block, 0).repeat_interleave(block, 1)[: size[0], : size[1]]
    return ScoreMap(torch.rand(rows, labels), index, torch.zeros(size, dtype=torch.int64))


@pytest.mark.parametrize("block", [1, 6], ids=["noise", "regions"])
@pytest.mark.parametrize("target", [(1, 1), (24, 30), (57, 100), (11, 200), (23, 29)], ids=str)
@pytest.mark.parametrize("max_floats", [1, 1000, 2**24])
def test_arg_max_is_that_of_the_dense_resize(block, target, max_floats):
    torch.manual_seed(0)
    scores = random_map((24, 30), 20, 9, block)
    scores.palette[:, [1, 4, 8]] = 0.0  # labels that no window kept
    scores.palette[3] = 0.0
    dense = F.interpolate(scores.dense()[None], target, mode="bilinear", align_corners=False)[0]
    best, expected = dense.max(dim=0)
    labels, values = scores.arg_max(*target, max_floats)
    torch.testing.assert_close(values, best)
    assert (labels != expected).sum() == 0
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("source", "target"), [(1, 5), (5, 1), (7, 7), (224, 1000), (337, 451), (2048, 4000)]
)
def test_bilinear_taps(source, target):
    low, high, weight = bilinear_taps(source, target)
    values = torch.rand(source)
    expected = F.interpolate(values[None, None, None], (1, target), mode="bilinear")[0, 0, 0]
    torch.testing.assert_close(
        values[low] * (1 - weight) + values[high] * weight, expected, atol=2e-4, rtol=0
    )


class LargestFloat(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_the_final_resize_is_bounded():
    scores = random_map((64, 80), 30, 200, 7)
    with LargestFloat() as seen:
        scores.arg_max(500, 600, max_floats=2**18)
    assert seen.largest <= max(
        500 * 600, 2**18
    )  # the result's own size or the budget; dense would be 60 million
    with LargestFloat() as seen:
        F.interpolate(scores.dense()[None], (500, 600), mode="bilinear")
    assert seen.largest == 200 * 500 * 600  # the probe does see what it should


# --- many photos


def test_all_windows_share_batches_and_are_encoded_once():
    model = ColourModel()
    photos = [painted(COLOURS["red"], size=n, height=32) for n in (32, 48, 70, 32)]
    score_images(model, photos, torch.eye(5)[:3])
    assert model.windows == [(7, 3, 32, 32)]
    model.windows.clear()
    score_images(model, photos, torch.eye(5)[:3], sliding=Sliding(batch_size=3))
    assert [shape[0] for shape in model.windows] == [3, 3, 1]
    model.windows.clear()
    score_images(
        model, [photos[0], photos[0][:2]], torch.eye(5)[:3]
    )  # 2 x 32 is not within the crop's aspect
    assert model.windows == [(1 + 16, 3, 32, 32)]


def test_small_windows_are_padded_to_patches():
    model = ColourModel()
    maps = score_images(model, [painted(COLOURS["blue"], size=4000, height=1)], torch.eye(5)[:3])
    assert {shape[2:] for shape in model.windows} == {(8, 32)}
    assert maps[0].index.shape == (1, 2048)
    assert (maps[0].palette.argmax(1) == 2).all()


def test_where_every_score_is_zero_the_first_label_wins():
    scores = ScoreMap(
        torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]), torch.eye(4).long(), torch.eye(4).long()
    )
    assert (scores.arg_max(4, 4)[0] == 2 - 2 * torch.eye(4)).all()


def test_the_scale_has_a_ceiling():
    model = ColourModel()
    close = F.normalize(torch.tensor([[1.0, 0, 0, 0, 0], [1.0, 0.2, 0, 0, 0]]), dim=-1)
    palettes = []
    for scale in (100.0, 1e4, 50.0):
        with torch.no_grad():
            model.logit_scale.fill_(math.log(scale))
        palettes.append(score_images(model, [painted(COLOURS["red"])], close)[0].palette)
    torch.testing.assert_close(palettes[0], palettes[1])
    assert not torch.allclose(palettes[0], palettes[2])


def test_evaluation_mode_is_left_even_by_an_error():
    model = ColourModel().train()
    with pytest.raises(IndexError), evaluation_mode(model):
        [][int(model.training)]
    assert model.training
    assert torch.is_grad_enabled()


def test_window_slices():
    assert Window(2, 3, 4, 5).slices == (slice(2, 6), slice(3, 8))
