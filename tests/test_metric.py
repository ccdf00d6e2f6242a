"""Mean intersection over union on planted cases, and over a source of images with masks."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from test_windows import COLOURS, GREY, ColourModel, painted

from segclip_fast.data.sample import RawSample
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.evaluation.metric import ConfusionMatrix, confusions, mean_iou


def measured(pred, truth, classes):
    matrix = ConfusionMatrix(classes)
    matrix.update(np.array(pred), np.array(truth))
    return matrix.result()


def test_planted_case():
    result = measured([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 2, 2]], 3)
    assert result.iou.tolist() == pytest.approx([1 / 2, 2 / 4, 1 / 2])
    assert result.miou == pytest.approx(0.5)
    assert result.pixel_accuracy == pytest.approx(4 / 6)
    assert result.mean_accuracy == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)


def test_absent_classes_are_skipped():
    """Class 1 is in neither; class 2 is predicted only: IoU 0 counts, its accuracy does not exist."""
    result = measured([0, 0, 2, 3], [0, 0, 0, 3], 4)
    assert math.isnan(result.iou[1])
    assert result.iou[[0, 2, 3]].tolist() == pytest.approx([2 / 3, 0, 1])
    assert result.miou == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert result.mean_accuracy == pytest.approx((2 / 3 + 1) / 2)


def test_ignored_pixels_do_not_count():
    result = measured(
        [0, 1, 1, 7], [0, 1, 255, 255], 2
    )  # a label out of range under 255 is nobody's business
    assert result.iou.tolist() == [1, 1]
    assert result.pixel_accuracy == 1


def test_background_counts():
    assert measured([0, 0, 1], [0, 1, 1], 2).miou == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_nothing_counted():
    for result in (ConfusionMatrix(3).result(), measured([0, 1], [255, 255], 3)):
        assert math.isnan(result.miou)
        assert math.isnan(result.pixel_accuracy)
        assert math.isnan(result.mean_accuracy)
        assert np.isnan(result.iou).all()


def test_streaming_and_merging_sum_over_the_set():
    rng = np.random.default_rng(0)
    pred, truth = rng.integers(0, 6, (5, 8, 9)), rng.integers(0, 6, (5, 8, 9))
    truth[rng.random(truth.shape) < 0.2] = 255
    whole, left, right = ConfusionMatrix(6), ConfusionMatrix(6), ConfusionMatrix(6)
    whole.update(pred, truth)
    for i in range(5):
        (left if i < 2 else right).update(torch.from_numpy(pred[i]), truth[i].astype(np.uint8))
    left.merge(right)
    assert (left.counts == whole.counts).all()
    assert whole.counts.dtype == np.int64
    for c in range(6):
        known = truth != 255
        both = ((pred == c) & (truth == c)).sum()
        either = (((pred == c) | (truth == c)) & known).sum()
        assert whole.result().iou[c] == both / either


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        ([0, 3], [0, 1], "pred: expected labels 0 to 2, got 3"),
        ([0, -1], [0, 1], "pred: expected labels 0 to 2, got -1"),
        ([0, 1], [0, 3], "truth: expected labels 0 to 2, got 3"),
        ([0, 1], [-1, 0], "truth: expected labels 0 to 2, got -1"),
        ([0, 1], [[0, 1]], "pred: expected the shape of truth (1, 2), got (2,)"),
        ([0.0, 1.0], [0, 1], "pred: expected integer labels, got float64"),
    ],
    ids=str,
)
def test_refusals(pred, truth, message):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=re.escape(message)):
        matrix.update(np.array(pred), np.array(truth))
    assert matrix.counts.sum() == 0


def test_constructor_refusals():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="ignore: expected a number outside the 300 classes, got 255"):
        ConfusionMatrix(300)
    with pytest.raises(ValueError, match="other: expected 2 classes, got 3"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))


# --- a source of images


class Stripes:
    """Photos of two stripes; the names need not be what the prompts say."""

    class_names = ("background", "rouge", "blue", "never there")

    def __init__(self):
        rows = [("red", "blue"), ("blue", "grey"), ("red", "grey"), ("red", "red"), ("grey", "blue")]
        paint = {**COLOURS, "grey": GREY}
        index = {"grey": 0, "red": 1, "blue": 2}
        self.samples = []
        for i, (left, right) in enumerate(rows):
            size = 32 + 5 * i
            image = painted(paint[left], paint[right], size=size, height=40)
            mask = np.repeat(np.repeat([index[left], index[right]], size)[None], 40, axis=0)
            mask[:, size - 8 : size + 8] = 255
            self.samples.append(RawSample(image, "", mask))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


PROMPTS = ["red", "blue", "thing"]


def test_a_perfect_model_scores_one():
    """By the paper's rule; the official threshold adapts, so a window of nothing but grey gets a colour."""
    result = evaluate_source(ColourModel(), Stripes(), labels=PROMPTS, protocol="paper")
    assert result.iou[:3].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert math.isnan(result.iou[3])
    assert result.miou > 0.98
    assert result.names == Stripes.class_names


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_changes_nothing(batch_size):
    expected = evaluate_source(ColourModel(), Stripes(), labels=PROMPTS)
    found = evaluate_source(ColourModel(), Stripes(), labels=PROMPTS, batch_size=batch_size)
    assert np.array_equal(found.iou, expected.iou, equal_nan=True)
    assert found.pixel_accuracy == expected.pixel_accuracy


