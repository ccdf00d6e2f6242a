"""Settings of the data: where pairs come from, and which pixels count as belonging together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .._checks import require

KINDS = ("felzenszwalb", "slic", "stored")
ORDERS = ("crop_first", "segment_first")
PATCH_LABELS = ("majority", "mean")
PLACES = ("auto", "workers", "device")
PRECISIONS = ("float64", "float32")
SOURCES = ("scenes", "stamps", "folder")


@dataclass(frozen=True)
class SuperpixelConfig:
    """Pseudo-labels of the superpixel loss (paper Eq. 5-6): how a picture is cut into segments, and where.

    Attributes:
        kind: "felzenszwalb" (the paper), "slic" (scikit-image), or "stored" (label maps beside the pictures
            of a folder).
        scale: felzenszwalb: larger gives fewer, larger segments; the paper takes 224 at 224 x 224 pixels.
        sigma: felzenszwalb: Gaussian pre-smoothing in pixels.
        min_size: felzenszwalb: smallest segment in pixels.
        precision: felzenszwalb: "float64" is exact; "float32" is faster, with rare differences.
        segments: slic: how many segments to start from; small ones are joined, so a picture gets fewer.
        compactness: slic: weight of distance against colour; larger gives squarer segments.
        order: "crop_first" segments the training crop, "segment_first" the stored picture, whose label map is
            then cropped (the release's order). Stored maps are cropped either way.
        patch_label: how pixels vote for a patch's label: "majority", or the release's "mean" of the numbers.
        where: "workers" computes with the other preparation, one thread each; "device" in one call per batch
            on the training device (felzenszwalb with crop_first only); "auto" takes the device if it is a
            GPU and can, else the workers. The labels are the same.
    """

    kind: Literal["felzenszwalb", "slic", "stored"] = "felzenszwalb"
    scale: float = 224.0
    sigma: float = 0.9
    min_size: int = 224
    precision: Literal["float64", "float32"] = "float64"
    segments: int = 100
    compactness: float = 10.0
    order: Literal["crop_first", "segment_first"] = "crop_first"
    patch_label: Literal["majority", "mean"] = "majority"
    where: Literal["auto", "workers", "device"] = "auto"

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "precision": PRECISIONS, "order": ORDERS}
        choices |= {"patch_label": PATCH_LABELS, "where": PLACES}
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"data.superpixels.{name}", f"one of {known}", value)
        for name in ("scale", "sigma", "min_size"):
            value = getattr(self, name)
            good = math.isfinite(value) and value >= 0
            require(good, f"data.superpixels.{name}", "a finite number of at least 0", value)
        require(self.segments >= 1, "data.superpixels.segments", "at least 1", self.segments)
        good = math.isfinite(self.compactness) and self.compactness > 0
        require(good, "data.superpixels.compactness", "a positive number", self.compactness)
        if self.where == "device" and not self.fits_device:
            problem = f"device with kind {self.kind!r} and order {self.order!r}"
            expected = "auto or workers unless kind is 'felzenszwalb' and order 'crop_first'"
            raise ValueError(f"data.superpixels.where: expected {expected}, got {problem}")

    @property
    def fits_device(self) -> bool:
        """Whether a batch of training crops can be segmented in one call."""
        return self.kind == "felzenszwalb" and self.order == "crop_first"


@dataclass(frozen=True)
class DataConfig:
    """Where image-text pairs come from and how they are prepared.

    Attributes:
        source: "scenes" (procedural, no download), "stamps" (Tux Paint stamps under `root`), or "folder"
            (your pictures and captions under `root`).
        root: folder of the source, where it needs one.
        samples: pairs per epoch of the generated sources; a folder has as many as it has pictures.
        seed: of the generated sources.
        crop_area: smallest and largest area share of the random resized crop; (1, 1) switches it off.
        superpixels: the pseudo-labels of the superpixel loss.
        workers: loader processes; 0 loads in the training process.
        cache: keep the prepared samples in memory; only of generated sources without random crops, where a
            sample is the same in every epoch.
    """

    source: Literal["scenes", "stamps", "folder"] = "scenes"
    root: str = ""
    samples: int = 8192
    seed: int = 0
    crop_area: tuple[float, float] = (0.5, 1.0)
    superpixels: SuperpixelConfig = field(default_factory=SuperpixelConfig)
    workers: int = 0
    cache: bool = False

    def __post_init__(self) -> None:
        low, high = self.crop_area
        require(self.source in SOURCES, "data.source", f"one of {SOURCES}", self.source)
        require(0 < low <= high <= 1, "data.crop_area", "0 < smallest <= largest <= 1", self.crop_area)
        require(self.samples > 0, "data.samples", "a positive number", self.samples)
        require(self.workers >= 0, "data.workers", "a number of at least 0", self.workers)
        require(not self.cache or low == 1, "data.cache", "False with random crops (crop_area below 1)", True)
        folder = self.source == "folder"
        drawn = "False with source 'folder', whose captions are drawn anew in every epoch"
        require(not (self.cache and folder), "data.cache", drawn, True)
        kind = self.superpixels.kind
        without = f"felzenszwalb or slic with source {self.source!r}, which stores no segments"
        require(folder or kind != "stored", "data.superpixels.kind", without, kind)
