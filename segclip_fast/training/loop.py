"""The training run, readable top to bottom (paper Section 3.1), on one process or on those of torchrun.

Everything random is a function of (seed, step, rank): initial values, data order, crops and noise. A resumed
run therefore repeats the uninterrupted one bit for bit on the CPU. SIGTERM ends a run after the current step,
with a checkpoint of it.
"""

from __future__ import annotations

import gc
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from ..config import TrainConfig
from ..data.pipeline import Damage, LoadedBatch, Positions, batches, caption_holds, collate
from ..data.pseudo_labels import PatchLabels
from ..interop.checkpoint import save as save_model
from ..losses import Losses
from ..model.segclip import SegCLIP
from . import checkpoint, throughput
from .accumulation import MicroBatch, accumulate, split
from .agreement import everywhere, gather_objects, on_first
from .distributed import Place, communication, contrastive_global, seed_for, sum_over_ranks
from .log import FILE as LOG
from .log import read_log
from .optim import apply_step, trained
from .parallel import finish_gradients, gather_whole, gradient_norm, plain
from .prefetch import Batch, Prefetcher
from .preparing import Run, prepare, processes
from .run_folder import FINAL
from .stopping import Stopping


def train(config: TrainConfig, on_step: Callable[[int, Losses], None] | None = None) -> SegCLIP:
    """Train as `config` says; returns the trained model, which also lies in OUTPUT/model.

    Under torchrun every process calls it, and rank 0 writes. With `config.fsdp` the returned model is
    sharded.

    Args:
        config: the run.
        on_step: called after every step with its number (from 1) and its losses on this process.

    Raises:
        ValueError: settings that do not fit together, a resumed run whose settings differ, or too many
            damaged samples.
        FileNotFoundError: the data are not where the settings say.
        NotImplementedError: superpixels asked for on a device that cannot make them.
        FileExistsError: the output folder is not empty and neither resume nor overwrite is set.
        FloatingPointError: `config.max_skipped` steps in a row without a finite loss and gradient.
        ImportError: `config.report_to` names a package that is not installed.
        OSError: a checkpoint could not be written, as on a full disk; the previous one is intact.
        SystemExit: code 0, after SIGTERM: the current step is finished and saved. Only where this runs in the
            main thread; the handler that was there before is back when this returns.
    """
    # Stopping comes first: threads that are made from here on hold SIGTERM back too.
    with Stopping() as stopping, processes(config) as place:
        model = _train(config, place, stopping, on_step)
        gc.collect()  # DDP's reducer must not outlive the process group: gloo may then wait for ever
    return model


def _train(
    config: TrainConfig, place: Place, stopping: Stopping, on_step: Callable[[int, Losses], None] | None
) -> SegCLIP:
    run = prepare(config, place)
    with run.log:
        _steps(run, stopping, on_step)
    save_final(run)
    return run.model.eval()


# --- the steps


def _steps(run: Run, stopping: Stopping, on_step: Callable[[int, Losses], None] | None) -> None:
    config, log, start = run.config, run.log, run.progress.step
    if start and not on_first(lambda: any(e["step"] == start for e in read_log(run.path, "evaluation"))):
        evaluate_if_due(run, start)  # the run stopped between saving and evaluating
    stream = start_stream(run, stopping)
    times = throughput.Throughput(config.batch_size * config.accum_freq, run.place.world, config.data.workers)
    skipped = 0
    for number in range(start + 1, run.steps + 1):
        taken = take_step(run, stream, times, number, stopping.asked)
        log.step(number, taken.values)
        note_damage(run, number, taken)
        skipped = skipped + 1 if taken.values["skipped"] else 0
        if skipped >= config.max_skipped:
            raise everywhere(FloatingPointError(_given_up(run, number, skipped)))
        if on_step is not None:
            on_step(number, taken.losses)
        if taken.stop or (run.place.world == 1 and stopping.asked()):
            _stop(run, number)
        if number % config.save_every == 0 or number == run.steps:
            run.save(number)
        evaluate_if_due(run, number)
    finish_log(run, times)