def test_names_are_the_prompts_by_default():
    model = ColourModel()
    evaluate_source(model, Stripes(), limit=2)
    assert model.prompts == [f"a photo of a {name}." for name in Stripes.class_names[1:]]
    assert len(model.windows) == 1


def test_background_can_be_an_ordinary_label():
    model = ColourModel()
    result = evaluate_source(model, Stripes(), background=False, limit=1)
    assert model.prompts[0] == "a photo of a background."
    assert len(result.iou) == 4


def test_options_are_passed_on():
    model = ColourModel()
    evaluate_source(model, Stripes(), labels=PROMPTS, limit=1, templates=["the {}"], snap=True, threshold=0.3)
    assert model.prompts == ["the red", "the blue", "the thing"]


def test_source_refusals():
    source, model = Stripes(), ColourModel()
    with pytest.raises(ValueError, match="labels: expected 3 of them, got 2"):
        evaluate_source(model, source, labels=["red", "blue"])
    with pytest.raises(ValueError, match="source: expected at least one sample"):
        evaluate_source(model, source, limit=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        evaluate_source(model, source, batch_size=0)
    good = source.samples[0]
    source.samples[1] = RawSample(good.image, "")
    with pytest.raises(ValueError, match="sample 1 has none"):
        evaluate_source(model, source, labels=PROMPTS)
    source.samples[1] = RawSample(good.image, "", good.mask.T)
    with pytest.raises(
        ValueError, match=re.escape("expected a mask of shape (40, 64) for sample 1, got (64, 40)")
    ):
        evaluate_source(model, source, labels=PROMPTS)


def test_counts_of_several_images_at_once():
    rng = np.random.default_rng(0)
    preds = [torch.from_numpy(rng.integers(0, 6, size)) for size in ((4, 5), (7, 3), (1, 1))]
    truths = [torch.from_numpy(rng.integers(0, 6, p.shape).astype(np.uint8)) for p in preds]
    truths[0][:2], truths[2][:] = 255, 255
    found = confusions(preds, truths, 6)
    assert found.shape == (3, 6, 6)
    for counts, pred, truth in zip(found, preds, truths, strict=True):
        matrix = ConfusionMatrix(6)
        assert torch.equal(counts, matrix.update(pred, truth))
    means = mean_iou(found)
    assert means[0] == pytest.approx(ConfusionMatrix.result(_matrix(preds[0], truths[0])).miou)
    assert torch.isnan(means[2])  # nothing counted


def _matrix(pred, truth):
    matrix = ConfusionMatrix(6)
    matrix.update(pred, truth)
    return matrix
