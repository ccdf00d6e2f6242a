"""The training run, readable top to bottom (paper Section 3.1).

Everything random is a function of (seed, step): initial values, data order, crops and noise. A resumed run
therefore repeats the uninterrupted one bit for bit on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import SegCLIPConfig, TrainConfig, to_dict
from ..data.pipeline import PairDataset, batches, make_held_out, make_source
from ..data.pseudo_labels import PatchLabels, labels_on_device
from ..data.sample import ImageTextSource
from ..interop.checkpoint import load as load_model
from ..interop.files import write_whole
from ..losses import Losses
from ..model.segclip import SegCLIP
from . import checkpoint
from .log import FILE as LOG
from .log import RunLog
from .optim import apply_step, build_optimizer
from .prefetch import Batch, Prefetcher

CONFIG, FINAL = "train.json", "model"
GIVE_UP_AFTER = 10  # steps in a row with a loss that is not finite
# Settings that may differ between the first start of a run and its continuation.
FREE_ON_RESUME = (
    "output",
    "device",
    "data.superpixels.where",  # the labels are the same
    "eval_every",
    "eval_images",
    "save_every",
    "resume",
    "overwrite",
    "quiet",
)


def train(config: TrainConfig, on_step: Callable[[int, Losses], None] | None = None) -> SegCLIP:
    """Train as `config` says; returns the trained model, which also lies in OUTPUT/model.

    Args:
        config: the run.
        on_step: called after every step with its number (from 1) and its losses.

    Raises:
        ValueError: settings that do not fit together, or a resumed run whose settings differ.
        FileNotFoundError: the data are not where the settings say.
        NotImplementedError: superpixels asked for on a device that cannot make them.
        FileExistsError: the output folder is not empty and neither resume nor overwrite is set.
        FloatingPointError: ten steps in a row without a finite loss.
    """
    device = choose_device(config.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE: expected 1 process, got {os.environ['WORLD_SIZE']}")
    torch.manual_seed(config.seed)
    model = initial_model(config)
    superpixels = config.data.superpixels
    in_workers = not labels_on_device(superpixels, device)
    source = make_source(config.data, model.config)
    dataset = PairDataset(source, config.data, model.config, config.seed, superpixels=in_workers)
    held_out = make_held_out(config.data, model.config, config.eval_images)

    run = Path(config.output)
    prepare_folder(run, config)
    model.to(device).train()
    optimizer = build_optimizer(model, config.optim)
    saved = checkpoint.find(run) if config.resume else []
    start = 0
    if saved:
        checkpoint.restore(saved[-1], model, optimizer)
        start = saved[-1].step

    with RunLog(run, start, config.steps, config.quiet) as log:
        loader = batches(dataset, config.batch_size, start, config.steps, pin=device.type == "cuda")
        stream = Prefetcher(loader, device, PatchLabels(superpixels, model.config.vision.patch_size))
        failures = 0
        for step in range(start + 1, config.steps + 1):
            losses, values = take_step(model, optimizer, stream, config, step)
            log.step(step, values)
            failures = failures + 1 if values["skipped"] else 0
            if failures >= GIVE_UP_AFTER:
                raise FloatingPointError(
                    f"{failures} steps in a row without a finite loss, the last is step {step}; the newest "
                    f"checkpoint is in {run / checkpoint.FOLDER}: lower optim.lr or look at the data"
                )
            if on_step is not None:
                on_step(step, losses)
            if step % config.save_every == 0 or step == config.steps:
                checkpoint.save(run, step, model, optimizer)
            due = step == config.steps or (config.eval_every and step % config.eval_every == 0)
            if due and held_out is not None:
                log.evaluation(step, evaluate(model, held_out))
    model.eval()
    model.save_pretrained(run / FINAL, overwrite=True)
    return model


def take_step(
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    stream: Prefetcher,
    config: TrainConfig,
    step: int,
) -> tuple[Losses, dict[str, Any]]:
    """Step `step` (from 1): next batch, losses, gradients, update; a loss that is not finite is skipped.

    Returns:
        The losses, and what the log says of the step.
    """
    start, waited = time.perf_counter(), stream.seconds
    batch = next(stream)
    losses = forward(model, batch, config, step)
    finite = bool(torch.isfinite(losses.total))
    norm = None
    if finite:
        losses.total.backward()
        stream.prefetch()  # while the device is busy with the gradients
        norm = apply_step(model, optimizer, config.optim, step, config.steps)
    return losses, {
        **({name: value.item() for name, value in losses.named().items()} if finite else {}),
        "skipped": not finite,
        "gradient_norm": norm,
        "lr": max(group["lr"] for group in optimizer.param_groups),
        "logit_scale": model.logit_scale.item(),
        "images_per_second": config.batch_size / (time.perf_counter() - start),
        "data_seconds": stream.seconds - waited,
    }


def forward(model: SegCLIP, batch: Batch, config: TrainConfig, step: int) -> Losses:
    """The losses of one batch, with the noise of this step."""
    device = batch.images.device
    generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(batch.images, batch.tokens, batch.superpixels, holds=batch.holds, generator=generator)


def evaluate(model: SegCLIP, source: ImageTextSource) -> dict[str, float | int]:
    """Zero-shot quality on a source with masks; the training flag is left as it was."""
    from ..evaluation.harness import evaluate_source

    training = model.training
    model.eval()
    result = evaluate_source(model, source, batch_size=32)
    model.train(training)
    return {
        "miou": result.miou,
        "pixel_accuracy": result.pixel_accuracy,
        "images": len(source),
    }


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where it works, else the CPU.

    Raises:
        ValueError: CUDA asked for and not available.
    """
    available = torch.cuda.is_available()
    if name.startswith("cuda") and not available:
        raise ValueError(f"device: expected one that is available, got {name!r} without CUDA")
    if name == "auto":
        name = "cuda" if available else "cpu"
    return torch.device(name)


