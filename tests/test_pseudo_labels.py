"""Pseudo-labels: what segments a picture, in which order with the crop, and the settings' refusals."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from golden import golden, requires_golden
from small import small_config

from segclip_fast.config import DataConfig, SuperpixelConfig, from_dict, to_dict
from segclip_fast.data.pipeline import PairDataset
from segclip_fast.data.pseudo_labels import (
    Felzenszwalb,
    PatchLabels,
    Slic,
    StoredMasks,
    labels_on_device,
    make_segmenter,
)
from segclip_fast.data.sample import RawSample
from segclip_fast.data.scenes import make_scene
from segclip_fast.data.transforms import crop_box, cut_segments, resized_crop
from segclip_fast.ops import felzenszwalb, patch_labels

SMALL = SuperpixelConfig(scale=20, sigma=0.9, min_size=8)


def scene(seed: int, size: int = 64) -> RawSample:
    return dataclasses.replace(make_scene(seed, size), mask=None)


def cropped(raw: RawSample, box, size=32) -> np.ndarray:
    return resized_crop(raw.image, box, size)


# --- the segmenters


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_felzenszwalb_of_crops_one_by_one_and_as_a_batch(precision):
    labels = PatchLabels(dataclasses.replace(SMALL, precision=precision), 8)
    assert labels.segmenter == Felzenszwalb(20, 0.9, 8, precision)
    scenes = [scene(seed) for seed in range(6)]
    crops = [cropped(raw, (5, 3, 50, 40)) for raw in scenes]
    single = [labels.of_crop(raw, (5, 3, 50, 40), crop) for raw, crop in zip(scenes, crops, strict=True)]
    options = {"scale": 20, "sigma": 0.9, "min_size": 8, "precision": precision}
    expected = [patch_labels(felzenszwalb(crop, **options), 8, "majority") for crop in crops]
    assert all(np.array_equal(a, b) for a, b in zip(single, expected, strict=True))
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    together = labels.of_batch(batch)
    assert together.dtype == torch.int64
    assert torch.equal(together, torch.stack(single))
    assert len(torch.unique(together)) > 4


def test_slic_is_scikit_images():
    raw = scene(1)
    config = SuperpixelConfig(kind="slic", segments=100, compactness=20.0)
    found = make_segmenter(config)(raw)
    segmentation = pytest.importorskip("skimage.segmentation")
    expected = segmentation.slic(raw.image, n_segments=100, compactness=20.0, start_label=0)
    assert np.array_equal(found, expected)
    assert 60 < len(np.unique(found)) < 140
    crop = cropped(raw, (0, 0, 40, 40))
    patches = PatchLabels(config, 8).of_crop(raw, (0, 0, 40, 40), crop)
    assert np.array_equal(patches, patch_labels(Slic(100, 20.0)(RawSample(crop, "")), 8))
    flat = RawSample(np.zeros((32, 32, 3), np.uint8), "")
    assert PatchLabels(config, 8).of_crop(flat, (0, 0, 32, 32), flat.image).shape == (4, 4)


def located(height: int, width: int) -> RawSample:
    """A picture whose red and green are its column and row, with segments of 20 x 20 pixels."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    return RawSample(image, "a photo", segments=rows // 20 * 100 + columns // 20)


