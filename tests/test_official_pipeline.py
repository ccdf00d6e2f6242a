"""The pipeline of the release, rewritten step by step in benchmarks/harness, and ours against it.

The rewriting is compared with the authors' stored outputs first, then ours with the rewriting: on photos and
vocabularies that the stored outputs do not have, and with label features made of region features, for which
thresholds and the filter of likely labels decide.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden, golden_model, requires_golden
from official_cases import (
    SAME_LABELS,
    Compared,
    Given,
    Memory,
    agreement,
    check,
    compare,
    cut,
    official,
    same,
)
from PIL import Image
from reporting import performance, tables
from small import small_model

from segclip_fast.data.images import resize_bilinear_uint8
from segclip_fast.data.sample import RawSample
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.evaluation.metric import ConfusionMatrix
from segclip_fast.evaluation.prompts import encode_labels
from segclip_fast.evaluation.segmentation import segment_batch
from segclip_fast.evaluation.vocabularies import VOCABULARIES


@functools.cache
def real_model() -> torch.nn.Module:
    return golden_model()


@functools.cache
def memory(backend: str) -> Memory:
    return Memory(real_model(), backend)


# --- the rewriting against the stored outputs

STORED = [(text, photo) for text in ("prompts", "planted") for photo in ("astronaut", "chelsea")]


@pytest.mark.golden
@requires_golden
@pytest.mark.parametrize(("text", "photo"), STORED)
def test_the_rewriting_is_the_release(text, photo):
    file = golden("evaluation_voc.pt")
    part, image = file["voc"][text], file["images_rgb"][photo].numpy()
    labels, expected = part["text_embedding"], part["images"][photo]
    model = Given(memory("reference"), labels, math.exp(part["logit_scale"]))
    found = official.trace(model, image, labels, file["voc"]["test_cfg"]["bg_thresh"])
    assert len(model.seen) == 2 * len(found.windows)
    assert (found.pixels - expected["img"][0]).abs().max() < 1e-5  # one grey level is 1.4e-2
    assert [list(window.box) for window in found.windows] == [c["box_yxyx"] for c in expected["crops"]]
    for window, crop in zip(found.windows, expected["crops"], strict=True):
        assert same(window.affinity, crop["group_affinity"], 1e-3)
        assert window.threshold == pytest.approx(crop["bg_thresh_effective"], rel=1e-4)
        assert (window.regions != crop["group_index"]).sum() <= crop["near_tie_pixels"]
    assert agreement(found.labels, expected["label_map"]) >= SAME_LABELS


# --- ours against the rewriting

CASES = [(names, text) for names in VOCABULARIES for text in ("prompts", "planted")]
cases = pytest.mark.parametrize(("names", "text"), CASES)
REAL_SCALE = math.exp(4.0)
# With these, best scores lie on either side of the vocabularies' thresholds.
PLANTED_SCALE = {"voc": 30.0, "context": 20.0, "coco_object": 50.0}


@functools.cache
def pictures() -> dict[str, np.ndarray]:
    """The photographs that come with scikit-image, (H, W, 3) uint8."""
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    files = ("coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "astronaut.png", "ihc.png")
    return {name.split(".")[0]: np.asarray(Image.open(folder / name).convert("RGB")) for name in files}


@functools.cache
def photos() -> tuple[np.ndarray, ...]:
    """To be enlarged and reduced, wide and tall; none whose fifth and sixth prompt tie to rounding."""
    found = pictures()
    crops = (found["rocket"][20:, 100:], found["retina"][:, 700:1100], found["rocket"][100:270])
    return (found["coffee"], found["motorcycle_left"], *map(np.ascontiguousarray, crops))


@functools.cache
def text_side(names: str, text: str) -> tuple[torch.Tensor, float]:
    """Label features (C, E) of a vocabulary, and the inverse temperature that goes with them."""
    labels = VOCABULARIES[names].labels
    if text == "prompts":
        return encode_labels(real_model(), labels), REAL_SCALE
    return official.planted_features(known_regions(photos()), len(labels)), PLANTED_SCALE[names]


def known_regions(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Region features (., E) of all windows."""
    windows = [w for image in images for w in cut(official.normalised(official.resized(image)), 224)]
    return torch.cat([memory("reference").encode(window[None]).regions[0] for window in windows])


