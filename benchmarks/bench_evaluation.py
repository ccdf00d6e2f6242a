"""Zero-shot evaluation of photos with masks: the release's pipeline, photo by photo, against ours.

`pytest benchmarks/bench_evaluation.py --benchmark-only`. Label maps and mean IoU are compared before anything
is timed. Photos and made-up masks are in memory, label features are given: no files and no text tower. Both
start from uint8 pixels and end with the mean IoU.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from harness import official
from harness.gate import full_precision
from harness.models import model
from harness.pictures import photo_paths
from harness.rivals import Plan, Rival, compare, enter, timed
from harness.rivals import Result as Timed
from harness.settings import CUDA, DEVICE, SMOKE
from PIL import Image

from segclip_fast.data.sample import IGNORE_LABEL, RawSample
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.evaluation.segmentation import segment_batch
from segclip_fast.evaluation.vocabularies import VOC
from segclip_fast.ops import felzenszwalb
from segclip_fast.ops._dispatch import force

pytestmark = timed
COUNT = 2 if SMOKE else 16
SHAPES = ((375, 500), (333, 500), (375, 500), (500, 375))  # as VOC has them
CLASSES = len(VOC.names)
ALONE = "official, fast encoder"  # the release's pipeline on our encoder: what our pipeline alone is worth
RIVALS = ("reference", ALONE, "fast", *(["fast bf16"] if CUDA else []))
# Share of pixels that may differ. In fp32 regions tie to rounding; in bf16 1 % of the patches change region.
FLIPS = {"fp32": 0.001, "bf16": 0.05}
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05}  # of the mean IoU, relative


class Labelled(torch.nn.Module):
    """The model under measurement with label features (C, E) as given, in the order of its labels."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.model, self.features = model().eval(), features
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(100.0), device=DEVICE))
        self.image_size, self.patch_size = self.model.image_size, self.model.patch_size

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.arange(len(texts))[:, None]

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.features[tokens[:, 0]]

    def encode_image(self, images: torch.Tensor) -> object:
        with full_precision():  # rounding in the first convolution would move pixels between regions
            return self.model.encode_image(images)


class Source:
    """The photos and their masks."""

    class_names = VOC.names

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> RawSample:
        return RawSample(photos()[index], "", mask=masks()[index])


@functools.cache
def photos() -> tuple[np.ndarray, ...]:
    """(H, W, 3) uint8 crops of photographs, the same every time; blocky random ones where there are none."""
    random = np.random.default_rng(0)
    whole = [np.asarray(Image.open(path).convert("RGB")) for path in photo_paths()]
    found = []
    for i in range(COUNT):
        height, width = SHAPES[i % len(SHAPES)]
        fitting = [photo for photo in whole if photo.shape[0] >= height and photo.shape[1] >= width]
        if not fitting:
            blocks = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
            fitting = [blocks.repeat(16, axis=0).repeat(16, axis=1)]
        photo = fitting[i % len(fitting)]
        top, left = (
            int(random.integers(0, n - m + 1)) for n, m in zip(photo.shape, (height, width), strict=False)
        )
        found.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return tuple(found)


@functools.cache
def masks() -> tuple[np.ndarray, ...]:
    """(H, W) int64: superpixels numbered as classes over and over, one in 22 of them not counted."""
    found = []
    for photo in photos():
        try:
            labels = felzenszwalb(photo, scale=100.0, sigma=0.8, min_size=20)
        except ImportError:
            rows, columns = (np.arange(side) // 32 for side in photo.shape[:2])
            labels = rows[:, None] * 7 + columns
        labels = np.asarray(labels).astype(np.int64) % (CLASSES + 1)
        found.append(np.where(labels == CLASSES, IGNORE_LABEL, labels))
    return tuple(found)


@functools.cache
def labelled() -> Labelled:
    """The model with label features that thresholds and the filter of likely labels work on."""
    regions = []
    with torch.no_grad(), full_precision(), force("reference"):
        for photo in photos():
            pixels = official.normalised(official.resized(photo))
            for top, left, bottom, right in official.boxes(*pixels.shape[1:]):
                window = pixels[None, :, top:bottom, left:right].to(DEVICE)
                regions.append(model().eval().encode_image(window).regions[0])
    return Labelled(official.planted_features(torch.cat(regions), CLASSES - 1).to(DEVICE))


def values(labels: Sequence[object], miou: float) -> dict[str, torch.Tensor]:
    """What the gate compares."""
    flat = [torch.as_tensor(found).flatten() for found in labels]
    return {"labels": torch.cat(flat), "mean IoU": torch.tensor([miou], dtype=torch.float64)}


@functools.cache
def their_values(scope: str) -> dict[str, torch.Tensor]:
    """What the release's pipeline finds; `scope` says which implementations serve the encoder."""
    segmenter = labelled()
    with force(scope):
        labels = [
            official.label_map(segmenter, photo, segmenter.features, VOC.threshold) for photo in photos()
        ]
    found = values(labels, official.mean_iou(zip(labels, masks(), strict=True), CLASSES))
    assert len(found["labels"].unique()) > 2, "nothing to tell apart"
    return found


def theirs(scope: str) -> Rival:
    """The release's pipeline."""
    segmenter = labelled()
    pairs = list(zip(photos(), masks(), strict=True))

    def call(_: int = 0) -> float:
        with force(scope):
            return official.evaluate(segmenter, pairs, segmenter.features, CLASSES, VOC.threshold)

    return Rival(call, functools.partial(their_values, scope))


def ours(precision: str) -> Rival:
    """`evaluate_source`, all photos at once."""
    options = {"background": True, "precision": precision}

    def call(_: int = 0) -> float:
        return evaluate_source(labelled(), Source(), labels=VOC.labels, batch_size=16, **options).miou

    def found() -> dict[str, torch.Tensor]:
        maps = segment_batch(labelled(), photos(), VOC.labels, **options)
        return values([result.labels for result in maps], call())

    return Rival(call, found)


@functools.lru_cache(maxsize=1)
def evaluated() -> dict[str, object]:
    """All rivals; bf16 has a gate of its own, and meets the reference once more."""
    pixels = sum(photo.shape[0] * photo.shape[1] for photo in photos())
    exact = functools.partial(their_values, "reference")

    def plan(precision: str) -> Plan:
        flips = int(FLIPS[precision] * pixels)
        return Plan(TOLERANCES[precision], rounds=5, seconds=0.0, flips_allowed=flips)

    makers: dict[str, Callable[[], Rival]] = {
        "reference": functools.partial(theirs, "reference"),
        ALONE: functools.partial(theirs, "auto"),
        "fast": functools.partial(ours, "fp32"),
    }
    results = compare(makers, exact, plan("fp32"))
    if CUDA:
        again = {"reference": makers["reference"], "fast bf16": functools.partial(ours, "bf16")}
        results["fast bf16"] = compare(again, exact, plan("bf16"))["fast bf16"]
    return results


@pytest.mark.parametrize("rival", RIVALS)
def test_evaluation(benchmark, rival):
    result = evaluated()[rival]
    rate = COUNT / statistics.median(result.samples) if isinstance(result, Timed) else None
    enter(
        benchmark,
        f"evaluation of {COUNT} photos, {CLASSES} classes",
        evaluated(),
        rival,
        op="evaluation",
        size=f"{COUNT} photos, {CLASSES} classes",
        shape={"B": COUNT},
        dtype="fp32",
        direction="forward",
        images_per_second=rate,
    )