def test_stored_masks_follow_the_picture_into_the_crop():
    """Where the picture's colours say that a pixel came from, the mask has that place's segment."""
    raw, rng = located(200, 160), random.Random(0)
    for _ in range(50):
        box = crop_box(200, 160, (0.1, 1.0), rng)
        crop = resized_crop(raw.image, box, 64).astype(int)
        found = cut_segments(raw.segments, box, 64)
        # Bicubic shows the pixel's centre and nearest neighbour its corner: half a step of the zoom apart.
        reach = math.ceil(max(box[2:]) / 64 / 2) + 1
        columns, rows = crop[:, :, 0], crop[:, :, 1]
        inside = (columns % 20 >= reach) & (columns % 20 < 20 - reach)
        inside &= (rows % 20 >= reach) & (rows % 20 < 20 - reach)
        assert inside.mean() > 0.3
        assert np.array_equal(found[inside], (rows // 20 * 100 + columns // 20)[inside])
        labels = PatchLabels(SuperpixelConfig(kind="stored"), 8).of_crop(raw, box, crop.astype(np.uint8))
        assert np.array_equal(labels, patch_labels(found, 8))


def test_an_unscaled_crop_of_the_mask_is_the_mask_of_the_crop():
    raw, box = located(200, 160), (30, 50, 64, 64)
    crop = resized_crop(raw.image, box, 64).astype(int)
    expected = crop[:, :, 1] // 20 * 100 + crop[:, :, 0] // 20
    assert np.array_equal(cut_segments(raw.segments, box, 64), expected)


def test_stored_masks_must_fit():
    raw = located(40, 40)
    with pytest.raises(ValueError, match=r"picture: expected stored segments.*got None \('a photo'\)"):
        StoredMasks()(dataclasses.replace(raw, segments=None))
    with pytest.raises(ValueError, match=r"\(40, 40\), got \(40, 39\)"):
        StoredMasks()(dataclasses.replace(raw, segments=raw.segments[:, 1:]))


# --- the release's order


def release_cut(segments: np.ndarray, box, size: int) -> np.ndarray:
    """behaviour of the release, literally: box to float32 fractions, int and ceil back, nearest neighbour."""
    (top, left, height, width), (H, W) = box, segments.shape
    fractions = (0.0, 0.0, 0.0, 0.0)
    if H > 1 and W > 1:
        corners = left / (W - 1), top / (H - 1), (left + width - 1) / (W - 1), (top + height - 1) / (H - 1)
        fractions = tuple(float(np.float32(corner)) for corner in corners)
    x0, y0 = int(fractions[0] * W), int(fractions[1] * H)
    x1, y1 = math.ceil(fractions[2] * W), math.ceil(fractions[3] * H)
    cut = segments if x1 - x0 < 2 or y1 - y0 < 2 else segments[y0:y1, x0:x1]
    result = np.empty((size, size), segments.dtype)
    for row in range(size):
        for column in range(size):
            source = int(row * cut.shape[0] / size), int(column * cut.shape[1] / size)
            result[row, column] = cut[source]
    return result


def test_cut_is_the_releases():
    rng = random.Random(0)
    for height, width in [(224, 336), (224, 224), (7, 900), (2, 2), (1, 5), (3, 1)] * 4:
        segments = np.arange(height * width).reshape(height, width)
        for _ in range(5):
            top, left = rng.randrange(height), rng.randrange(width)
            box = (top, left, rng.randint(1, height - top), rng.randint(1, width - left))
            assert np.array_equal(cut_segments(segments, box, 16), release_cut(segments, box, 16)), box
        whole = (0, 0, height, width)
        assert np.array_equal(cut_segments(segments, whole, 16), release_cut(segments, whole, 16))


def test_segment_first_equals_the_literal_recomputation():
    data = DataConfig(superpixels=dataclasses.replace(SMALL, order="segment_first", patch_label="mean"))
    dataset = PairDataset([], data, small_config(), 3)  # type: ignore[arg-type]
    differs = 0
    for position in range(8):
        raw = dataclasses.replace(scene(position, 96), caption="a cat")
        box = crop_box(96, 96, (0.5, 1.0), random.Random(f"3-{position}"))
        whole = felzenszwalb(raw.image, scale=20, sigma=0.9, min_size=8)
        cut = release_cut(whole, box, 32)
        expected = [[cut[y : y + 8, x : x + 8].sum() // 64 for x in range(0, 32, 8)] for y in range(0, 32, 8)]
        found = dataset.prepare(raw, position).superpixels
        assert found.tolist() == expected
        on_crop = felzenszwalb(resized_crop(raw.image, box, 32), scale=20, sigma=0.9, min_size=8)
        differs += not np.array_equal(found, patch_labels(on_crop, 8, "mean"))
    assert differs


@pytest.mark.golden
@requires_golden
def test_patch_labels_of_the_release():
    """Pictures and crops of the stored batch to the labels that the release trained with."""
    stored = golden("model.pt")
    path, expected = stored["data_path"], stored["batch"]["image_seg"]
    labels = PatchLabels(SuperpixelConfig(order="segment_first", patch_label="mean"), 16)
    for rgb, box, target in zip(path["stored_rgb"], path["crops_ijhwHW"], expected, strict=True):
        raw = RawSample(rgb.numpy(), "")
        crop = resized_crop(raw.image, tuple(box[:4]), 224)
        assert torch.equal(labels.of_crop(raw, tuple(box[:4]), crop), target)


# --- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sam"}, r"data.superpixels.kind: expected one of \('felzenszwalb', .*got 'sam'"),
        ({"order": "offline"}, "data.superpixels.order: expected one of .*got 'offline'"),
        ({"patch_label": "median"}, "data.superpixels.patch_label: expected one of .*got 'median'"),
        ({"precision": "half"}, "data.superpixels.precision: expected one of .*got 'half'"),
        ({"where": "gpu"}, "data.superpixels.where: expected one of .*got 'gpu'"),
        ({"scale": float("nan")}, "data.superpixels.scale: expected a finite number of at least 0, got nan"),
        ({"sigma": -1.0}, "data.superpixels.sigma: expected a finite number of at least 0, got -1"),
        ({"min_size": -5}, "data.superpixels.min_size: expected a finite number of at least 0, got -5"),
        ({"segments": 0}, "data.superpixels.segments: expected at least 1, got 0"),
        ({"compactness": 0.0}, "data.superpixels.compactness: expected a positive number, got 0.0"),
        ({"cache": "kept"}, "data.superpixels.cache: expected empty unless order is .*, got 'kept'"),
        (
            {"cache": "kept", "kind": "stored", "order": "segment_first"},
            "data.superpixels.cache: expected empty unless .* segments are computed",
        ),
        ({"where": "device", "kind": "slic"}, "data.superpixels.where: .* got device with kind 'slic'"),
        ({"where": "device", "kind": "stored"}, "data.superpixels.where: .* got device with kind 'stored'"),
        ({"where": "device", "order": "segment_first"}, "got device with .* order 'segment_first'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_unusable_settings(values, message):
    with pytest.raises(ValueError, match=message):
        SuperpixelConfig(**values)


def test_settings_of_the_data():
    with pytest.raises(ValueError, match="data.superpixels.kind: expected felzenszwalb or slic with data"):
        DataConfig(dataset_type="scenes", superpixels=SuperpixelConfig(kind="stored"))
    with pytest.raises(ValueError, match=r"data.dataset_type: expected one of .*got 'web'"):
        DataConfig(dataset_type="web")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data.cache: expected False unless dataset_type is scenes"):
        DataConfig(dataset_type="folder", cache=True, crop_area=(1, 1))
    with pytest.raises(ValueError, match=r"data.workers: expected a number of at least 0, got -1"):
        DataConfig(workers=-1)
    config = DataConfig(train_data="pictures", superpixels=SuperpixelConfig(kind="stored"))
    assert from_dict(DataConfig, to_dict(config)) == config
    with pytest.raises(ValueError, match=r"got unknown \['superpixel_scale'\]"):
        from_dict(DataConfig, {"superpixel_scale": 224.0})


def test_where_by_device():
    cpu = torch.device("cpu")
    assert not labels_on_device(SuperpixelConfig(), cpu)
    assert labels_on_device(SuperpixelConfig(where="device"), cpu)
    assert not labels_on_device(SuperpixelConfig(where="workers"), cpu)


def test_where_on_a_gpu(monkeypatch):
    """By kind and order, and by whether the extension has the kernel."""
    from segclip_fast.data import pseudo_labels

    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    cuda, auto = torch.device("cuda"), SuperpixelConfig()
    monkeypatch.setattr(pseudo_labels, "felzenszwalb", lambda image: image)
    assert labels_on_device(auto, cuda)
    assert not labels_on_device(SuperpixelConfig(kind="slic"), cuda)
    assert not labels_on_device(SuperpixelConfig(order="segment_first"), cuda)

    def missing(image):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(pseudo_labels, "felzenszwalb", missing)
    assert not labels_on_device(auto, cuda)
    with pytest.raises(NotImplementedError, match="no kernel"):
        labels_on_device(SuperpixelConfig(where="device"), cuda)
