"""What the refinements of inference are worth: quality on embedded scenes and composed stamps, and time.

    make stamps
    python benchmarks/refinements.py --stamps .stamps/usr/share/tuxpaint/stamps    # prints the table
    python benchmarks/refinements.py --stamps .stamps/usr/share/tuxpaint/stamps --timings   # the times alone

Writes results/refinements.json. The scenes take the model of `make demo`, the stamps two of the same recipe;
what is not in DEMO/run and MODELS/stamps-SEED yet is trained first, about 5 minutes each on one core. The
rest takes 2. `--timings` measures the times again with the models as they lie there, in a minute, and leaves
everything else in the file as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness.machine import commit, versions
from harness.timing import interleaved
from reporting.refinements import refinement_tables
from torch import Tensor

from segclip_fast import SegCLIP
from segclip_fast.config import DataConfig, TrainConfig, scenes_tiny
from segclip_fast.data.sample import ImageTextSource, RawSample
from segclip_fast.data.scenes import SceneSource
from segclip_fast.data.stamps import BACKGROUND, StampSource
from segclip_fast.evaluation.boundary import boundary_f_score
from segclip_fast.evaluation.metric import ConfusionMatrix, mean_iou
from segclip_fast.evaluation.segmentation import Segmentation, segment_batch
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import FINAL, train
from segclip_fast.training.runs import load_run

Options = Mapping[str, Any]
RESULT = Path(__file__).parent / "results" / "refinements.json"
IMAGES, TIMED, BATCH = 200, 60, 20
STAMP_FOLDER = "food"  # of the stamps: 47 photographs of fruit, vegetables, nuts and a spice, in 35 classes
STAMP_STEPS = 1500  # 3000 gave less: more of the background took a name (docs/refinement.md)
STAMP_SIDE = 224  # pictures larger than the model's window, as photographs are
STAMP_SEEDS = (42, 43)  # of training: the second shows what depends on it
HELD_OUT_SEED = 1  # of the stamps' held-out compositions; others served to choose the run
RESAMPLES, COVERED = 1000, (2.5, 97.5)  # per cent of the resampled gains


@dataclass(frozen=True)
class Case:
    """A trained model and the held-out pictures it is measured on.

    Attributes:
        name: of the set.
        config: the training run.
        model: its result.
        held_out: pictures with masks that training never showed.
        templates: those of the prompt ensemble; a closed vocabulary knows no others.
        repeats: the pictures are those of the case before, the model is another.
    """

    name: str
    config: TrainConfig
    model: SegCLIP
    held_out: ImageTextSource
    templates: tuple[str, ...]
    repeats: bool = False

    @property
    def refinements(self) -> dict[str, Options]:
        """Options of `segment_batch` by name; "plain" is the protocol as it stands."""
        window = self.model.config.vision.image_size
        larger = {f"short side {side}": {"short_side": side} for side in (window * 3 // 2, window * 2)}
        found: dict[str, Options] = {"plain": {}, "snapped": {"snap": True}}
        found |= {"PAMR": {"pamr": True}, "PAMR, snapped": {"pamr": True, "snap": True}}
        for name, options in larger.items():  # the protocol's 336 and 448 for a window of 224
            found[name] = options | {"stride": window // 2}
            found[f"{name}, snapped"] = options | {"stride": window // 2, "snap": True}
        return found | {"prompt ensemble": {"templates": self.templates}}

    def segment(self, samples: Sequence[RawSample], options: Options) -> list[Segmentation]:
        """Label maps of the pictures, with every class of the source as a label."""
        names = list(self.held_out.class_names)
        background = names[0] == BACKGROUND
        pictures = [sample.image for sample in samples]
        return segment_batch(self.model, pictures, names[background:], background=background, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stamps", type=Path, required=True, help="stamps folder, see docs/stamps.md")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `make demo`")
    parser.add_argument(
        "--models", type=Path, default=Path("runs/refinements"), help="folder of the stamps' runs"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON to write")
    parser.add_argument("--timings", action="store_true", help="measure the times alone, again")
    parser.add_argument("--images", type=int, default=IMAGES, help="held-out pictures")
    parser.add_argument("--timed", type=int, default=TIMED, help="pictures that are timed")
    parser.add_argument("--steps", type=int, help="shorter training, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; training depends on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.timings and not options.output.is_file():
        parser.error(f"output: expected the results of a run without --timings, got no file {options.output}")
    if options.steps and options.output == RESULT:
        parser.error("steps: expected another --output than the stored results, whose runs are whole")
    try:
        cases = [scenes_case(options), *(stamps_case(options, seed) for seed in STAMP_SEEDS)]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/refinements.py", *given])
    if options.timings:
        run = json.loads(options.output.read_text())
    else:
        run = {"command": command, **whereabouts(), "sets": [quality(case, options.images) for case in cases]}
    merge_times(run, {case.name: times(case, options.timed) for case in cases})
    run["timed"] = {"command": command, "pictures": options.timed, **whereabouts()}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(run, indent=1) + "\n")
    print(refinement_tables(run))


def whereabouts() -> dict[str, Any]:
    """Commit, versions and processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return {"commit": commit(), "versions": versions(), **cpu}