def start_stream(run: Run, stopping: Stopping) -> Prefetcher:
    """The batches of this process from the next step on."""
    config, place, device = run.config, run.place, run.place.device
    share = config.batch_size * config.accum_freq
    left = run.steps - run.progress.step
    positions = Positions(run.progress.position, left, share, place.rank, place.world)

    def again(number: int) -> LoadedBatch:
        return collate([run.dataset[position] for position in positions.of(number)])

    pin = device.type == "cuda"
    loader = stopping.guard(lambda: batches(run.dataset, positions, pin), again)
    return Prefetcher(loader, device, PatchLabels(config.data.superpixels, run.model.patch_size))


@dataclass(frozen=True)
class Taken:
    """A finished step: losses of this process, what the log says, samples left out, whether to stop."""

    losses: Losses
    values: dict[str, Any]
    damaged: list[Damage]
    stop: bool


def take_step(
    run: Run, stream: Prefetcher, times: throughput.Throughput, number: int, asked: Callable[[], bool]
) -> Taken:
    """Step `number` (from 1): next batch, losses, gradients, update.

    Without a finite loss and gradient norm on any rank, all leave the update out; the log then names the
    samples of the step. If one rank is `asked` to stop, all are told.
    """
    config, optimizer = run.config, run.optimizer
    start, waited, communicated = time.perf_counter(), stream.seconds, communication.seconds
    batch = next(stream)
    losses = losses_and_gradients(run, batch, number)
    stream.prefetch()  # while the device is busy with the gradients
    finish_gradients(run.step)
    norm = gradient_norm(trained(optimizer))
    terms = losses.named()
    flags = torch.tensor([len(batch.loaded.damaged), asked()], dtype=torch.float64)
    flags = flags.to(norm.device, non_blocking=True)
    summed = sum_over_ranks(torch.cat([torch.stack(list(terms.values())).double(), flags]))
    own = torch.stack([norm, run.model.logit_scale.detach()]).double()
    *found, size, scale = torch.cat([summed, own]).tolist()  # the one time that the host waits for the device
    means = {name: value / run.place.world for name, value in zip(terms, found, strict=False)}
    means = {name: value for name, value in means.items() if math.isfinite(value)}
    finite = math.isfinite(size) and len(means) == len(terms)
    if finite:
        apply_step(run.model, optimizer, config.optim, number, run.steps, norm)
    else:
        optimizer.zero_grad(set_to_none=True)
    damaged = list(batch.loaded.damaged)
    if found[-2]:  # any rank's
        damaged = [one for part in gather_objects(damaged) for one in part]
    seconds = time.perf_counter() - start
    spent = seconds, stream.seconds - waited, communication.seconds - communicated
    times.add(*spent, batch.loaded.seconds)
    values = {
        **means,
        "skipped": not finite,
        **({} if finite else _samples_of(run, number)),
        "gradient_norm": size if math.isfinite(size) else None,
        **rates(run),
        "logit_scale": scale,
        "images_per_second": run.batch / seconds,
        **dict(zip(("step_seconds", "data_seconds", "communication_seconds"), spent, strict=True)),
        "memory_gb": memory(run.place.device) / 1e9,
    }
    return Taken(losses, values, damaged, bool(found[-1]))


