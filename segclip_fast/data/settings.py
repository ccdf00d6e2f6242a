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
GENERATED = ("scenes", "stamps")
DATASET_TYPES = ("auto", "webdataset", "csv", "coco", "folder", *GENERATED, "synthetic")
BETWEEN = "::"  # several sources in one string, as in open_clip


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
        cache: folder that keeps the label maps of stored pictures over epochs and runs ("segment_first"
            only; the labels are the same); empty for none.
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
    cache: str = ""

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
        reusable = self.order == "segment_first" and self.kind != "stored"
        kept = (
            "empty unless order is 'segment_first' and segments are computed: random crops do not come back"
        )
        require(reusable or not self.cache, "data.superpixels.cache", kept, self.cache)
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
        dataset_type: what `train_data` is: "webdataset" (tar shards), "csv" (a table, also TSV), "coco"
            (caption annotations, official or Karpathy's), "folder" (a text file beside every picture);
            "auto" tells them by their form. Or "scenes" (procedural, no files), "stamps" (composed of the
            Tux Paint stamps under `train_data`), "synthetic" (random pictures from memory, to time a step).
        train_data: path or pattern of the pairs; several with `::` between them.
        train_data_upsampling_factors: how often each of several sources is shown per pass, such as
            "1::0.5"; empty shows all pairs of all sources once.
        train_num_samples: pairs per epoch; 0 for as many as there are (8192 where they are generated).
        csv_img_key: column of a table with the picture's path.
        csv_caption_key: column with the caption.
        csv_separator: of its fields; empty takes a tab if the first row has one, else a comma.
        images: folder of the pictures of COCO's annotations.
        split: Karpathy's split; empty takes train.
        restval: add Karpathy's restval to it.
        one_per_image: COCO: every picture is one sample and training draws among its captions; else every
            caption is a sample, as in the release.
        check_files: look for every picture of tables and annotations before training.
        index_folder: where index files of shards go; empty for beside them.
        max_pixels: larger pictures are left out before they are decoded.
        max_damaged: share of damaged samples among those shown (counted as if at least 1,000 had been)
            above which the run stops.
        seed: of the generated sources and the mixture of several.
        crop_area: smallest and largest area share of the random resized crop; (1, 1) switches it off.
        superpixels: the pseudo-labels of the superpixel loss.
        workers: loader processes of each training process; 0 loads in the training process.
        cache: keep the prepared samples in memory; only of generated sources without random crops, where a
            sample is the same in every epoch.
    """

    dataset_type: Literal["auto", "webdataset", "csv", "coco", "folder", "scenes", "stamps", "synthetic"] = (
        "auto"
    )
    train_data: str = ""
    train_data_upsampling_factors: str = ""
    train_num_samples: int = 0
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str = ""
    images: str = ""
    split: str = ""
    restval: bool = False
    one_per_image: bool = False
    check_files: bool = True
    index_folder: str = ""
    max_pixels: int = 64_000_000
    max_damaged: float = 0.1
    seed: int = 0
    crop_area: tuple[float, float] = (0.5, 1.0)
    superpixels: SuperpixelConfig = field(default_factory=SuperpixelConfig)
    workers: int = 0
    cache: bool = False

    def __post_init__(self) -> None:
        low, high = self.crop_area
        kinds = f"one of {DATASET_TYPES}"
        require(self.dataset_type in DATASET_TYPES, "data.dataset_type", kinds, self.dataset_type)
        require(0 < low <= high <= 1, "data.crop_area", "0 < smallest <= largest <= 1", self.crop_area)
        for name in ("train_num_samples", "workers", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name}", "a number of at least 0", value)
        require(self.max_pixels > 0, "data.max_pixels", "a positive number", self.max_pixels)
        require(0 <= self.max_damaged <= 1, "data.max_damaged", "a share from 0 to 1", self.max_damaged)
        made = self.dataset_type in ("scenes", "synthetic")
        none = f"none with dataset_type {self.dataset_type!r}, which makes its pairs"
        require(not (made and self.train_data), "data.train_data", none, self.train_data)
        require(not self.cache or low == 1, "data.cache", "False with random crops (crop_area below 1)", True)
        drawn = "False unless dataset_type is scenes or stamps: captions may be drawn anew in every epoch"
        require(self.generated or not self.cache, "data.cache", drawn, True)
        kind = self.superpixels.kind
        without = f"felzenszwalb or slic with dataset_type {self.dataset_type!r}, which stores no segments"
        stores = self.dataset_type in ("folder", "auto")
        require(stores or kind != "stored", "data.superpixels.kind", without, kind)
        self.factors()

    @property
    def generated(self) -> bool:
        """Whether the pairs are composed here, with held-out ones and their masks."""
        return self.dataset_type in GENERATED

    def paths(self) -> tuple[str, ...]:
        """The sources of `train_data`."""
        return tuple(part.strip() for part in self.train_data.split(BETWEEN) if part.strip())

    def factors(self) -> tuple[float, ...]:
        """How often each source is shown; all 1 where nothing is set.

        Raises:
            ValueError: not a positive number for each source.
        """
        paths = self.paths()
        text = self.train_data_upsampling_factors
        if not text:
            return (1.0,) * len(paths)
        try:
            found = tuple(float(part) for part in text.split(BETWEEN))
        except ValueError:
            found = ()
        good = len(found) == len(paths) and all(math.isfinite(factor) and factor > 0 for factor in found)
        wanted = f"{len(paths)} positive numbers with {BETWEEN} between them, one for each source"
        require(good, "data.train_data_upsampling_factors", wanted, text)
        return found