def initial_model(config: TrainConfig) -> SegCLIP:
    """The model that a run starts from: fresh, a checkpoint's, or CLIP's towers.

    Raises:
        ValueError: the starting point has another architecture than the run.
    """
    kind, _, rest = config.init.partition(":")
    if config.init == "scratch":
        return SegCLIP(config.model, config.loss)
    if kind == "clip":
        name, _, pretrained = rest.partition(":")
        return SegCLIP.from_clip(
            name,
            pretrained or None,
            image_size=config.model.vision.image_size,
            grouping=config.model.grouping,
            reconstruction=config.model.reconstruction,
            loss=config.loss,
        )
    model, values = load_model(SegCLIP, Path(config.init))
    model.load_state_dict(values)
    model.loss = config.loss
    _same_architecture(model.config, config.model, config.init)
    return model


def _same_architecture(found: SegCLIPConfig, wanted: SegCLIPConfig, source: str) -> None:
    different = _differences(to_dict(found), to_dict(wanted))
    if different:
        raise ValueError(f"init: expected the architecture of the run in {source}, got other {different}")


def prepare_folder(run: Path, config: TrainConfig) -> None:
    """Make the run folder, or check that it may be continued or replaced.

    Raises:
        FileExistsError: it is not empty and the config neither resumes nor overwrites.
        ValueError: it is not a run folder, or the run to resume had other settings.
    """
    values = json.loads(json.dumps(to_dict(config)))
    occupied = run.exists() and any(run.iterdir())
    is_run = (run / CONFIG).is_file()
    if occupied and not (config.resume or config.overwrite):
        raise FileExistsError(
            f"output: expected an empty folder, got {run} with files in it; "
            "pass --resume to continue that run or --overwrite to replace it"
        )
    if occupied and not is_run:
        raise ValueError(f"output: expected a run folder with {CONFIG}, got {run} with other files")
    if occupied and config.resume:
        different = _differences(json.loads((run / CONFIG).read_text()), values)
        different = [name for name in different if not {name, name.split(".")[0]} & set(FREE_ON_RESUME)]
        if different:
            raise ValueError(f"resume: expected the settings of the run in {run}, got other {different}")
        return
    if occupied:
        for part in (checkpoint.FOLDER, FINAL):
            shutil.rmtree(run / part, ignore_errors=True)
        (run / LOG).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / CONFIG, lambda path: path.write_text(json.dumps(values, indent=2) + "\n"))


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two plain configs differ."""
    found = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name, math.nan), new.get(name, math.nan)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif json.dumps(a) != json.dumps(b):
            found.append(prefix + name)
    return found