def losses_and_gradients(run: Run, batch: Batch, number: int) -> Losses:
    """The losses of one batch with the noise of this step and rank; adds the gradients to the parameters."""
    config, model, device = run.config, run.model, run.place.device
    seed = seed_for(config.seed, run.place.rank)
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
    noise = model.draw_noise(batch.images, generator)
    parts = [MicroBatch(batch.images, batch.tokens, batch.superpixels, noise)]
    if config.accum_freq > 1:
        whole = batch.images, batch.tokens, batch.superpixels, noise
        parts = split(model, *whole, config.batch_size)
    holds = None
    if model.loss.mask_false_negatives:
        own = batch.loaded.facts
        everyone = [pair for part in gather_objects(own) for pair in part]
        holds = caption_holds(own, everyone).to(device)
    contrast = partial(contrastive_global, holds=holds, check=False)  # shapes: the same on every rank
    bf16 = config.precision_on(device.type) == "amp_bf16"
    return accumulate(run.step, parts, contrast, partial(torch.autocast, device.type, torch.bfloat16, bf16))


def rates(run: Run) -> dict[str, float]:
    """The largest and the smallest learning rate of the step."""
    found = [group["lr"] for group in run.optimizer.param_groups]
    return {"lr": max(found), "lower_lr": min(found)}


def memory(device: torch.device) -> float:
    """The most bytes in use so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _samples_of(run: Run, number: int) -> dict[str, Any]:
    """Positions and names of the samples of a step, on all ranks."""
    first = run.position(number - 1)
    names = [run.dataset.name(position) for position in range(first, first + run.batch)]
    return {"positions": [first, first + run.batch - 1], "samples": names}


# --- between the steps


def evaluate_if_due(run: Run, step: int) -> None:
    """Zero-shot evaluation and pictures, where they are due after `step`; the best checkpoint is kept."""
    config = run.config
    if step != run.steps and not (config.eval_every and step % config.eval_every == 0):
        return
    if not run.evaluating.wanted:
        return
    with plain(run.model) as model:
        values = run.evaluating.evaluate(model)
        picture = run.evaluating.draw(model, run.path, step) if run.place.rank == 0 else None
    if picture is not None:
        run.log.picture(step, "samples", picture)
    if values is not None:
        run.log.evaluation(step, values)
        position = run.position(step)
        checkpoint.save_if_best(run.path, step, values["miou"], run.model, run.optimizer, config, position)


def note_damage(run: Run, step: int, taken: Taken) -> None:
    """Log the samples that were left out; too many stop the run, on every rank."""
    for damage in run.damaged.add(taken.damaged):
        run.log.event("damaged", step, damage._asdict())
    if taken.damaged:
        try:
            run.damaged.check(run.position(step))
        except ValueError as error:
            raise everywhere(error) from None


def finish_log(run: Run, times: throughput.Throughput) -> None:
    """What the whole run was bound by, and what was left out."""
    report = times.report(run.step)
    if report:
        run.log.event("throughput", run.steps, report)
        run.log.say(throughput.describe(report))
    if len(run.damaged):
        run.log.event("damaged_samples", run.steps, run.damaged.summary())
        run.log.say(f"left out {len(run.damaged)} damaged samples: {run.damaged.counts()}")


def save_final(run: Run) -> None:
    """Write OUTPUT/model."""
    values = gather_whole(run.model.state_dict())
    on_first(lambda: save_model(run.model, run.path / FINAL, overwrite=True, values=values))


def _stop(run: Run, step: int) -> NoReturn:
    """Save `step` finished steps and leave."""
    run.save(step)
    if run.place.rank == 0:
        place = run.path / checkpoint.FOLDER
        print(
            f"stopped by SIGTERM: step {step} of {run.steps} is saved in {place}, --resume continues",
            file=sys.stderr,
        )
    raise SystemExit(0)


def _given_up(run: Run, step: int, skipped: int) -> str:
    newest = on_first(lambda: [saved.path.name for saved in checkpoint.find(run.path)][-1:])
    kept = f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
    return (
        f"steps {step - skipped + 1} to {step}, {skipped} in a row, had no finite loss or gradient and were "
        f"skipped; {kept}. Try a lower optim.lr, a longer optim.warmup or precision fp32, and look at the "
        f"samples of these steps, which {run.path / LOG} names"
    )
