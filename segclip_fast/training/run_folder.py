"""The folder of a run: made, continued or replaced, never overwritten by accident."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from ..config import SegCLIPConfig, TrainConfig, to_dict
from ..interop.files import write_whole
from ..model.segclip import SegCLIP
from . import checkpoint, pictures
from .log import FILE as LOG
from .reporters import TENSORBOARD, WANDB_ID

CONFIG, FINAL = "train.json", "model"
# Settings that may differ between the first start of a run and its continuation.
FREE_ON_RESUME = (
    "output",
    "device",
    "dist_backend",
    "fsdp",
    "torchcompile",
    "grad_checkpointing",
    "data.workers",
    "data.check_files",
    "data.index_folder",
    "data.max_damaged",
    "data.superpixels.where",  # the labels are the same
    "data.superpixels.cache",
    "eval_every",
    "eval_images",
    "eval_dataset",
    "eval_root",
    "pictures",
    "save_every",
    "keep",
    "max_skipped",
    "resume",
    "overwrite",
    "report_to",
    "quiet",
    "batch_size",  # these two as long as a step has as many pairs: checked with the checkpoint
    "accum_freq",
)


def prepare_folder(run: Path, config: TrainConfig, resume: str) -> None:
    """Make the run folder, or check that it may be continued or replaced.

    Args:
        run: the folder.
        config: the run.
        resume: "latest", a checkpoint's path or "".

    Raises:
        FileExistsError: it is not empty and neither to be continued nor replaced.
        ValueError: it is not a run folder, or the run to resume had other settings.
    """
    values = json.loads(json.dumps(to_dict(config)))
    occupied = run.exists() and any(run.iterdir())
    is_run = (run / CONFIG).is_file()
    if occupied and not (resume == "latest" or config.overwrite):
        raise FileExistsError(
            f"output: expected an empty folder, got {run} with files in it; "
            "pass --resume to continue that run or --overwrite to replace it"
        )
    if occupied and not is_run:
        raise ValueError(f"output: expected a run folder with {CONFIG}, got {run} with other files")
    if occupied and resume == "latest":
        different = differences(json.loads((run / CONFIG).read_text()), values)
        different = [name for name in different if not _free(name)]
        if different:
            raise ValueError(f"resume: expected the settings of the run in {run}, got other {different}")
        return
    if occupied:
        for part in (checkpoint.FOLDER, FINAL, pictures.FOLDER, TENSORBOARD, "wandb"):
            shutil.rmtree(run / part, ignore_errors=True)
        for name in (LOG, WANDB_ID):
            (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / CONFIG, lambda path: path.write_text(json.dumps(values, indent=2) + "\n"))


def _free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


def check_room(run: Path, model: SegCLIP) -> None:
    """Look for room for a first checkpoint before hours of training.

    Raises:
        OSError: the disk has less.
    """
    numbers = sum(value.numel() for value in model.state_dict().values())
    there = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    needed, free = 3 * 4 * numbers, shutil.disk_usage(there).free  # weights and two moments in float32
    if free < needed:
        expected = f"room for a checkpoint of {needed / 1e9:.2f} GB in {run}"
        raise OSError(f"output: expected {expected}, got {free / 1e9:.2f} GB")


def same_architecture(found: SegCLIPConfig, wanted: SegCLIPConfig, source: str) -> None:
    """Raise ValueError if a starting point is another model than that of the run."""
    different = differences(to_dict(found), to_dict(wanted))
    if different:
        raise ValueError(f"init: expected the architecture of the run in {source}, got other {different}")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two plain configs differ."""
    found = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name, math.nan), new.get(name, math.nan)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif not _same(a, b):
            found.append(prefix + name)
    return found


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
    return a == b if numbers else json.dumps(a) == json.dumps(b)
