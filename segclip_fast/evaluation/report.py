"""What an evaluation leaves behind: a JSON file, a table, and pictures of the best and the worst images.

Shape legend: H W an image's own size, C classes.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data.sample import IGNORE_LABEL
from ..interop.files import write_whole
from .datasets import SegmentationSet
from .harness import Evaluation
from .metric import MetricResult
from .options import Options, Vocabulary
from .segmentation import Segmentation, segment_photos
from .segmenter import Segmenter

PACKAGES = ("torch", "triton", "xformers", "open_clip_torch", "numpy")
GAP = 12  # pixels between the parts of a picture


def as_dict(found: Evaluation) -> dict[str, Any]:
    """Metric, throughput and the quality of every image, for JSON; what does not exist is None."""
    metric = found.metric
    return {
        "miou": _number(metric.miou),
        "mean_accuracy": _number(metric.mean_accuracy),
        "pixel_accuracy": _number(metric.pixel_accuracy),
        "iou": {name: _number(value) for name, value in zip(metric.names, metric.iou, strict=True)},
        "images": found.images,
        "seconds": round(found.seconds, 3),
        "images_per_second": round(found.images_per_second, 3),
        "images_miou": {name: _number(value) for name, value in sorted(found.qualities.items())},
    }


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions and the machine."""
    versions: dict[str, str | None] = {"segclip_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def table(metric: MetricResult) -> str:
    """IoU and name of every class, then the means, in percent."""
    width = max(len("pixel accuracy"), *(len(name) for name in metric.names))
    rows = [*zip(metric.names, metric.iou, strict=True)]
    rows += [("", None), ("mIoU", metric.miou)]
    rows += [("mean accuracy", metric.mean_accuracy), ("pixel accuracy", metric.pixel_accuracy)]
    lines = [f"{'class':<{width}}     IoU"]
    for name, value in rows:
        if value is None:
            lines.append("-" * (width + 8))
        else:
            lines.append(f"{name:<{width}}  {'-' if math.isnan(value) else f'{100 * value:.2f}':>6}")
    return "\n".join(lines)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


# --- pictures


def draw_extremes(
    model: Segmenter,
    source: SegmentationSet,
    vocabulary: Vocabulary,
    options: Options,
    found: Evaluation,
    folder: Path,
    count: int,
) -> list[Path]:
    """Pictures of the `count` best and the `count` worst images: image, truth and prediction side by side.

    Written as `best_01_IDENTIFIER.png` and `worst_01_IDENTIFIER.png`, by the mean IoU of the image alone.

    Returns:
        The files written.
    """
    places = {entry.identifier: number for number, entry in enumerate(source.entries)}
    known = [(value, name) for name, value in found.qualities.items() if not math.isnan(value)]
    ranked = [name for _, name in sorted(known)]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, names in (("best", ranked[::-1][:count]), ("worst", ranked[:count])):
        for number, name in enumerate(names, start=1):
            sample = source[places[name]]
            result = segment_photos(model, [sample.image], [vocabulary], options)[0]
            assert sample.mask is not None
            path = folder / f"{kind}_{number:02d}_{name.replace('/', '_')}.png"
            _draw(sample.image, sample.mask, result, tuple(source.class_names), path)
            written.append(path)
    return written


def _draw(
    image: np.ndarray, mask: np.ndarray, result: Segmentation, names: tuple[str, ...], path: Path
) -> None:
    from PIL import Image

    extended = (*names, "not counted")
    truth = np.where(mask == IGNORE_LABEL, len(names), mask)
    blank, none = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.int64)
    parts = [Image.fromarray(image)]
    for labels in (truth, result.labels):
        parts.append(Segmentation(labels, blank, none, extended, image).overlay())
    canvas = Image.new(
        "RGB",
        (sum(part.width for part in parts) + GAP * (len(parts) - 1), max(part.height for part in parts)),
        "white",
    )
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + GAP
    write_whole(path, lambda temporary: canvas.save(temporary, format="PNG"))
