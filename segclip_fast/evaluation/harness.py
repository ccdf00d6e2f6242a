"""A data set through a model: images decoded ahead, windows in common batches, counts on the device.

Processes of a distributed run take every n-th image each; counts are integers and are added at the end, so
the result is the same for any number of processes, any batch and any order.

Shape legend: H W an image's own size, h w resized, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._checks import require
from ..data.sample import IGNORE_LABEL, ImageTextSource
from .metric import ConfusionMatrix, MetricResult, confusions, mean_iou
from .options import Options, Vocabulary, prepare_vocabulary
from .refine import label_pixels, photo_superpixels
from .segmenter import Segmenter
from .vocabularies import BACKGROUND
from .windows import (
    CPU_BATCH,
    Sliding,
    batch_for,
    evaluation_mode,
    resize_on,
    resize_short_side,
    score_resized,
)

STEP_PIXELS = 2**24  # at most so many pixels of images in one step, all together
MOST_IMAGES = 128  # of one step


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metric: quality over the whole data set.
        images: how many images were counted, over all processes.
        seconds: from the first image asked for to the last one counted, the slowest process's.
        qualities: identifier -> mean IoU of that image alone over the classes it or its prediction shows.
    """

    metric: MetricResult
    images: int
    seconds: float
    qualities: Mapping[str, float]

    @property
    def images_per_second(self) -> float:
        """Throughput of all processes together."""
        return self.images / max(self.seconds, 1e-9)


# --- images, prepared by the loader's workers


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image on its way to the device.

    Attributes:
        identifier: its name in the data set.
        photo: (h, w, 3) uint8, resized; (H, W, 3), as it is, where the device will resize it.
        truth: (H, W) uint8, 255 = ignore.
        superpixels: (H, W) int32, or None where nothing is snapped.
    """

    identifier: str
    photo: Tensor
    truth: Tensor
    superpixels: Tensor | None


class _Preparation(Dataset):
    """Reads, checks, resizes, and makes superpixels: whatever does not need the model."""

    def __init__(
        self, source: ImageTextSource, indices: Sequence[int], short: int | None, snap: bool
    ) -> None:
        self.source, self.indices, self.short, self.snap = source, list(indices), short, snap

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Prepared | Exception:
        """One image; a broken one comes back as its error, which a worker would bury in a traceback."""
        try:
            return self.prepare(self.indices[number])
        except (ValueError, OSError) as error:
            return error

    def prepare(self, index: int) -> Prepared:
        """Image number `index` of the source.

        Raises:
            ValueError, OSError: it or its mask cannot be used.
        """
        sample = self.source[index]
        truth = _truth(sample.mask, sample.image, len(self.source.class_names), index)
        superpixels = photo_superpixels(sample.image).astype(np.int32) if self.snap else None
        photo = sample.image if self.short is None else resize_short_side(sample.image, self.short)
        return Prepared(
            getattr(sample, "identifier", "") or str(index),
            torch.from_numpy(np.ascontiguousarray(photo)),
            torch.from_numpy(truth),
            None if superpixels is None else torch.from_numpy(superpixels),
        )


def _truth(mask: np.ndarray | None, image: np.ndarray, classes: int, index: int) -> np.ndarray:
    if mask is None:
        raise ValueError(f"source: expected a mask with every image, sample {index} has none")
    if mask.shape != image.shape[:2]:
        size = image.shape[:2]
        raise ValueError(f"source: expected a mask of shape {size} for sample {index}, got {mask.shape}")
    labels = mask.astype(np.uint8)
    wrong = (labels >= classes) & (labels != IGNORE_LABEL) | (labels != mask)
    if wrong.any():
        got = int(mask[wrong][0])
        wanted = f"labels 0 to {classes - 1} or {IGNORE_LABEL} in the mask of sample {index}"
        raise ValueError(f"source: expected {wanted}, got {got}")
    return labels


def _loaded(dataset: _Preparation, images: int, workers: int) -> Iterable[list[Prepared]]:
    """Steps of at most `images` images and `STEP_PIXELS` pixels, in the order of the data set."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    step: list[Prepared] = []
    pixels = 0
    for item in loader:
        if isinstance(item, Exception):
            raise item
        if step and (len(step) == images or pixels + item.truth.numel() > STEP_PIXELS):
            yield step
            step, pixels = [], 0
        step.append(item)
        pixels += item.truth.numel()
    if step:
        yield step


# --- the evaluation