# --- the models


def scenes_case(options: argparse.Namespace) -> Case:
    """The demonstration and its held-out pictures."""
    config = load_run("scenes")
    steps = options.steps or config.steps
    config = dataclasses.replace(config, output=str(options.demo / "run"), steps=steps)
    held_out = SceneSource(options.images, config.data.seed, config.model.vision.image_size, "val")
    templates = ("a photo of a {}.", "a photo of {}", "a picture of {}")
    return Case("scenes", config, trained(config, options.timings), held_out, templates)


def stamps_case(options: argparse.Namespace, seed: int) -> Case:
    """The demonstration's recipe on pictures composed of one category of stamps, with their own words."""
    root = options.stamps / STAMP_FOLDER
    words = StampSource(root, 1).caption_vocabulary()
    recipe = load_run("scenes")
    config = dataclasses.replace(
        recipe,
        output=str(options.models / f"stamps-{seed}"),
        model=scenes_tiny(words),
        data=DataConfig(
            dataset_type="stamps",
            train_data=str(root),
            train_num_samples=recipe.data.train_num_samples,
            crop_area=recipe.data.crop_area,
            superpixels=recipe.data.superpixels,
            cache=True,
        ),
        steps=options.steps or STAMP_STEPS,
        seed=seed,
    )
    held_out = StampSource(root, options.images, HELD_OUT_SEED, STAMP_SIDE, "val_seen")
    templates = ("a photo of a {}.", "a photo of {}", "{}")
    repeats = seed != STAMP_SEEDS[0]
    name = f"stamps, seed {seed}" if repeats else "stamps"
    return Case(name, config, trained(config, options.timings), held_out, templates, repeats)


def trained(config: TrainConfig, saved: bool = False) -> SegCLIP:
    """The model of a run: trained, continued if it was interrupted, or as it lies there if it is complete.

    Args:
        config: the run.
        saved: never train.

    Raises:
        FileNotFoundError: there is no complete model and `saved` is set.
        ValueError: the run's folder holds one with other settings.
    """
    if saved:
        return SegCLIP.from_pretrained(Path(config.output) / FINAL).eval()
    print(f"{config.output}: {config.steps} steps, unless they are done", flush=True)
    return train(dataclasses.replace(config, resume="latest", eval_images=1, save_every=250)).eval()


# --- quality


