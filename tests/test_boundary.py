"""Boundary F-score on planted squares whose outlines can be counted by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from segclip_fast.evaluation.boundary import boundary_f_score, boundary_f_scores


def square(top, left, side=10, size=40, label=1):
    labels = np.zeros((size, size), dtype=np.int64)
    labels[top : top + side, left : left + side] = label
    return labels


def noise(height, width, classes, seed=0):
    return np.random.default_rng(seed).integers(0, classes, (height, width))


def brute_force(prediction, truth, label, radius):
    """The definition with loops over pixels and all pairs of boundary pixels."""

    def outline(labels):
        height, width = labels.shape
        points = []
        for i in range(height):
            for j in range(width):
                around = ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
                inside = [(r, c) for r, c in around if 0 <= r < height and 0 <= c < width]
                if labels[i, j] == label and any(labels[r, c] != label for r, c in inside):
                    points.append((i, j))
        return points

    def share(points, others):
        near = [any(math.dist(p, q) <= radius for q in others) for p in points]
        return sum(near) / len(near) if near else 0.0

    guess, target = outline(prediction), outline(truth)
    precision, recall = share(guess, target), share(target, guess)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (30, 41), (64, 64)], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_perfect_prediction_is_one(shape, classes):
    truth = noise(*shape, classes)
    assert boundary_f_score(truth.astype(np.uint8), truth, classes) == 1.0


def test_larger_squares():
    """One pixel larger all around: within one pixel except at the 4 corners, which are sqrt(2) away."""
    truth, larger, largest = square(15, 15), square(14, 14, 12), square(13, 13, 14)
    loose = 1.5 / math.hypot(40, 40)  # 1.5 pixels
    assert boundary_f_scores(larger, truth, 2, loose)[1] == 1.0
    assert boundary_f_scores(largest, truth, 2, loose)[1] == 0.0
    # By default 0.0075 * 57 pixels < 1, so one pixel: 4 of 44 outline pixels miss, none of the truth's 36
    precision = 40 / 44
    assert boundary_f_scores(larger, truth, 2)[1] == pytest.approx(2 * precision / (precision + 1))
    assert boundary_f_scores(larger, truth, 2, tolerance=0.0)[1] == boundary_f_scores(larger, truth, 2)[1]


def test_shifted_square():
    """A 10 x 10 square moved 4 to the right: of its 36 outline pixels, those within 1 pixel are counted.

    Rows 0 and 9: columns 4 to 9 coincide and column 10 has the truth's column 9 beside it, 7 in each row.
    Left side (column 4): rows 1 and 8 are beside the truth's rows 0 and 9. Right side (column 13): none.
    So 16 of 36; recall likewise.
    """
    truth, prediction = square(15, 15), square(15, 19)
    assert boundary_f_scores(prediction, truth, 2)[1] == pytest.approx(16 / 36)
    assert boundary_f_scores(truth, prediction, 2)[1] == pytest.approx(16 / 36)


def test_far_squares_share_nothing():
    assert boundary_f_scores(square(2, 2), square(25, 25), 2)[1] == 0.0


def test_precision_and_recall_differ():
    """Two squares where the truth has one: precision 1/2, recall 1."""
    truth = square(5, 5)
    prediction = truth | square(25, 25)
    assert boundary_f_scores(prediction, truth, 2)[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(9, 12), (13, 7)], ids=str)
@pytest.mark.parametrize("radius", [1.0, 1.5, 2.3])
def test_equals_the_definition(shape, radius):
    cells = noise(3, 4, 3, seed=2)
    truth = np.kron(cells, np.ones((5, 4), dtype=np.int64))[: shape[0], : shape[1]]
    prediction = np.where(noise(*shape, 8, seed=3) == 0, 2 - truth, truth)
    # a hair more than the radius, so that rounding cannot fall below it
    scores = boundary_f_scores(prediction, truth, 3, tolerance=(radius + 1e-9) / math.hypot(*shape))
    for label in range(3):
        assert scores[label] == pytest.approx(brute_force(prediction, truth, label, radius + 1e-9))


def test_tolerance_grows_with_the_image():
    """An outline 3 pixels off counts in a large image (0.0075 * 566 = 4.2 pixels), not in a small one."""
    assert boundary_f_scores(square(100, 103, 80, 400), square(100, 100, 80, 400), 2)[1] == 1.0
    assert boundary_f_scores(square(10, 13, 8), square(10, 10, 8), 2)[1] < 0.7


def test_absent_classes_are_skipped():
    scores = boundary_f_scores(square(5, 5), square(5, 5), 4)
    assert scores[:2].tolist() == [1, 1]
    assert np.isnan(scores[2:]).all()
    assert boundary_f_score(square(5, 5), square(5, 5), 4) == 1.0


def test_class_in_one_of_the_two_scores_zero():
    scores = boundary_f_scores(square(5, 5, label=2), square(5, 5, label=1), 3)
    assert scores.tolist() == [1, 0, 0]
    assert boundary_f_score(square(5, 5, label=2), square(5, 5, label=1), 3) == pytest.approx(1 / 3)


def test_no_boundary_on_either_side():
    """The class fills the image in both: nothing to find. In one only: nothing found."""
    full = np.ones((8, 8), dtype=np.int64)
    assert boundary_f_scores(full, full, 3)[1] == 1.0
    scores = boundary_f_scores(np.zeros_like(full), full, 3)
    assert scores[:2].tolist() == [0, 0]
    assert math.isnan(scores[2])


def test_boundary_on_one_side_only():
    assert boundary_f_scores(square(5, 5), np.zeros((40, 40), int), 2).tolist() == [0, 0]
    assert boundary_f_scores(np.zeros((40, 40), int), square(5, 5), 2).tolist() == [0, 0]


def test_image_border_is_no_boundary():
    """A class on the left half has one straight outline; stopping short of the border adds one."""
    truth = np.zeros((20, 20), dtype=np.int64)
    truth[:, :10] = 1
    prediction = truth.copy()
    prediction[:, 0] = 0  # makes an outline at column 1, 8 pixels from the true one at column 9
    precision = 20 / 40
    assert boundary_f_scores(prediction, truth, 2)[1] == pytest.approx(2 * precision / (precision + 1))


@pytest.mark.parametrize("ignore", [255, -1, 7])
def test_predictions_under_ignore_do_not_count(ignore):
    truth = square(5, 5)
    truth[20:36, 20:36] = ignore
    prediction = square(5, 5)
    expected = boundary_f_scores(prediction, truth, 2, ignore=ignore)
    assert expected.tolist() == [1, 1]
    prediction[20:36, 20:36] = noise(16, 16, 300)
    assert boundary_f_scores(prediction, truth, 2, ignore=ignore).tolist() == expected.tolist()
    assert boundary_f_score(prediction, np.where(truth == ignore, 0, truth), 300, ignore=-1) < 0.5


def test_a_ring_of_ignored_pixels_ends_the_class():
    """As in PASCAL VOC: wherever the prediction ends inside the ring, it is right."""
    truth = square(12, 12, 16, label=255)
    truth[15:25, 15:25] = 1
    for side, first in ((10, 15), (12, 14), (16, 12)):
        assert boundary_f_score(square(first, first, side), truth, 2) == 1.0
    assert boundary_f_score(square(9, 9, 22), truth, 2) < 1.0


def test_everything_ignored():
    truth = np.full((4, 4), 255, dtype=np.uint8)
    assert np.isnan(boundary_f_scores(np.zeros((4, 4), int), truth, 2)).all()
    assert math.isnan(boundary_f_score(np.zeros((4, 4), int), truth, 2))


def test_one_pixel_images():
    one, zero = np.array([[1]]), np.array([[0]])
    assert boundary_f_score(one, one, 2) == 1.0
    assert boundary_f_score(zero, one, 2) == 0.0
    assert math.isnan(boundary_f_score(one, np.array([[255]]), 2))


def test_one_row():
    """Tolerance one pixel: the change is one pixel late, both boundary pixels still match."""
    assert boundary_f_score(np.array([[0, 0, 0, 1]]), np.array([[0, 0, 1, 1]]), 2) == 1.0
    assert boundary_f_score(np.array([[0, 0, 0, 0, 1]]), np.array([[0, 0, 1, 1, 1]]), 2) == 0.0


def test_tensors_and_unsigned_labels():
    truth = noise(12, 15, 4)
    prediction = noise(12, 15, 4, seed=5)
    expected = boundary_f_score(prediction, truth, 4)
    assert 0 < expected < 1
    assert boundary_f_score(torch.from_numpy(prediction), truth.astype(np.uint8), 4) == expected
    assert boundary_f_score(prediction.astype(np.uint16), torch.from_numpy(truth), 4, ignore=-1) == expected


def test_inputs_stay_as_they_were():
    truth, prediction = square(3, 3), square(4, 4)
    kept = truth.copy(), prediction.copy()
    boundary_f_score(prediction, truth, 2)
    assert (truth == kept[0]).all()
    assert (prediction == kept[1]).all()


ZERO = np.zeros((4, 5), dtype=np.int64)
GOOD = {"prediction": ZERO, "truth": ZERO, "classes": 3}


@pytest.mark.parametrize("function", [boundary_f_score, boundary_f_scores])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 0}, "classes: expected at least 1, got 0"),
        ({"ignore": 2}, "ignore: expected a number outside the 3 classes, got 2"),
        ({"tolerance": 1.0}, "tolerance: expected a share of the diagonal, 0 <= tolerance < 1, got 1.0"),
        ({"tolerance": -0.1}, "tolerance: expected a share of the diagonal"),
        ({"tolerance": math.nan}, "tolerance: expected a share of the diagonal"),
        ({"truth": ZERO[0]}, "truth: expected non-empty (H, W), got shape (5,)"),
        ({"truth": ZERO[:0]}, "truth: expected non-empty (H, W), got shape (0, 5)"),
        ({"prediction": ZERO.T}, "prediction: expected the shape of truth (4, 5), got (5, 4)"),
        ({"prediction": ZERO * 1.0}, "prediction: expected integer labels, got float64"),
        ({"truth": ZERO == 0}, "truth: expected integer labels, got bool"),
        ({"prediction": ZERO + 3}, "prediction: expected labels 0 to 2, got 3"),
        ({"prediction": ZERO + 255}, "prediction: expected labels 0 to 2, got 255"),
        ({"truth": ZERO - 1}, "truth: expected labels 0 to 2, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(function, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**GOOD | change)
