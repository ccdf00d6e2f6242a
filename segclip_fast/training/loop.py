"""The training run, readable top to bottom (paper Section 3.1).

Everything random is a function of (seed, step): initial values, data order, crops and noise. A resumed run
therefore repeats the uninterrupted one bit for bit on the CPU. SIGTERM ends a run after the current step,
with a checkpoint of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
from .log import RunLog, read_log
from .optim import apply_step, build_optimizer
from .prefetch import Batch, Prefetcher
from .stopping import Stopping

CONFIG, FINAL = "train.json", "model"
# Settings that may differ between the first start of a run and its continuation.
FREE_ON_RESUME = (
    "output",
    "device",
    "data.superpixels.where",  # the labels are the same
    "eval_every",
    "eval_images",
    "save_every",
    "keep",
    "max_skipped",
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
        FloatingPointError: `config.max_skipped` steps in a row without a finite loss and gradient.
        OSError: a checkpoint could not be written, as on a full disk; the previous one is intact.
        SystemExit: code 0, after SIGTERM: the current step is finished and saved. Only where this runs in the
            main thread; the handler that was there before is back when this returns.
    """
    with (
        Stopping() as stopping
    ):  # from the beginning: threads that are made from here on hold SIGTERM back too
        return _train(config, on_step, stopping)


def _train(config: TrainConfig, on_step: Callable[[int, Losses], None] | None, stopping: Stopping) -> SegCLIP:
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
    start = checkpoint.resume(run, model, optimizer) if config.resume else 0

    with RunLog(run, start, config.steps, config.quiet) as log:

        def evaluate_if_due(step: int) -> None:
            due = step == config.steps or (config.eval_every and step % config.eval_every == 0)
            if due and held_out is not None:
                values = evaluate(model, held_out)
                log.evaluation(step, values)
                checkpoint.save_if_best(run, step, values["miou"], model, optimizer, config)

        if start and not any(entry["step"] == start for entry in read_log(run, "evaluation")):
            evaluate_if_due(start)  # the run stopped between saving and evaluating
        pin = device.type == "cuda"
        loader = stopping.guard(lambda: batches(dataset, config.batch_size, start, config.steps, pin))
        stream = Prefetcher(loader, device, PatchLabels(superpixels, model.config.vision.patch_size))
        skipped = 0
        for step in range(start + 1, config.steps + 1):
            try:
                losses, values = take_step(model, optimizer, stream, config, step)
            except StopIteration:  # SIGTERM took the loader's workers before this step had its batch
                _stop(run, step - 1, model, optimizer, config)
            log.step(step, values)
            skipped = skipped + 1 if values["skipped"] else 0
            if skipped >= config.max_skipped:
                raise FloatingPointError(_given_up(run, step, skipped))
            if on_step is not None:
                on_step(step, losses)
            if stopping.asked():
                _stop(run, step, model, optimizer, config)
            if step % config.save_every == 0 or step == config.steps:
                checkpoint.save(run, step, model, optimizer, config)
            evaluate_if_due(step)
    model.eval()
    model.save_pretrained(run / FINAL, overwrite=True)
    return model


def _stop(
    run: Path, step: int, model: SegCLIP, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> NoReturn:
    """Save `step` finished steps and leave."""
    checkpoint.save(run, step, model, optimizer, config)
    place = run / checkpoint.FOLDER
    print(
        f"stopped by SIGTERM: step {step} of {config.steps} is saved in {place}, --resume continues",
        file=sys.stderr,
    )
    raise SystemExit(0)


def _given_up(run: Path, step: int, skipped: int) -> str:
    newest = [saved.path.name for saved in checkpoint.find(run)][-1:]
    kept = f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
    return (
        f"steps {step - skipped + 1} to {step}, {skipped} in a row, had no finite loss or gradient and were "
        f"skipped; {kept}. Try a lower optim.lr, a longer optim.warmup or precision fp32, and look at the "
        f"samples of these steps, whose positions are in {run / LOG}"
    )


def take_step(
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    stream: Prefetcher,
    config: TrainConfig,
    step: int,
) -> tuple[Losses, dict[str, Any]]:
    """Step `step` (from 1): next batch, losses, gradients, update.

    Without a finite loss and gradient norm the update is left out; the log then names the positions of the
    batch's samples in the stream of epochs (see `PairDataset`).

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
    rates = [group["lr"] for group in optimizer.param_groups]
    position = (step - 1) * config.batch_size
    return losses, {
        **({name: value.item() for name, value in losses.named().items()} if finite else {}),
        "skipped": norm is None,
        **({"positions": [position, position + config.batch_size - 1]} if norm is None else {}),
        "gradient_norm": norm,
        "lr": max(rates),
        "lower_lr": min(rates),
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