def quality(case: Case, images: int) -> dict[str, Any]:
    """Every refinement's figures on the held-out pictures."""
    names = tuple(case.held_out.class_names)
    samples = [case.held_out[index] for index in range(images)]
    rows, plain = [], None
    for name, options in case.refinements.items():
        counts, boundary = confusions(case, samples, options)
        plain = counts if plain is None else plain
        low, high = gain_interval(counts, plain)
        rows.append(
            {
                "refinement": name,
                "options": dict(options),
                "miou": round(float(mean_iou(counts.sum(dim=0))), 4),
                "pixel_accuracy": round(pixel_accuracy(counts), 4),
                "boundary_f": round(float(np.nanmean(boundary)), 4),
                "gain_low": round(low, 4),
                "gain_high": round(high, 4),
            }
        )
        print(f"{case.name}, {name}: mIoU {rows[-1]['miou']:.3f}, {low:+.3f} to {high:+.3f}", flush=True)
    return {
        "name": case.name,
        "repeats": case.repeats,
        "images": images,
        "held_out_seed": getattr(case.held_out, "seed", None),
        "side": samples[0].image.shape[0],
        "window": case.model.config.vision.image_size,
        "classes": len(names),
        "background": names[0] == BACKGROUND,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        **training_facts(case.config),
        "rows": rows,
    }


def training_facts(config: TrainConfig) -> dict[str, Any]:
    """What the run was, and how long its steps took."""
    steps = read_log(Path(config.output))
    seconds = sum(config.batch_size / step["images_per_second"] for step in steps)
    return {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "training_seed": config.seed,
        "training_data_seed": config.data.seed,
        "training_seconds": round(seconds, 1),
    }


def pixel_accuracy(counts: Tensor) -> float:
    """Share of the pixels that are right, of counts by picture (P, C, C)."""
    return float(counts.diagonal(dim1=1, dim2=2).sum() / counts.sum())


def confusions(case: Case, samples: Sequence[RawSample], options: Options) -> tuple[Tensor, list[float]]:
    """Confusion counts of each picture (P, C, C) int64, and its boundary F-score (P)."""
    classes = len(case.held_out.class_names)
    counts, boundary = [], []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        for sample, found in zip(part, case.segment(part, options), strict=True):
            counts.append(ConfusionMatrix(classes).update(found.labels, sample.mask))
            boundary.append(boundary_f_score(found.labels, sample.mask, classes))
    return torch.stack(counts), boundary


def gain_interval(counts: Tensor, plain: Tensor, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Where 95% of the gains in mIoU lie when pictures are drawn anew, with replacement (paired bootstrap).

    Args:
        counts: confusion counts by picture (P, C, C) of a refinement.
        plain: the same without it.
        resamples: how often P pictures are drawn, the same ones for both.
    """
    pictures = len(counts)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=resamples)  # (R, P)
    gains = []
    for weights in torch.from_numpy(draws):
        with_it, without = ((weights[:, None, None] * found).sum(dim=0) for found in (counts, plain))
        gains.append(float(mean_iou(with_it) - mean_iou(without)))
    low, high = np.percentile(gains, COVERED)
    return float(low), float(high)


# --- time


def times(case: Case, pictures: int) -> dict[str, float]:
    """Median milliseconds per picture of every refinement, one picture a call, the refinements in turn."""
    samples = [case.held_out[index] for index in range(min(pictures, len(case.held_out)))]
    calls = {
        name: lambda number, options=options: case.segment([samples[number % len(samples)]], options)
        for name, options in case.refinements.items()
    }
    for call in calls.values():
        call(0)  # encodes the prompts, which are kept
    found = interleaved(calls, torch.device("cpu"), len(samples), 0)
    return {name: 1e3 * median(values) for name, values in found.items()}


def merge_times(run: dict[str, Any], found: Mapping[str, Mapping[str, float]]) -> None:
    """Put milliseconds by set and refinement into the rows of `run`."""
    for measured in run["sets"]:
        for row in measured["rows"]:
            row["ms"] = round(found[measured["name"]][row["refinement"]], 3)


if __name__ == "__main__":
    main()
