"""`make demo`: learn to segment from captions alone on this machine's CPU, in minutes, and show it.

Trains the `scenes` run from scratch on generated pictures with captions, measures zero-shot segmentation on
held-out ones and writes, into the output folder: report.json, grid.png (picture, truth, prediction, snapped
prediction, regions), curve.png (losses), run/ (log and checkpoints) and run/model/ (the trained model).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import TrainConfig
from .data.sample import ImageTextSource
from .data.scenes import SceneSource
from .evaluation.harness import evaluate_source
from .evaluation.metric import ConfusionMatrix, MetricResult
from .interop.files import write_whole
from .model.segclip import SegCLIP
from .training.loop import FINAL, train
from .training.preparing import initial_model
from .training.runs import load_run

HELD_OUT = 200
SHOWN = 6
REPORT, GRID, CURVE, RUN = "report.json", "grid.png", "curve.png", "run"


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit code: 0 done, 2 unusable settings."""
    parser = argparse.ArgumentParser(prog="python -m segclip_fast.quickstart", description=__doc__)
    parser.add_argument("--output", default="demo", help="folder to write (default: demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demonstration there")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the whole run)")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    config = load_run("scenes")
    config = dataclasses.replace(
        config,
        output=str(output / RUN),
        overwrite=options.overwrite,
        steps=options.steps or config.steps,
    )
    try:
        report = demonstrate(config, output)
    except (ValueError, FileExistsError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(report)
    print(f"\npictures: {output / GRID}, {output / CURVE}; model: {output / RUN / FINAL}")
    command = f"{sys.executable} -m segclip_fast.segment {output}/scene.png --labels '{report['try_labels']}'"
    print(f"try it: {command} --checkpoint {output / RUN / FINAL} --output {output}/mine.png --snap")
    return 0


def demonstrate(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Train, measure, draw and write; returns the report.

    Raises:
        FileExistsError: `output` is not empty and `config.overwrite` is False.
    """
    if output.exists() and any(output.iterdir()) and not config.overwrite:
        raise FileExistsError(
            f"output: expected an empty folder, got {output}; pass --overwrite to replace it"
        )
    held_out = SceneSource(HELD_OUT, config.data.seed, config.model.vision.image_size, "val")

    torch.manual_seed(config.seed)
    untrained = initial_model(config).eval()
    print(f"training {config.steps} steps of {config.batch_size} captioned pictures on the CPU")
    start = time.perf_counter()
    model = train(config)
    seconds = time.perf_counter() - start

    results = {
        "untrained": evaluate_source(untrained, held_out, batch_size=32),
        "chance": chance(held_out, config.seed),
        "plain": evaluate_source(model, held_out, batch_size=32),
        "snapped": evaluate_source(model, held_out, batch_size=32, snap=True),
    }
    draw_grid(model, held_out, output / GRID)
    draw_curve(Path(config.output), output / CURVE)
    save_scene(held_out, output / "scene.png")
    report = {
        "command": "python -m segclip_fast.quickstart",
        "steps": config.steps,
        "batch_size": config.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(seconds, 1),
        "held_out_images": len(held_out),
        "classes": len(held_out.class_names),
        "try_labels": ", ".join(sorted({*held_out[0].content, *held_out.class_names[:3]})),
        "results": {name: as_dict(result) for name, result in results.items()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
    write_whole(output / REPORT, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    return report


def chance(source: ImageTextSource, seed: int) -> MetricResult:
    """Quality of a uniformly random label for every picture, which is what guessing without looking gives."""
    rng = np.random.default_rng(seed)
    classes = len(source.class_names)
    matrix = ConfusionMatrix(classes)
    for index in range(len(source)):
        mask = source[index].mask
        assert mask is not None
        matrix.update(np.full_like(mask, rng.integers(classes)), mask)
    return matrix.result(tuple(source.class_names))


def as_dict(result: MetricResult) -> dict[str, Any]:
    """A result for JSON."""
    return {
        "miou": round(result.miou, 4),
        "pixel_accuracy": round(result.pixel_accuracy, 4),
        "iou": {name: round(float(v), 4) for name, v in zip(result.names, result.iou, strict=True)},
    }


def print_table(report: dict[str, Any]) -> None:
    """The short table at the end."""
    count, classes = report["held_out_images"], report["classes"]
    print(f"\nzero-shot segmentation of {count} held-out pictures, {classes} material names as labels")
    print(f"{'':12}{'mIoU':>8}{'pixel accuracy':>18}")
    for name, result in report["results"].items():
        print(f"{name:12}{result['miou']:>8.3f}{result['pixel_accuracy']:>18.3f}")
    print(
        f"training took {report['training_seconds']:.0f} s for {report['parameters'] / 1e6:.2f}M parameters"
    )


def draw_grid(model: SegCLIP, source: ImageTextSource, path: Path, shown: int = SHOWN) -> None:
    """A row a picture: picture and caption, truth, prediction, snapped prediction, regions, and a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from .evaluation.drawing import distinct_colours

    names = list(source.class_names)
    palette = distinct_colours(len(names))
    figure = Figure(figsize=(11, 2.1 * shown + 0.9), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(shown, 5)
    seen: set[int] = set()
    for row in range(shown):
        sample = source[row]
        assert sample.mask is not None
        plain = model.segment(sample.image, names)
        snapped = model.segment(sample.image, names, snap=True)
        regions = distinct_colours(model.config.grouping.centers)[plain.regions]
        maps = (sample.mask, plain.labels, snapped.labels)
        seen |= {int(value) for labels in maps for value in np.unique(labels)}
        for axis, picture in zip(
            axes[row], (sample.image, *(palette[m] for m in maps), regions), strict=True
        ):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_xlabel(f"“{sample.caption}”", fontsize=8)
    titles = ("picture and caption", "truth (never seen)", "prediction", "snapped", "regions")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    handles = [Patch(color=palette[value] / 255, label=names[value]) for value in sorted(seen)]
    figure.legend(handles=handles, loc="lower center", ncols=9, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.045, 1, 1))
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def draw_curve(run: Path, path: Path) -> None:
    """The losses of a run over its steps, smoothed."""
    from .training.plot import draw, loss_panels

    draw([run], path, loss_panels())


def save_scene(source: ImageTextSource, path: Path, scale: int = 6) -> None:
    """A held-out picture, enlarged, to try the segment command on."""
    from PIL import Image

    picture = Image.fromarray(source[0].image)
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    write_whole(path, lambda temporary: large.save(temporary, format="PNG"))


if __name__ == "__main__":
    sys.exit(main())
