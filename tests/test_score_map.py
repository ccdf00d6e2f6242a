"""Maps of scores: every representation gives what the dense tensor gives, in bounded memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_windows import COLOURS, GREY, ColourModel, LargestFloat, painted, random_map

from segclip_fast.evaluation.pamr import pamr
from segclip_fast.evaluation.refine import PamrScores, label_pixels
from segclip_fast.evaluation.score_map import ScoreMap, Scores, compact, merge_windows, resize_bands
from segclip_fast.evaluation.scoring import Background, fold_background
from segclip_fast.evaluation.segmentation import segment, segment_batch
from segclip_fast.evaluation.segmenter import PatchFeatures
from segclip_fast.evaluation.window_maps import PatchMap, WindowMap
from segclip_fast.evaluation.windows import Sliding, in_batches, plan_windows, score_images


class DenseColourModel(ColourModel):
    """The same colours, patch by patch."""

    def encode_image(self, images):
        found = super().encode_image(images)
        return PatchFeatures(found.image, found.hard.mT @ found.regions)


def patch_map(size=(24, 40), labels=6):
    windows = plan_windows(*size, 16, 12)
    return PatchMap(torch.rand(len(windows), labels, 4, 4), windows, (16, 16), size)


def dense_of(scores: PatchMap) -> torch.Tensor:
    total, cover = torch.zeros(scores.count, *scores.size), torch.zeros(scores.size)
    for grid, window in zip(scores.grids, scores.windows, strict=True):
        large = F.interpolate(grid[None], scores.padded, mode="bilinear", align_corners=False)[0]
        total[(slice(None), *window.slices)] += large[:, : window.height, : window.width]
        cover[window.slices] += 1
    return total / cover


class Generic(Scores):
    """A map that only has planes: what the base class does with them."""

    def __init__(self, scores: ScoreMap) -> None:
        self.scores = scores

    count = property(lambda self: self.scores.count)
    size = property(lambda self: self.scores.size)
    regions = property(lambda self: self.scores.regions)

    def planes(self, start, stop):
        return self.scores.planes(start, stop)


def test_planes_are_parts_of_the_dense_map():
    scores = random_map((24, 30), 20, 9, 6)
    assert torch.equal(scores.planes(2, 5), scores.palette[scores.index].permute(2, 0, 1)[2:5])
    patches = patch_map()
    torch.testing.assert_close(patches.planes(1, 4), dense_of(patches)[1:4])


@pytest.mark.parametrize("target", [(1, 1), (24, 30), (57, 100), (11, 200)], ids=str)
@pytest.mark.parametrize("max_floats", [1, 3000, 2**24])
def test_generic_arg_max_equals_the_palettes(target, max_floats):
    scores = random_map((24, 30), 20, 9, 6)
    labels, values = Generic(scores).arg_max(*target, max_floats)
    expected, best = scores.arg_max(*target)
    torch.testing.assert_close(values, best)
    assert (labels != expected).float().mean() < 2e-3  # near ties: the two add in another order


def test_patch_map_arg_max_and_regions():
    scores = patch_map()
    dense = F.interpolate(dense_of(scores)[None], (50, 70), mode="bilinear", align_corners=False)[0]
    labels, values = scores.arg_max(50, 70, max_floats=5000)
    torch.testing.assert_close(values, dense.max(dim=0).values)
    assert (labels != dense.argmax(dim=0)).sum() <= 2
    winners = dense_of(scores).argmax(dim=0)
    assert len(scores.regions.unique()) == len(winners.unique())


@pytest.mark.parametrize("max_floats", [3000, 2**24])
def test_windows_apart_equal_windows_merged(max_floats):
    windows = plan_windows(24, 40, 16, 12)
    parts = [
        (torch.randint(4, (2, 2)).repeat_interleave(8, 0).repeat_interleave(8, 1), torch.rand(4, 6))
        for _ in windows
    ]
    apart, merged = WindowMap(windows, parts, (24, 40)), merge_windows((24, 40), windows, parts)
    assert (apart.count, apart.size) == (6, (24, 40))
    torch.testing.assert_close(apart.planes(1, 5), merged.dense()[1:5])
    assert torch.equal(apart.regions, merged.regions)
    labels, values = apart.arg_max(50, 70, max_floats)
    expected, best = merged.arg_max(50, 70)
    torch.testing.assert_close(values, best)
    assert (labels != expected).float().mean() < 2e-3
    ids = torch.arange(50 * 70).reshape(50, 70) // 100
    torch.testing.assert_close(apart.superpixel_means(ids), merged.superpixel_means(ids))


@pytest.mark.parametrize("max_floats", [1, 4000, 2**24])
def test_superpixel_means_of_all_maps(max_floats):
    ids = torch.randint(7, (31, 45)).repeat_interleave(2, 1)[:, :45]
    ids[ids == 3] = 4  # a number that does not occur
    palette, patches = random_map((24, 30), 20, 9, 6), patch_map()
    for scores, dense in ((palette, palette.dense()), (Generic(palette), palette.dense()), (patches, None)):
        dense = dense_of(patches) if dense is None else dense
        large = F.interpolate(dense[None], ids.shape, mode="bilinear", align_corners=False)[0]
        found = scores.superpixel_means(ids, max_floats)
        for number in range(int(ids.max()) + 1):
            inside = ids == number
            expected = large[:, inside].mean(dim=1) if inside.any() else torch.zeros(len(dense))
            torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=0)


def test_resize_bands_equal_interpolate():
    planes = torch.rand(5, 13, 17)
    for size in ((13, 17), (40, 9), (1, 1), (26, 100)):
        for max_floats in (1, 2**24):
            found = torch.cat([part for _, part in resize_bands(planes, *size, max_floats)], dim=1)
            expected = F.interpolate(planes[None], size, mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_compact_is_unique_with_inverse():
    numbers = torch.randint(50, (7, 9)) * 3
    values, inverse = torch.unique(numbers, return_inverse=True)
    found, place = compact(numbers, 200)
    assert torch.equal(found, values)
    assert torch.equal(place, inverse)


# --- refinement


def test_pamr_refines_what_is_not_zero():
    torch.manual_seed(0)
    photo = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    scores = random_map((24, 30), 5, 6, 4)
    scores.palette[:, [0, 3]] = 0.0
    refined = PamrScores(scores, photo)
    expected = pamr(photo, scores.dense())
    torch.testing.assert_close(refined.planes(0, 6), expected)
    torch.testing.assert_close(refined.planes(2, 5), expected[2:5])
    assert refined.planes(3, 4).abs().max() == 0
    labels, _ = label_pixels(scores, 48, 60, photo=photo)
    large = F.interpolate(expected[None], (48, 60), mode="bilinear", align_corners=False)[0]
    assert (labels != large.argmax(0)).float().mean() < 2e-3
    ids = np.arange(48 * 60).reshape(48, 60) // 300
    both, _ = label_pixels(scores, 48, 60, photo=photo, superpixels=ids)
    for number in range(ids.max() + 1):
        inside = torch.from_numpy(ids == number)
        assert (both[inside] == large[:, inside].mean(1).argmax()).all()


@pytest.mark.parametrize("model", [ColourModel(), DenseColourModel()], ids=["regions", "patches"])
@pytest.mark.parametrize(
    "options", [{}, {"pamr": True}, {"snap": True}, {"pamr": True, "snap": True}], ids=str
)
def test_every_model_takes_every_refinement(model, options):
    photo = painted(COLOURS["red"], COLOURS["blue"], COLOURS["green"], size=27)
    result = segment(model, photo, ["green", "blue", "red"], **options)
    truth = np.repeat(np.repeat([2, 1, 0], 27)[None], 64, axis=0)
    assert (result.labels == truth).mean() > (0.94 if "snap" in options else 0.88)
    assert result.scores.max() <= 1 + 1e-6


# --- dense models


@pytest.mark.parametrize("protocol", ["official", "paper"])
def test_dense_model(protocol):
    model = DenseColourModel()
    photo = painted(COLOURS["red"], GREY, COLOURS["blue"])
    result = segment(model, photo, ["red", "blue"], background=True, protocol=protocol)
    assert result.labels[32, [16, 48, 80]].tolist() == [1, 0, 2]
    assert result.regions.min() == 0
    named = segment(model, photo, ["red", "blue"], background=["thing"], protocol=protocol)
    assert named.labels[32, [16, 80]].tolist() == [1, 2]
    assert model.windows[0] == (2, 3, 32, 32)


def test_small_dense_windows_are_padded():
    photo = painted(COLOURS["blue"], COLOURS["red"], size=2000, height=1)
    result = segment(DenseColourModel(), photo, ["red", "blue"])
    assert result.labels.shape == (1, 4000)
    assert (result.labels[:, 100] == 1).all()
    assert (result.labels[:, 3900] == 0).all()


def test_fold_background():
    scores = torch.tensor([[[0.1, 0.5, 0.3, 0.6]]])
    assert fold_background(scores, 2).flatten().tolist() == pytest.approx([0.6, 0.1, 0.5])


# --- batches


def test_labels_of_each_photo():
    model = ColourModel()
    photos = [painted(COLOURS[name], COLOURS["white"]) for name in ("red", "green", "red")]
    labels = [["red", "white"], ["blue", "green", "white"], ["red", "white"]]
    together = segment_batch(model, photos, labels)
    assert len(model.windows) == 1  # one batch for all
    assert model.prompts == [f"a photo of a {n}." for n in ("red", "white", "blue", "green", "white")]
    for photo, names, found in zip(photos, labels, together, strict=True):
        alone = segment(ColourModel(), photo, names)
        assert (found.labels == alone.labels).all()
        assert found.names == tuple(names)
    with pytest.raises(ValueError, match="labels: expected a list for each of 3 images, got 2"):
        segment_batch(model, photos, labels[:2])
    with pytest.raises(ValueError, match=r"labels\[1\]: expected a list or tuple of strings, got str"):
        segment_batch(model, photos, [["red"], "blue", ["red"]])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_reaches_the_encoder(precision):
    model, seen = ColourModel(), []
    encode = model.encode_image

    def spy(images):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return encode(images)

    model.encode_image = spy
    photo = painted(COLOURS["red"], COLOURS["blue"])
    result = segment(model, photo, ["red", "blue"], precision=precision)
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert result.labels[32, [16, 48]].tolist() == [0, 1]
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, fp16, got 'int8'"):
        segment(model, photo, ["red"], precision="int8")


def test_a_batch_too_large_for_the_memory_is_halved(caplog):
    sizes, done = [], []

    def call(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("too much")
        done.extend(items)

    in_batches(call, range(10), 8)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert done == list(range(10))
    assert "going on with 2 windows" in caplog.text

    def hopeless(items):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        in_batches(hopeless, [1], 4)


# --- large vocabularies and photos


@pytest.mark.parametrize("model", [ColourModel(), DenseColourModel()], ids=["regions", "patches"])
@pytest.mark.parametrize("protocol", ["official", "paper"])
def test_two_thousand_labels_in_bounded_memory(model, protocol):
    """No temporary comes near the (2000, 256, 320) scores of the photo, 164 million floats."""
    photo = painted(COLOURS["red"], COLOURS["blue"], size=160, height=256)
    features = F.normalize(torch.cat((torch.eye(5), -torch.rand(1995, 5))), dim=-1)
    with LargestFloat() as seen:
        scores = score_images(model, [photo], features, Background(), Sliding(protocol))[0]
        labels, _ = scores.arg_max(256, 320)
    assert seen.largest <= 2**24
    assert labels.shape == (256, 320)
    if protocol == "official":
        assert labels[128, [80, 240]].tolist() == [0, 2]


def test_a_vocabulary_of_two_thousand_names():
    model = ColourModel()
    names = ["red", "blue", *(f"thing {i}" for i in range(1998))]
    result = segment(model, painted(COLOURS["red"], COLOURS["blue"]), names)
    assert {names[i] for i in np.unique(result.labels)} <= set(names)
    assert result.labels[32, 16] == 0
    assert len(model.prompts) == 2000


@pytest.mark.parametrize("options", [{}, {"snap": True}, {"pamr": True}], ids=str)
@pytest.mark.parametrize("model", [ColourModel(), DenseColourModel()], ids=["regions", "patches"])
def test_a_very_long_photo(model, options):
    """20,000 x 200: the long side decides the size, the short one falls below a patch."""
    photo = painted(COLOURS["red"], COLOURS["green"], size=10_000, height=200)
    with LargestFloat() as seen:
        result = segment(model, photo, ["red", "green", "blue"], background=True, **options)
    assert result.labels.shape == (200, 20_000)
    assert (result.labels[:, 5000] == 1).all()
    assert (result.labels[:, 15000] == 2).all()
    assert seen.largest <= 6 * 2**24  # a few times the photo's own size
    assert math.prod(result.labels.shape) == 4_000_000
