"""The official zero-shot pipeline against stored outputs of the authors' code: two photos, 21 VOC classes.

Two sets: "prompts" (features of the real prompts: all scores are low, the adaptive threshold decides) and
"planted" (given features: the top-5 filter and the threshold .80 bite).
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from golden import golden, golden_folder, golden_model

from segclip_fast.data.transforms import normalise
from segclip_fast.evaluation.score_map import merge_windows
from segclip_fast.evaluation.scoring import (
    Background,
    add_background,
    effective_threshold,
    label_affinity,
)
from segclip_fast.evaluation.vocabularies import VOC
from segclip_fast.evaluation.windows import Window, plan_windows, resize_short_side, score_images
from segclip_fast.losses import inverse_temperature

CASES = [(text, photo) for text in ("prompts", "planted") for photo in ("astronaut", "chelsea")]
cases = pytest.mark.parametrize(("text", "photo"), CASES)

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(
        golden_folder() is None,
        reason="no stored outputs: set SEGCLIP_GOLDEN or put them at ../shared/golden",
    ),
]


@functools.cache
def stored() -> dict:
    return golden("evaluation_voc.pt")


def scored(text: str, photo: str) -> tuple[list[dict], list[torch.Tensor]]:
    """Stored windows of one photo, and the scores (1, L, C) that we derive from their stored features."""
    part = stored()["voc"][text]
    scale = inverse_temperature(torch.tensor(part["logit_scale"]))
    crops = part["images"][photo]["crops"]
    labels = part["text_embedding"]
    return crops, [
        label_affinity(c["image_features"], c["patch_features"][None], labels, scale) for c in crops
    ]


def agreement(labels: torch.Tensor, expected: torch.Tensor) -> float:
    return (labels == expected.long()).double().mean().item()


@pytest.mark.parametrize("photo", ["astronaut", "chelsea"])
def test_input_is_the_resized_normalised_photo(photo):
    image = stored()["images_rgb"][photo].numpy()
    expected = stored()["voc"]["prompts"]["images"][photo]["img"][0]
    found = normalise(resize_short_side(image, 224))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5  # one grey level is 1.4e-2


@pytest.mark.parametrize("photo", ["astronaut", "chelsea"])
def test_windows_are_those_of_the_release(photo):
    part = stored()["voc"]["prompts"]["images"][photo]
    windows = plan_windows(part["img"].shape[2], part["img"].shape[3], 224, 224)
    boxes = [[w.top, w.left, w.top + w.height, w.left + w.width] for w in windows]
    assert boxes == [crop["box_yxyx"] for crop in part["crops"]]


def test_vocabulary_is_the_stored_one():
    assert list(VOC.names) == stored()["voc"]["classes"]
    assert stored()["voc"]["test_cfg"]["bg_thresh"] == VOC.threshold


@cases
def test_affinity_and_threshold(text, photo):
    crops, scores = scored(text, photo)
    for crop, score in zip(crops, scores, strict=True):
        assert (score[0] - crop["group_affinity"]).abs().max() < 1e-5
        kept = set(score[0].amax(dim=0).nonzero().flatten().tolist())
        assert kept == set(crop["top5"].tolist())
        assert abs(effective_threshold(score, VOC.threshold).item() - crop["bg_thresh_effective"]) < 1e-6


@cases
def test_label_map_from_stored_regions(text, photo):
    part = stored()["voc"][text]["images"][photo]
    crops, scores = scored(text, photo)
    windows, parts = [], []
    for crop, score in zip(crops, scores, strict=True):
        top, left, bottom, right = crop["box_yxyx"]
        windows.append(Window(top, left, bottom - top, right - left))
        full = add_background(score, effective_threshold(score, VOC.threshold))[0]
        parts.append((crop["group_index"].long(), full))
    score_map = merge_windows(tuple(part["img_shape"][:2]), windows, parts)
    labels, _ = score_map.arg_max(*part["ori_shape"][:2])
    assert agreement(labels, part["label_map"]) >= 0.9999


@functools.cache
def real_model():
    return golden_model()


@cases
def test_whole_pipeline_with_the_real_model(text, photo):
    """Pixels to labels: 0.1 % for near ties of the region arg max (17 to 20 pixels a window)."""
    part = stored()["voc"][text]
    model = real_model()
    image = stored()["images_rgb"][photo].numpy()
    with torch.no_grad():
        model.logit_scale.fill_(part["logit_scale"])
    score_map = score_images(model, [image], part["text_embedding"], Background(VOC.threshold))[0]
    labels, _ = score_map.arg_max(*image.shape[:2])
    assert agreement(labels, part["images"][photo]["label_map"]) >= 0.999


def test_prompts_of_the_release():
    model = real_model()
    from segclip_fast.evaluation.prompts import encode_labels

    expected = stored()["voc"]["prompts"]["text_embedding"]
    tokens = model.tokenize([f"a photo of a {label}." for label in VOC.labels])
    assert np.array_equal(tokens.numpy(), stored()["voc"]["prompt_tokens"].numpy())
    assert (encode_labels(model, VOC.labels) - expected).abs().max() < 1e-5
