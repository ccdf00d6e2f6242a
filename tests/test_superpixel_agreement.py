"""How label maps are compared by benchmarks/superpixel_agreement.py, and the table made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "benchmarks"))

import superpixel_agreement as agree  # noqa: E402
import superpixel_picture as picture  # noqa: E402
from reporting import superpixels  # noqa: E402

QUARTERS = np.arange(4).reshape(2, 2).repeat(16, axis=0).repeat(16, axis=1)  # (32, 32), one per patch


# --- two label maps


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),  # names do not matter
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),  # 1 couple of both, 2 and 1 of each, 6 in all
        ([0, 0, 1, 2], [0, 0, 1, 1], 4 / 7),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 0, 0], [7, 7, 7, 7], 1.0),
        ([0, 1, 2, 3], [3, 2, 1, 0], 1.0),
        ([0], [1], 1.0),
    ],
)
def test_adjusted_rand_index(theirs, ours, expected):
    table = agree.contingency(np.array(theirs), np.array(ours))
    assert agree.adjusted_rand_index(table) == pytest.approx(expected, abs=1e-15)


def test_adjusted_rand_index_counts_couples():
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 4, 60)
    ours = np.where(rng.random(60) < 0.7, theirs, rng.integers(0, 5, 60))
    upper = np.triu_indices(60, 1)
    same = [(x[:, None] == x)[upper] for x in (theirs, ours)]
    a, b = np.sum(same[0] & same[1]), np.sum(same[0] & ~same[1])
    c, d = np.sum(~same[0] & same[1]), np.sum(~same[0] & ~same[1])
    expected = 2 * (a * d - b * c) / ((a + b) * (b + d) + (a + c) * (c + d))  # the index by kinds of couples
    found = agree.adjusted_rand_index(agree.contingency(theirs, ours))
    assert 0.2 < found < 0.9
    assert found == pytest.approx(expected, abs=1e-12)


def test_contingency():
    table = agree.contingency(np.array([[9, 9], [4, 9]]), np.array([[0, 1], [1, 1]]))
    assert table.tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ([3, 3, 8, 8], [1, 1, 0, 0], 0.0),
        ([0, 0, 0, 0], [0, 0, 1, 2], 0.5),  # a segment that fell apart keeps its largest part
        ([0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0], 1 / 3),  # 2 + 4, not greedily 3 + 0
    ],
)
def test_changed_share_under_the_best_renaming(theirs, ours, expected):
    table = agree.contingency(np.array(theirs), np.array(ours))
    assert agree.changed_share(table) == pytest.approx(expected)


def test_agreement_does_not_mind_names_but_for_the_numbers():
    found = agree.agreement(3 - QUARTERS, QUARTERS)
    assert found == agree.Agreement(False, 1.0, 4, 4, 0.0, 0.0, 1.0)


def test_agreement_of_maps_that_differ():
    theirs = QUARTERS.copy()
    theirs[:16, 16:] = 0  # upper two joined
    found = agree.agreement(theirs, QUARTERS)
    assert (found.differs, found.segments_theirs, found.segments_ours) == (True, 3, 4)
    assert found.majority_changed == found.mean_changed == found.mean_numbers_changed == 0.25
    theirs = QUARTERS.copy()
    theirs[0, 0] = 3  # of patch 0 the majority stays, and the mean is still below 1
    found = agree.agreement(theirs, QUARTERS)
    assert found.differs
    assert 0.99 < found.rand < 1
    assert (found.majority_changed, found.mean_changed, found.mean_numbers_changed) == (0.0, 0.0, 0.0)


def test_summary_takes_means_and_the_least():
    joined = QUARTERS.copy()
    joined[:16, 16:] = 0
    found = agree.summary([(joined, QUARTERS), (QUARTERS, QUARTERS)])
    assert (found["differs"], found["segments_theirs"], found["majority_changed"]) == (0.5, 3.5, 0.125)
    assert found["rand_least"] == pytest.approx(2 * found["rand"] - 1)
    assert found["rand_least"] < 1


# --- what is compared


def test_the_release_cuts_the_map_of_the_whole_picture():
    stripes = np.array([0, 90, 180, 255], np.uint8)[np.arange(280) // 70]
    whole = np.ascontiguousarray(np.broadcast_to(stripes[:, None], (240, 280, 3)))
    setting = agree.PAPER | {"min_size": 1500}  # joins the blurred borders to the stripes, (240, 70) each
    pairs = list(agree.in_both_orders([whole], setting, 8))
    assert len({theirs.tobytes() for theirs, _ in pairs}) > 1  # the crops are not all the same
    for theirs, ours in pairs:
        assert theirs.shape == ours.shape == (224, 224)
        assert (theirs == theirs[0]).all()  # stripes stay stripes
        assert set(np.diff(theirs[0])) == {0, 1}
        assert agree.agreement(theirs, ours).rand > 0.9  # the borders are off by a pixel or two
        assert ours.min() == 0
    assert any(theirs.min() > 0 for theirs, _ in pairs)  # numbers of the whole picture stay as they are
    again = agree.in_both_orders([whole], setting, 8)
    assert all(np.array_equal(a, b) for a, b in zip(pairs, again, strict=True))


def test_jpeg_leaves_a_flat_picture_alone_and_changes_a_noisy_one():
    flat = np.full((230, 240, 3), 90, np.uint8)
    noisy = np.random.default_rng(0).integers(0, 256, flat.shape, dtype=np.uint8)
    setting = {"scale": 1.0, "sigma": 0.0, "min_size": 20}
    pairs = list(agree.with_and_without_jpeg([flat, noisy], setting, 2))
    assert [agree.agreement(*pair).differs for pair in pairs] == [False, True]
    crops = list(agree.training_crops([flat, noisy], 3))
    assert [index for index, _, _ in crops] == [0, 1, 0]
    np.testing.assert_array_equal(pairs[1][1], agree.felzenszwalb(crops[1][2], **setting))


@pytest.mark.parametrize(
    ("size", "shape"), [((600, 400), (224, 336)), ((451, 300), (224, 336)), ((300, 451), (336, 224))]
)
def test_stored_pictures_have_a_shorter_side_of_224(size, shape):
    assert agree.stored(Image.new("RGB", size)).shape == (*shape, 3)


@pytest.mark.parametrize("setting", agree.SETTINGS, ids=str)
def test_scikit_image_with_a_stable_argsort_is_ours(setting):
    crop = agree.crops(1)[0][:64, :64]
    labels = agree.stable_scikit(crop, setting)
    np.testing.assert_array_equal(labels, agree.felzenszwalb(crop, **setting))
    assert np.argsort([2, 1]).tolist() == [1, 0]  # put back
    assert agree.others(setting)["float32"](crop).shape == labels.shape


def test_opencv_cuts_an_easy_picture_the_same():
    if agree.opencv_version() is None:
        pytest.skip("needs opencv-contrib-python-headless")
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    theirs = agree.opencv(halves, {"scale": 100.0, "sigma": 0.0, "min_size": 20})
    assert agree.agreement(theirs, np.asarray(halves[..., 0] > 0, dtype=np.int64)).rand == 1


# --- the table and the picture


def fake_run():
    row = {"setting": agree.PAPER, "theirs": "another", "differs": 0.005, "rand": 0.99999, "rand_least": 0.5}
    row |= {"segments_theirs": 18.94, "segments_ours": 20.0, "majority_changed": 0.0}
    row |= {"mean_changed": 0.00001, "mean_numbers_changed": 1.0}
    return {
        "command": "python x.py",
        "commit": "abc",
        "versions": {"scikit-image": "0.26", "numpy": "2.4", "opencv": None},
        "images": 200,
        "side": 224,
        "patch": 16,
        "rows": [row],
    }


def test_table():
    text = superpixels.agreement_table(fake_run())
    expected = "| 224, 0.9, 224 | another | 0.5% | > 0.9999 (0.5000) | 18.9 / 20.0 | 0% | < 0.1% | 100% |"
    assert expected in text.splitlines()
    assert "scikit-image 0.26, NumPy 2.4." in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(columns)) == 1
    assert superpixels.agreement_table(None).startswith("Not counted yet: `python benchmarks/superpixel_agre")


def test_the_stored_run_has_a_table():
    if not agree.RESULT.exists():
        pytest.skip("not counted yet")
    text = superpixels.agreement_table(agree.json.loads(agree.RESULT.read_text()))
    stable = [line for line in text.splitlines() if "stable argsort |" in line]
    assert len(stable) == len(agree.SETTINGS)
    assert all("| 0% | 1 (1) |" in line for line in stable)


def test_picture_marks_borders_and_colours_every_label():
    photo, labels = np.zeros((4, 4, 3), np.uint8), np.array([[0, 0, 1, 1]] * 4)
    lines = (picture.outlined(photo, labels) == picture.LINE).all(axis=-1)
    assert lines.tolist() == [[False, True, True, False]] * 4
    colours = picture.distinct_colours(40)
    assert len(np.unique(colours, axis=0)) == 40
    cell = picture.coloured(np.arange(196).reshape(14, 14) % 3 * 7)
    assert cell.shape == (224, 224, 3)
    assert len(np.unique(cell.reshape(-1, 3), axis=0)) == 3 + 1  # and the white lines