def evaluate_set(
    model: Segmenter,
    source: ImageTextSource,
    labels: Sequence[str],
    options: Options,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    images: int | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Segment the images of a source and compare with their masks at the images' own size.

    In an initialised process group every process takes its share of the images and all get the same result.

    Args:
        model: the segmenter.
        source: samples with masks; a mask is an index into `source.class_names`, 255 is not counted.
        labels: the text for each class that gets a prompt (all, or all but the background).
        options: how images are segmented; with a background, class 0 is it.
        synonyms: further texts of a label, see `prepare_vocabulary`.
        limit: use the first `limit` samples only.
        images: images per step; by default as many as fill a batch of windows. Changes nothing but speed.
        workers: processes that read, resize and make superpixels; 0 does so in between.
        progress: show a bar on stderr (of the first process).

    Raises:
        ValueError: no sample, a sample without a mask or with one that does not fit, wrong number of labels.
    """
    names, background = tuple(source.class_names), bool(options.background)
    if len(labels) + int(background) != len(names):
        raise ValueError(f"labels: expected {len(names) - int(background)} of them, got {len(labels)}")
    count = len(source) if limit is None else min(limit, len(source))
    require(count >= 1, "source", "at least one sample to evaluate", count)
    require(images is None or images >= 1, "batch_size", "at least 1", images)
    require(workers >= 0, "workers", "0 or more", workers)
    sliding = options.sliding
    short = model.image_size if sliding.short_side is None else sliding.short_side
    rank, world = _place()
    device = next(model.parameters()).device
    share = range(rank, count, world)
    dataset = _Preparation(source, share, None if device.type == "cuda" else short, options.snap)
    matrix = ConfusionMatrix(len(names), device=device)
    vocabulary = prepare_vocabulary(model, labels, options, synonyms)
    identifiers: list[str] = []
    qualities: list[Tensor] = []
    started = time.perf_counter()
    steps = _loaded(dataset, images or _step_images(model, sliding), workers)
    with evaluation_mode(model), _bar(len(dataset), progress and rank == 0) as bar:
        for step in steps:
            found = list(_predict(model, step, vocabulary, options))
            counts = confusions(found, [item.truth for item in step], len(names))
            matrix.add(counts.sum(dim=0))
            qualities.append(mean_iou(counts))
            identifiers += [item.identifier for item in step]
            bar.update(len(step))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    shares = dict(zip(identifiers, torch.cat(qualities).tolist() if qualities else (), strict=True))
    return _gather(matrix, names, len(identifiers), seconds, shares, count)


def _predict(
    model: Segmenter, step: Sequence[Prepared], vocabulary: Vocabulary, options: Options
) -> Iterator[Tensor]:
    """The label map (H, W) int64 of each image, on the model's device."""
    device, sliding = next(model.parameters()).device, options.sliding
    short = model.image_size if sliding.short_side is None else sliding.short_side
    resized = [resize_on(item.photo, short, device) for item in step]
    maps = score_resized(model, resized, vocabulary.text, vocabulary.background, sliding)
    for item, small, scores in zip(step, resized, maps, strict=True):
        height, width = item.truth.shape
        photo = small if options.pamr else None
        yield label_pixels(scores, height, width, superpixels=item.superpixels, photo=photo)[0]


def _step_images(model: Segmenter, sliding: Sliding) -> int:
    """Images per step, as many as fill a batch if each has two windows."""
    device = next(model.parameters()).device
    windows = sliding.batch_size or (batch_for(model) if device.type == "cuda" else CPU_BATCH)
    return max(1, min(MOST_IMAGES, windows // 2))


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=None if shown else True)


# --- several processes


def _place() -> tuple[int, int]:
    """Number of this process and of all."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gather(
    matrix: ConfusionMatrix,
    names: tuple[str, ...],
    images: int,
    seconds: float,
    qualities: dict[str, float],
    expected: int,
) -> Evaluation:
    """The parts of all processes together; every process gets the whole."""
    if _place()[1] > 1:
        dist.all_reduce(matrix.total)
        parts: list[Any] = [None] * _place()[1]
        dist.all_gather_object(parts, (images, seconds, qualities))
        images, seconds = sum(part[0] for part in parts), max(part[1] for part in parts)
        qualities = {name: value for part in parts for name, value in part[2].items()}
    assert images == expected  # every image once
    return Evaluation(matrix.result(names), images, seconds, qualities)


# --- sources that are no standard data set


def evaluate_source(
    model: Segmenter,
    source: ImageTextSource,
    *,
    labels: Sequence[str] | None = None,
    background: bool | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    workers: int = 0,
    **options: Any,
) -> MetricResult:
    """Segment the images of a source and compare with their masks at the images' own size.

    Args:
        model: the segmenter.
        source: samples with masks; a mask is an index into `source.class_names`, 255 is not counted.
        labels: the text for each class that gets a prompt (all, or all but the background), where it should
            differ from the class name.
        background: class 0 is the background, found by threshold; by default, if it is called "background".
        limit: use the first `limit` samples only.
        batch_size: images segmented together; does not change the result.
        workers: see `evaluate_set`.
        **options: fields of `Options` and `Sliding` (threshold, templates, snap, pamr, short_side, stride,
            protocol, precision).

    Raises:
        ValueError: no sample, a sample without a mask or with one that does not fit, wrong number of labels.
    """
    names = tuple(source.class_names)
    if background is None:
        background = bool(names) and names[0] == BACKGROUND
    prompts = list(names[1:] if background else names) if labels is None else list(labels)
    windows = {name: options.pop(name) for name in _SLIDING if name in options}
    chosen = replace(Options(background=background, sliding=Sliding(**windows)), **options)
    found = evaluate_set(model, source, prompts, chosen, limit=limit, images=batch_size, workers=workers)
    return found.metric


_SLIDING = ("protocol", "short_side", "stride", "precision")