@functools.cache
def compared(names: str, text: str) -> Compared:
    model, slow = (Given(memory(backend), *text_side(names, text)) for backend in ("auto", "reference"))
    return compare(model, slow, photos(), VOCABULARIES[names].threshold)


@pytest.mark.golden
@requires_golden
@cases
def test_ours_is_the_rewriting(names, text):
    check(compared(names, text))


@pytest.mark.golden
@requires_golden
@pytest.mark.parametrize("names", VOCABULARIES)
def test_planted_features_let_every_rule_decide(names, monkeypatch):
    """Otherwise the comparison above would not notice a rule that is missing."""
    found, limit = compared(names, "planted"), VOCABULARIES[names].threshold
    thresholds = [window.threshold for window in found.their_windows()]
    assert any(threshold == limit for threshold in thresholds)
    assert any(threshold < limit for threshold in thresholds)
    assert max(len(trace.labels.unique()) for trace in found.theirs) >= 4
    monkeypatch.setattr(official, "LIKELY", len(VOCABULARIES[names].labels))  # no filter of likely labels
    slow = Given(memory("reference"), *text_side(names, "planted"))
    unfiltered = [official.label_map(slow, photo, slow.features, limit) for photo in photos()[:2]]
    assert min(map(agreement, unfiltered, (trace.labels for trace in found.theirs))) < 0.95


@pytest.mark.slow
@pytest.mark.golden
@requires_golden
def test_ours_is_the_rewriting_on_many_crops():
    random = np.random.default_rng(0)
    crops = []
    for i in range(12):
        photo = list(pictures().values())[i % len(pictures())]
        height, width = (int(random.integers(150, side + 1)) for side in photo.shape[:2])
        top, left = (
            int(random.integers(0, n - m + 1)) for n, m in zip(photo.shape, (height, width), strict=False)
        )
        crops.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    features = official.planted_features(known_regions(crops), 59)
    model, slow = (Given(memory(backend), features, 30.0) for backend in ("auto", "reference"))
    check(compare(model, slow, crops, 0.5))


# --- without the authors' weights

SIZES = [(40, 50), (32, 32), (33, 96), (70, 31), (17, 64), (128, 90)]


def small_pair(labels: int, scale: float = 60.0) -> tuple[Given, Given]:
    """A small model with windows of 32 pixels, for ours and for the rewriting."""
    torch.manual_seed(1)
    model = small_model().eval()
    windows = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        regions = model.encode_image(windows).regions.flatten(0, 1)
    features = official.planted_features(regions, labels)
    return Given(Memory(model, "auto"), features, scale), Given(Memory(model, "reference"), features, scale)


def random_photos(count: int = len(SIZES)) -> list[np.ndarray]:
    """Smooth colours, of different sizes."""
    random = np.random.default_rng(3)
    found = []
    for height, width in SIZES[:count]:
        coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        found.append(resize_bilinear_uint8(coarse, (height, width)))
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [1, 3, 5, 6, 30])
def test_small_models(labels, threshold):
    check(compare(*small_pair(labels), random_photos(), threshold))


@pytest.mark.parametrize("labels", [2, 12])
def test_without_background(labels):
    model, slow = small_pair(labels)
    found = segment_batch(model, random_photos(), [f"label {i}" for i in range(labels)])
    for photo, result in zip(random_photos(), found, strict=True):
        trace = official.trace(slow, photo, slow.features, None, 32)
        assert trace.logits.shape[0] == labels
        assert trace.windows[0].threshold is None
        assert agreement(result.labels, trace.labels) >= SAME_LABELS


class Source:
    """Photos with made-up labels in memory."""

    def __init__(self, photos: list[np.ndarray], masks: list[np.ndarray], classes: int) -> None:
        self.photos, self.masks = photos, masks
        self.class_names = ("background", *(f"label {i}" for i in range(1, classes)))

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        return RawSample(self.photos[index], "", mask=self.masks[index])


