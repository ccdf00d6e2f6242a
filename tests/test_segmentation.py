"""Photo and labels to a `Segmentation`, with a model that sees plain colours: every answer is known."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_windows import COLOURS, GREY, WORDS, ColourModel, painted
from torch import nn

from segclip_fast.evaluation import segmentation
from segclip_fast.evaluation.prompts import PromptBank, check_labels, encode_labels, split_labels
from segclip_fast.evaluation.refine import snap_to_superpixels, superpixel_scores
from segclip_fast.evaluation.score_map import ScoreMap
from segclip_fast.evaluation.segmentation import Segmentation, distinct_colours, segment, segment_batch
from segclip_fast.evaluation.vocabularies import VOCABULARIES


@pytest.fixture
def model():
    return ColourModel()


# --- labels of known photos


def test_finds_the_colours(model):
    photo = painted(COLOURS["red"], COLOURS["blue"], COLOURS["green"], COLOURS["red"])
    result = segment(model, photo, ["green", "blue", "red"])
    assert result.labels.dtype == np.int64
    assert result.scores.dtype == np.float32
    assert result.regions.dtype == np.int64
    assert result.labels.shape == result.scores.shape == result.regions.shape == (64, 128)
    assert result.names == ("green", "blue", "red")
    truth = np.repeat(np.repeat([2, 1, 0, 2], 32)[None], 64, axis=0)
    assert (result.labels == truth).mean() > 0.95  # borders move by part of a patch
    assert (result.labels[:, 16::32] == truth[:, 16::32]).all()
    assert result.scores[:, 16::32].min() > 0.99
    assert result.coverage["red"] == pytest.approx(0.5, abs=0.03)
    assert sum(result.coverage.values()) == pytest.approx(1)


def test_the_photo_keeps_its_size_and_mode_is_restored(model):
    model.train()
    result = segment(model, painted(COLOURS["red"], COLOURS["blue"], size=77, height=41), ["red", "blue"])
    assert result.labels.shape == (41, 154)
    assert model.training


def test_background_by_threshold(model):
    photo = painted(COLOURS["red"], GREY, COLOURS["blue"])
    result = segment(model, photo, ["red", "blue"], background=True)
    assert result.names == ("background", "red", "blue")
    assert result.labels[32, [16, 48, 80]].tolist() == [1, 0, 2]
    without = segment(model, photo, ["red", "blue"], background=True, threshold=0.0)
    assert without.coverage["background"] == 0
    assert segment(model, photo, ["red", "blue"]).names == ("red", "blue")


def test_threshold_adapts_to_the_window(model):
    """A window of nothing but grey is never all background: its best region stays (protocol step 5)."""
    result = segment(model, painted(GREY), ["red", "blue"], background=True)
    assert result.coverage["background"] == 0
    paper = segment(model, painted(GREY), ["red", "blue"], background=True, protocol="paper")
    assert paper.coverage["background"] == 1


def test_background_by_name(model):
    photo = painted(COLOURS["red"], COLOURS["white"], COLOURS["blue"])
    result = segment(model, photo, ["red"], background=["blue", "white"])
    assert result.names == ("background", "red")
    assert result.labels[32, [16, 48, 80]].tolist() == [1, 0, 0]


def test_paper_protocol(model):
    photo = painted(COLOURS["red"], COLOURS["blue"])
    result = segment(model, photo, ["red", "blue"], protocol="paper")
    assert (result.labels == np.repeat([0, 1], 32)).mean() > 0.97


def test_one_label_with_a_threshold_is_told(model, caplog):
    result = segment(model, painted(GREY), ["red"], background=True)
    assert "'red'" in caplog.text
    assert result.coverage == {"background": 0.0, "red": 1.0}


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (2, 500), (3, 5), (33, 31)], ids=str)
@pytest.mark.parametrize("protocol", ["official", "paper"])
@pytest.mark.parametrize("snap", [False, True], ids=["", "snap"])
def test_extreme_shapes(model, shape, protocol, snap):
    """A photo 9.14 times longer than wide has windows below the crop; the model asserts whole patches."""
    photo = np.full((*shape, 3), COLOURS["red"], np.uint8)
    result = segment(model, photo, ["blue", "red"], protocol=protocol, snap=snap)
    assert result.labels.shape == shape
    assert (result.labels == 1).all()
    result.overlay()
    result.region_image()


def test_batch_is_each_photo_alone(model):
    photos = [
        painted(COLOURS["red"], COLOURS["blue"], size=n, height=h) for n, h in [(16, 32), (64, 20), (9, 100)]
    ]
    together = segment_batch(model, photos, ["red", "blue"], background=True)
    for photo, result in zip(photos, together, strict=True):
        alone = segment(model, photo, ["red", "blue"], background=True)
        assert (result.labels == alone.labels).all()
        assert (result.scores == alone.scores).all()
        assert (result.regions == alone.regions).all()
    assert segment_batch(model, [], ["red"]) == []


def test_options_reach_the_windows(model):
    segment(model, painted(COLOURS["red"]), ["red"], short_side=64)  # 64 x 128: 2 x 4 windows
    assert model.windows == [(8, 3, 32, 32)]
    model.windows.clear()
    segment(model, painted(COLOURS["red"]), ["red"], short_side=64, stride=16)
    assert model.windows == [(21, 3, 32, 32)]  # 3 x 7


def test_regions_are_numbered_from_zero(model):
    result = segment(model, painted(COLOURS["red"], COLOURS["blue"], COLOURS["red"]), ["red"])
    found = np.unique(result.regions)
    assert found.tolist() == list(range(len(found)))
    assert len(np.unique(result.regions[32, [4, 48]])) == 2
    turned = segment(model, result.image.transpose(1, 0, 2), ["red"])
    assert len(np.unique(turned.regions[[4, 48], 32])) == 2


# --- refusals


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels: expected at least one non-empty string, got []"),
        ((), "labels: expected at least one non-empty string, got ()"),
        (["cat", "  "], "labels: expected non-empty strings, got '  ' at position 1"),
        (["cat", " Cat "], "labels: expected distinct labels, got 'cat' and ' Cat '"),
        ("cat", "labels: expected a list or tuple of strings, got str; did you mean labels=['cat']?"),
        (["cat", 3], "labels: expected strings, got int at position 1"),
        (None, "labels: expected a list or tuple of strings, got NoneType"),
    ],
    ids=repr,
)
def test_labels_refused(model, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        segment(model, painted(GREY), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5}, "threshold: expected None unless background=True, got 0.5"),
        ({"threshold": 1.5, "background": True}, "threshold: expected a number from 0 to 1, got 1.5"),
        ({"templates": []}, "templates: expected a list or tuple of at least one string, got []"),
        (
            {"templates": ["a photo"]},
            "templates: expected strings with {} where the label goes, got 'a photo'",
        ),
        ({"templates": "a {}"}, "templates: expected a list or tuple of at least one string, got 'a {}'"),
        ({"stride": 33}, "stride: expected 1 to 32 (the window side), got 33"),
        ({"stride": 0}, "stride: expected 1 to 32 (the window side), got 0"),
        ({"short_side": 0}, "short_side: expected a positive number of pixels, got 0"),
        ({"protocol": "ours"}, "protocol: expected one of official, paper, got 'ours'"),
        ({"background": ["Red"]}, "labels: expected distinct labels, got 'red' and 'Red'"),
        ({"background": []}, "background: expected at least one non-empty string, got []"),
    ],
    ids=str,
)
def test_options_refused(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        segment(model, painted(GREY), ["red"], **options)


def test_background_is_no_label_beside_background(model):
    with pytest.raises(ValueError, match="labels: expected no 'background' among them"):
        segment(model, painted(GREY), ["red", "Background"], background=True)
    assert segment(model, painted(GREY), ["red", "background"]).names == ("red", "background")


# --- prompts


def test_split_labels():
    assert split_labels(" cat, potted plant ,sofa,") == ("cat", "potted plant", "sofa")
    assert check_labels(["a  b", " c"]) == ("a  b", "c")
    for text in ("", " ", ","):
        with pytest.raises(ValueError, match="--labels: expected"):
            split_labels(text, "--labels")


def test_label_features_are_cached_until_the_model_changes(model):
    first = encode_labels(model, ["red", "blue"])
    assert encode_labels(model, ("red", " blue")) is first
    assert len(model.prompts) == 2
    encode_labels(model, ["blue", "red"])
    assert len(model.prompts) == 4
    with torch.no_grad():
        model.words.mul_(torch.linspace(1, 2, len(WORDS)))
    encode_labels(model, ["red", "blue"])
    assert len(model.prompts) == 6
    other = ColourModel()
    encode_labels(other, ["red", "blue"])
    assert len(other.prompts) == 2


def test_the_bank_forgets_the_oldest(model):
    bank = PromptBank()
    for i in range(40):
        bank.encode(model, [f"thing {i}"])
    bank.encode(model, ["thing 39"])
    assert len(model.prompts) == 40
    bank.encode(model, ["thing 0"])
    assert len(model.prompts) == 41
    bank.clear()
    bank.encode(model, ["thing 0"])
    assert len(model.prompts) == 42


def test_templates_are_averaged_before_normalising(model):
    with torch.no_grad():
        model.words[WORDS.index("red")] *= 5
    found = encode_labels(model, ["x"], ["red {}", "blue {}"])
    mean = torch.zeros(len(WORDS))
    mean[WORDS.index("red")], mean[WORDS.index("blue")] = 5, 1
    torch.testing.assert_close(found, nn.functional.normalize(mean, dim=0)[None])
    assert model.prompts == ["red x", "blue x"]


def test_vocabularies():
    assert {name: len(v.names) for name, v in VOCABULARIES.items()} == {
        "voc": 21,
        "context": 60,
        "coco_object": 81,
    }
    for vocabulary in VOCABULARIES.values():
        assert check_labels(vocabulary.names) == vocabulary.names
        assert vocabulary.names == ("background", *vocabulary.labels)


# --- superpixel snapping


def test_snap_takes_the_best_mean_score():
    scores = np.zeros((2, 2, 4), np.float32)
    scores[0], scores[1, :, 3] = 0.4, 1.0  # label 1 is best in the last column only
    superpixels = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert snap_to_superpixels(scores, superpixels).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match="superpixels: expected shape"):
        snap_to_superpixels(scores, superpixels[:1])
    with pytest.raises(ValueError, match="superpixels: expected numbers from 0, got -1"):
        snap_to_superpixels(scores, superpixels - 1)


@pytest.mark.parametrize("max_floats", [1, 2**20])
def test_superpixel_means_equal_the_dense_ones(max_floats):
    torch.manual_seed(0)
    scores = ScoreMap(torch.rand(7, 5), torch.randint(7, (6, 9)), torch.zeros(6, 9, dtype=torch.int64))
    superpixels = np.random.default_rng(0).integers(0, 11, (25, 14))
    means, ids = superpixel_scores(scores, superpixels, max_floats)
    dense = nn.functional.interpolate(scores.dense()[None], (25, 14), mode="bilinear")[0]
    for s in range(11):
        torch.testing.assert_close(means[s], dense[:, superpixels == s].mean(1), atol=1e-6, rtol=1e-5)
    assert (means.argmax(1)[ids].numpy() == snap_to_superpixels(dense, superpixels)).all()


def test_snapping_follows_the_edges(model):
    y, x = np.mgrid[:192, :192]
    red = x > y // 2 + 40  # a slanted edge, which patches cannot follow
    photo = np.where(red[..., None], COLOURS["red"], COLOURS["blue"]).astype(np.uint8)
    plain = segment(model, photo, ["blue", "red"])
    snapped = segment(model, photo, ["blue", "red"], snap=True)
    assert (snapped.labels != red).mean() < 0.6 * (plain.labels != red).mean()


# --- pictures and files


@pytest.fixture
def result(model):
    photo = painted(COLOURS["red"], GREY, COLOURS["blue"], size=64, height=128)
    return segment(model, photo, ["red", "blue", "green"], background=True)


def test_overlay(result):
    plain = np.asarray(result.overlay(legend=False))
    assert plain.shape == result.image.shape
    assert (plain[64, 96] == result.image[64, 96]).all()  # background is not painted
    expected = 0.45 * result.image[64, 32] + 0.55 * result.colours[1]
    assert np.abs(plain[64, 32] - expected).max() <= 1
    with_legend = result.overlay()
    assert with_legend.height > 128
    assert with_legend.width >= 192
    strip = np.asarray(with_legend)[128:].reshape(-1, 3)
    for present, colour in zip([True, True, False], result.colours[1:], strict=True):
        assert (strip == colour).all(1).any() == present  # the legend names what is there
    assert (np.asarray(result.overlay(alpha=1, legend=False))[64, 32] == result.colours[1]).all()


def test_overlay_of_many_long_names():
    names = tuple(f"a rather long name of a label number {i}" for i in range(300))
    labels = np.arange(300).reshape(10, 30)
    full = Segmentation(labels, np.ones((10, 30), np.float32), labels, names, np.zeros((10, 30, 3), np.uint8))
    assert full.overlay().width > 30
    with pytest.raises(ValueError, match="names: expected at most 256 for a PNG"):
        full.label_image()


def test_overlay_refusals(result):
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1, got 2"):
        result.overlay(alpha=2)
    bare = Segmentation(result.labels, result.scores, result.regions, result.names)
    with pytest.raises(ValueError, match="overlay: expected a segmentation that holds its photo"):
        bare.overlay()


def test_save(result, tmp_path):
    result.save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.mode == "P"
        assert (np.asarray(picture) == result.labels).all()
        assert (np.asarray(picture.convert("RGB"))[64, 32] == result.colours[1]).all()
    result.save(str(tmp_path / "out.npy"))
    assert (np.load(tmp_path / "out.npy") == result.labels).all()
    for name in ("out.jpg", "out", "out.PNG.txt"):
        with pytest.raises(ValueError, match=re.escape("path: expected a file name ending in .png or .npy")):
            result.save(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_region_image(result):
    picture = np.asarray(result.region_image())
    assert picture.shape == result.image.shape
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == len(np.unique(result.regions))


def test_colours_are_distinct_and_stable():
    colours = distinct_colours(24).astype(int)
    assert (distinct_colours(5) == colours[:5]).all()
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e3 * np.eye(24)
    assert distance[:10, :10].min() > 80
    assert distance.min() > 60
    assert distinct_colours(0).shape == (0, 3)


def test_small_real_model():
    from segclip_fast import SegCLIP
    from segclip_fast.config import preset

    torch.manual_seed(0)
    model = SegCLIP(preset("scenes_tiny"))
    photo = np.random.default_rng(0).integers(0, 256, (50, 300, 3), dtype=np.uint8)
    words = list(model.config.text.vocabulary[:3])
    result = model.segment(photo, words, background=True)
    assert result.labels.shape == (50, 300)
    assert result.names == ("background", *words)
    again = segmentation.segment(model, Image.fromarray(photo), words, background=True)
    assert (again.labels == result.labels).all()
    both = model.segment_batch([photo, photo[:, :80]], [words, words[:2]], background=True)
    assert (both[0].labels == result.labels).all()
    assert both[1].names == ("background", *words[:2])
    assert model.training
