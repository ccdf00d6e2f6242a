"""Our evaluation and the release's pipeline, rewritten in benchmarks/harness, side by side."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from segclip_fast.evaluation.scoring import Background, effective_threshold, label_affinity
from segclip_fast.evaluation.segmentation import segment_batch
from segclip_fast.evaluation.windows import score_images
from segclip_fast.losses import inverse_temperature
from segclip_fast.model.segclip import ImageFeatures
from segclip_fast.ops._dispatch import force

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import official  # noqa: E402

SAME_LABELS = 0.999  # of the pixels: regions that tie to rounding may change hands


def agreement(labels, expected) -> float:
    return (torch.as_tensor(labels) == torch.as_tensor(expected).long()).double().mean().item()


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether no entry is off by more than `tolerance` of the largest."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# --- models that remember


class Memory:
    """An image encoder that encodes the same windows once only: one window takes ViT-B/16 0.3 s."""

    def __init__(self, model: torch.nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend
        self.known: dict[bytes, ImageFeatures] = {}

    def encode(self, images: torch.Tensor) -> ImageFeatures:
        key = hashlib.sha256(images.contiguous().numpy().tobytes()).digest()
        if key not in self.known:
            with torch.no_grad(), force(self.backend):
                self.known[key] = self.model.encode_image(images)
        return self.known[key]


class Given(torch.nn.Module):
    """A segmenter with label features and temperature as given, in the order of the labels it is asked for.

    `seen` holds what went into its image encoder and what came out, call by call.
    """

    def __init__(self, memory: Memory, features: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.memory, self.features = memory, features
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))
        vision = memory.model.config.vision
        self.image_size, self.patch_size = vision.image_size, vision.patch_size
        self.seen: list[tuple[torch.Tensor, ImageFeatures]] = []

    def tokenize(self, texts):
        return torch.arange(len(texts))[:, None]

    def encode_text(self, tokens):
        return self.features[tokens[:, 0]]

    def encode_image(self, images):
        self.seen.append((images.clone(), self.memory.encode(images)))
        return self.seen[-1][1]


# --- the comparison


def cut(pixels: torch.Tensor, side: int) -> list[torch.Tensor]:
    """The windows (3, S, S) of a resized photo (3, h, w)."""
    boxes = official.boxes(pixels.shape[1], pixels.shape[2], side)
    return [pixels[:, top:bottom, left:right] for top, left, bottom, right in boxes]


@dataclass(frozen=True, eq=False)
class Compared:
    """One vocabulary: what the rewriting found, and what ours did.

    Attributes:
        theirs: of each photo.
        windows: (B, 3, S, S), of all photos, as ours encoded them together.
        scores: (B, L, C) of ours.
        thresholds: (B,) of ours.
        planes: of each photo (1 + C, h, w), averaged over the windows.
        labels: of each photo (H, W).
    """

    theirs: list[official.Trace]
    windows: torch.Tensor
    scores: torch.Tensor
    thresholds: torch.Tensor
    planes: list[torch.Tensor]
    labels: list[np.ndarray]

    def their_windows(self) -> list[official.Scored]:
        return [window for trace in self.theirs for window in trace.windows]


def compare(model: Given, slow: Given, images: Sequence[np.ndarray], threshold: float) -> Compared:
    """Run both; the models share label features and temperature."""
    theirs = [official.trace(slow, image, slow.features, threshold, model.image_size) for image in images]
    maps = score_images(model, images, model.features, Background(threshold))
    image, regions = (
        torch.cat([getattr(found, name) for _, found in model.seen]) for name in ("image", "regions")
    )
    windows = torch.cat([pixels for pixels, _ in model.seen])
    scores = label_affinity(image, regions, model.features, inverse_temperature(model.logit_scale)).detach()
    names = [f"label {i}" for i in range(len(model.features))]
    found = segment_batch(model, images, names, background=True, threshold=threshold)
    return Compared(
        theirs,
        windows,
        scores,
        effective_threshold(scores, threshold),
        [score_map.planes(0, score_map.count) for score_map in maps],
        [segmentation.labels for segmentation in found],
    )


def check(found: Compared) -> None:
    """Windows, scores, thresholds, score maps and labels of ours are those of the rewriting."""
    side = found.windows.shape[-1]
    windows = torch.stack([window for trace in found.theirs for window in cut(trace.pixels, side)])
    assert found.windows.shape == windows.shape
    assert (found.windows - windows).abs().max() < 1e-5  # one grey level is 1.4e-2
    for scores, limit, window in zip(found.scores, found.thresholds, found.their_windows(), strict=True):
        assert same(scores, window.affinity, 1e-3)
        assert float(limit) == pytest.approx(window.threshold, rel=1e-4)
    for planes, labels, trace in zip(found.planes, found.labels, found.theirs, strict=True):
        off = (planes - trace.logits).abs().amax(dim=0) > 1e-3 * trace.logits[1:].max()
        assert off.double().mean() <= 1 - SAME_LABELS
        assert agreement(labels, trace.labels) >= SAME_LABELS