def test_the_metric_of_ours_is_the_releases():
    model, slow = small_pair(7)
    images = random_photos()
    masks = [np.random.default_rng(i).integers(0, 8, image.shape[:2]) for i, image in enumerate(images)]
    masks[0][:10] = 255
    found = evaluate_source(model, Source(images, masks, 8), threshold=0.3, batch_size=4)
    expected = official.evaluate(slow, zip(images, masks, strict=True), slow.features, 8, 0.3, side=32)
    assert found.miou == pytest.approx(expected, abs=1e-3)
    assert 0 < expected < 1


# --- the rewriting's parts


def test_classes_that_do_not_occur_are_not_counted():
    random = np.random.default_rng(0)
    truth = [random.integers(0, 4, (9, 11)) for _ in range(3)]
    labels = [torch.from_numpy(random.integers(0, 5, (9, 11))) for _ in range(3)]
    truth[1][2:5] = 255
    matrix = ConfusionMatrix(7)
    for found, mask in zip(labels, truth, strict=True):
        matrix.update(found, mask)
    assert np.isnan(matrix.result().iou[5:]).all()
    expected = official.mean_iou(zip(labels, truth, strict=True), 7)
    assert matrix.result().miou == pytest.approx(expected, rel=1e-12)


def test_resize_without_opencv_is_the_same(monkeypatch):
    pytest.importorskip("cv2")
    photo = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    expected = official.resized(photo)
    assert expected.shape == (224, 305, 3)
    monkeypatch.setattr(official, "cv2", None)
    assert np.array_equal(official.resized(photo), expected)


def test_a_photo_too_long_for_the_release_is_refused():
    with pytest.raises(ValueError, match=r"photo: expected sides within 9\.14 of each other, got 10 x 100"):
        official.resized(np.zeros((10, 100, 3), dtype=np.uint8))


def test_windows_by_hand():
    assert official.boxes(224, 224) == [(0, 0, 224, 224)]
    assert official.boxes(224, 337) == [(0, 0, 224, 224), (0, 113, 224, 337)]
    assert official.boxes(449, 224) == [(0, 0, 224, 224), (224, 0, 448, 224), (225, 0, 449, 224)]


def test_background_by_hand():
    regions = torch.tensor([[0, 1], [2, 2]])
    affinity = torch.tensor([[0.5, 0.1], [0.2, 0.3], [0.0, 0.4]])
    logits, limit = official.window_logits(regions, affinity, 0.35)
    assert limit == 0.35
    assert logits[0, 0].tolist() == [[0, 1], [0, 0]]
    assert torch.equal(logits[0, 1:, 1, 0], affinity[2])
    logits, limit = official.window_logits(regions, affinity, 0.9)  # never above the window's best
    assert limit == 0.5
    assert logits[0, 0].tolist() == [[0, 1], [1, 1]]


# --- the benchmark's entries


def entry(rival, median, rate):
    facts = {"op": "evaluation", "size": "16 photos, 21 classes", "dtype": "fp32", "direction": "forward"}
    return {
        **facts,
        "rival": rival,
        "median_ms": median,
        "shape": {"B": 16},
        "peak_bytes": 5e6,
        "images_per_second": rate,
        "absent": {},
    }


def test_the_report_shows_the_evaluation():
    entries = [entry("reference", 8000.0, 2.0), entry("official, fast encoder", 6000.0, 2.667)]
    entries += [entry("fast", 3200.0, 5.0), entry("fast bf16", 1600.0, 10.0)]
    run = {"command": "c", "cpu": "A CPU", "threads": 2, "commit": "abc", "benchmarks": entries}
    text = tables.ops_table(run, "x.json")
    assert "| evaluation | 16 photos, 21 classes, fp32 | 8000 | - | 3200 | 2.50x | 5.00 / 5.00 |" in text
    assert (
        "- Images per second, evaluation of 16 photos, 21 classes: the release's pipeline 2.00, the same on "
        "the fast encoder 2.67, the fast path 5.00, the fast path in bf16 10.0\n" in text
    )
    assert "Not used by" not in text
    assert "| evaluation | 16 photos, 21 classes, fp32 | forward |" in performance.floor_tables(
        {"x.json": run}
    )
