"""Pixel-adaptive mask refinement against its per-pixel twin, and its properties on planted photos."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from segclip_fast.evaluation.pamr import pamr, pamr_ref


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_scores(labels, height, width, seed=1):
    return torch.rand(labels, height, width, generator=torch.Generator().manual_seed(seed))


def halves(height=24, width=24):
    """A photo dark on the left and bright on the right, and scores whose border is 3 pixels too far right."""
    image = np.full((height, width, 3), 40, dtype=np.uint8)
    image[:, width // 2 :] = 200
    left = torch.zeros(height, width)
    left[:, : width // 2 + 3] = 1
    return image, torch.stack((left, 1 - left))


@pytest.mark.parametrize(
    ("labels", "height", "width", "iterations", "dilations"),
    [
        (1, 1, 1, 2, (1,)),
        (2, 7, 5, 1, (1,)),
        (3, 6, 9, 3, (1, 2)),
        (2, 5, 8, 2, (8, 16)),  # both reach beyond the photo
        (2, 9, 9, 2, (2, 1, 2)),  # a repeated dilation counts twice
        (2, 1, 6, 2, (1, 3)),
    ],
    ids=str,
)
def test_equals_the_twin(labels, height, width, iterations, dilations):
    image, scores = photo(height, width), random_scores(labels, height, width)
    refined = pamr(image, scores, iterations, dilations)
    assert refined.dtype == torch.float32
    assert refined.shape == scores.shape
    expected = pamr_ref(image, scores, iterations, dilations)
    assert expected.dtype == np.float64
    np.testing.assert_allclose(refined.numpy(), expected, rtol=0, atol=2e-6)


def test_equals_the_twin_by_default():
    image, scores = photo(20, 22), random_scores(1, 20, 22)
    np.testing.assert_allclose(pamr(image, scores), pamr_ref(image, scores), rtol=0, atol=5e-6)


def test_by_hand_in_one_row():
    """1 x 3 photo 0, 0, 1 (grey): the weights of the first and the last pixel written out."""
    image = torch.tensor([0.0, 0.0, 1.0]).expand(3, 1, 3)
    scores = torch.tensor([[[0.0, 0.5, 1.0]]])
    refined = pamr(image, scores, iterations=1, dilations=(1,))[0, 0]
    # First pixel: its square holds zeros only, all eight weights are 1/8, the right column has 3 of them.
    assert refined[0].item() == pytest.approx(3 / 8 * 0.5)
    # Last pixel: 5 neighbours are itself repeated (difference 0), the left column's 3 have difference 1; the
    # square has 3 zeros and 6 ones: variance = (6 * (1/3)^2 + 3 * (2/3)^2) / 8 = 1/4.
    far = np.exp(-1 / (0.1 * 0.5))
    assert refined[2].item() == pytest.approx((5 * 1.0 + 3 * far * 0.5) / (5 + 3 * far))


@pytest.mark.parametrize("max_floats", [1, 3000, 6000, 7001, 2**24])
def test_chunks_do_not_change_a_bit(max_floats):
    image, scores = photo(33, 29), random_scores(7, 33, 29)
    whole = pamr(image, scores, 3, (2, 5))
    assert torch.equal(pamr(image, scores, 3, (2, 5), max_floats=max_floats), whole)


def test_a_label_does_not_depend_on_the_others():
    image, scores = photo(17, 13), random_scores(5, 17, 13)
    whole = pamr(image, scores, 4, (1, 3))
    for label in range(5):
        assert torch.equal(pamr(image, scores[label : label + 1], 4, (1, 3))[0], whole[label])


def test_the_cap_bounds_the_labels_refined_together(monkeypatch):
    """A label needs (H + 2 margin) * (W + 2 margin) + H * W floats; the padded copies show the chunks."""
    import segclip_fast.evaluation.pamr as module

    sizes, padded = [], module._padded

    def spy(planes, margin):
        sizes.append(len(planes))
        return padded(planes, margin)

    monkeypatch.setattr(module, "_padded", spy)
    per_label = (10 + 4) * (8 + 4) + 10 * 8
    pamr(photo(10, 8), random_scores(5, 10, 8), 1, (2,), max_floats=2 * per_label)
    assert sizes == [1, 1, 1, 2, 2, 1]  # the photo's channels, then the labels
    sizes.clear()
    pamr(photo(10, 8), random_scores(2, 10, 8), 1, (2,), max_floats=2 * per_label - 1)
    assert sizes == [1, 1, 1, 1, 1]


def test_scores_follow_the_photo():
    image, scores = halves()
    truth = np.zeros((24, 24), dtype=np.int64)
    truth[:, 12:] = 1
    assert (scores.argmax(0).numpy() != truth).mean() == pytest.approx(3 / 24)
    refined = pamr(image, scores, 10, (1, 2))
    assert (refined.argmax(0).numpy() == truth).all()


def test_sums_and_ranges_are_kept():
    image, scores = photo(16, 18), random_scores(4, 16, 18).softmax(dim=0)
    refined = pamr(image, scores, 10, (1, 4))
    torch.testing.assert_close(refined.sum(0), torch.ones(16, 18))
    for before, after in zip(scores, refined, strict=True):
        assert before.min() - 1e-6 <= after.min() <= after.max() <= before.max() + 1e-6
        assert after.std() < before.std()


def test_flat_photo_averages_evenly():
    scores = torch.zeros(1, 5, 5)
    scores[0, 2, 2] = 8
    refined = pamr(np.full((5, 5, 3), 77, dtype=np.uint8), scores, 1, (1,))[0]
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 1
    expected[2, 2] = 0  # the pixel itself is not among its neighbours
    torch.testing.assert_close(refined, expected)


def test_layouts_and_ranges_of_the_photo():
    image, scores = photo(9, 11), random_scores(2, 9, 11)
    expected = pamr(image, scores, 2, (1, 2))
    for same in (
        torch.from_numpy(image),
        image.transpose(2, 0, 1),
        np.ascontiguousarray(image.transpose(2, 0, 1)),
        torch.from_numpy(image).permute(2, 0, 1) / 255.0,
        image[::-1][::-1],
    ):
        assert torch.equal(pamr(same, scores, 2, (1, 2)), expected)
    for close in (image / 255.0, image.astype(np.float32), image / 100.0 - 1.0):  # shifted and scaled
        torch.testing.assert_close(pamr(close, scores, 2, (1, 2)), expected, rtol=0, atol=1e-5)


def test_read_only_and_flipped_photos():
    image, scores = photo(6, 7), random_scores(1, 6, 7)
    frozen = image.copy()
    frozen.flags.writeable = False
    assert torch.equal(pamr(frozen, scores, 1, (1,)), pamr(image, scores, 1, (1,)))
    flipped = pamr(image[:, ::-1], scores.flip(2), 1, (1,)).flip(2)
    torch.testing.assert_close(flipped, pamr(image, scores, 1, (1,)))


def test_three_by_three_photo_has_its_channels_first():
    """Shifting a channel changes nothing, shifting a column does."""
    image, scores, shift = (
        random_scores(3, 3, 3, seed=4),
        random_scores(1, 3, 3),
        torch.tensor([0.0, 1.0, 2.0]),
    )
    refined = pamr(image, scores, 1, (1,))
    torch.testing.assert_close(pamr(image + shift[:, None, None], scores, 1, (1,)), refined)
    assert not torch.allclose(pamr(image + shift, scores, 1, (1,)), refined, atol=1e-3)


def test_inputs_stay_as_they_were():
    image, scores = torch.rand(3, 8, 8), random_scores(3, 8, 8)
    kept = image.clone(), scores.clone()
    refined = pamr(image, scores.requires_grad_(), 2, (1,))
    assert not refined.requires_grad
    assert torch.equal(image, kept[0])
    assert torch.equal(scores, kept[1])


def test_no_iteration_copies():
    scores = random_scores(2, 4, 6)
    refined = pamr(photo(4, 6), scores, 0)
    assert torch.equal(refined, scores)
    assert refined.data_ptr() != scores.data_ptr()


def test_strided_scores():
    scores = random_scores(6, 9, 7).permute(2, 0, 1)  # (7, 6, 9), not contiguous
    refined = pamr(photo(6, 9), scores, 2, (2,))
    assert refined.is_contiguous()
    assert torch.equal(refined, pamr(photo(6, 9), scores.contiguous(), 2, (2,)))


def test_a_huge_dilation_needs_no_huge_margin():
    image, scores = photo(4, 5), random_scores(1, 4, 5)
    assert torch.equal(pamr(image, scores, 2, (10**6,)), pamr(image, scores, 2, (5,)))


@pytest.mark.gpu
def test_same_on_the_gpu():
    image, scores = photo(120, 90), random_scores(21, 120, 90)
    on_gpu = pamr(image, scores.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), pamr(image, scores), rtol=0, atol=1e-5)
    assert torch.equal(pamr(image, scores.cuda(), max_floats=100_000), on_gpu)


GOOD = {"image": np.zeros((4, 5, 3), dtype=np.uint8), "scores": torch.zeros(2, 4, 5)}


@pytest.mark.parametrize("function", [pamr, pamr_ref])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 4, 5).double()}, "scores: expected a float32 tensor, got torch.float64"),
        ({"scores": np.zeros((2, 4, 5), np.float32)}, "scores: expected a float32 tensor, got ndarray"),
        ({"scores": torch.zeros(4, 5)}, "scores: expected non-empty (C, H, W), got shape (4, 5)"),
        ({"scores": torch.zeros(0, 4, 5)}, "scores: expected non-empty (C, H, W), got shape (0, 4, 5)"),
        ({"scores": torch.full((2, 4, 5), torch.inf)}, "scores: expected finite numbers"),
        (
            {"image": np.zeros((5, 4, 3))},
            "image: expected shape (3, 4, 5) or (4, 5, 3) as `scores`, got (5, 4, 3)",
        ),
        ({"image": np.zeros((4, 5), np.uint8)}, "image: expected shape (3, 4, 5) or (4, 5, 3)"),
        (
            {"image": np.zeros((4, 5, 3), np.int64)},
            "image: expected uint8 or floating point, got torch.int64",
        ),
        ({"image": np.full((4, 5, 3), np.nan)}, "image: expected finite numbers"),
        ({"iterations": -1}, "iterations: expected at least 0, got -1"),
        ({"dilations": ()}, "dilations: expected at least one, each at least 1, got ()"),
        ({"dilations": (8, 0)}, "dilations: expected at least one, each at least 1, got (8, 0)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(function, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**GOOD | change)


def test_cap_below_one():
    with pytest.raises(ValueError, match="max_floats: expected at least 1, got 0"):
        pamr(**GOOD, max_floats=0)
