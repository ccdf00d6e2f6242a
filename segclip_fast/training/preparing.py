"""What a run needs before its first step: model, data, optimizer, log, and where it stopped before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import TrainConfig, to_dict
from ..data.opening import describe as describe_source
from ..data.opening import make_source
from ..data.pipeline import Damage, PairDataset
from ..data.pseudo_labels import labels_on_device
from ..interop.checkpoint import load as load_model
from ..model.segclip import SegCLIP
from . import checkpoint
from .accumulation import Step
from .agreement import agreed, everywhere, in_turn, on_first
from .checkpoint import Progress
from .damage import Damaged
from .distributed import Place, process_group
from .evaluating import Evaluating
from .log import RunLog, read_log
from .optim import build_optimizer
from .parallel import wrap
from .reporters import Reporter, make_reporters, require_packages
from .run_folder import check_room, prepare_folder, same_architecture

WAIT = 1800.0  # seconds that a process waits for another, such as for the first to index its shards


@dataclass
class Run:
    """A run that is ready for its next step.

    Attributes:
        config: its settings.
        place: this process among all.
        model: the model on its device.
        step: what computes the losses of a micro-batch, wrapped for several processes.
        optimizer: of the model's parameters.
        dataset: samples by position.
        progress: finished steps and shown samples at the start.
        steps: number of the last step.
        log: of the run; silent on all processes but the first.
        damaged: samples that were left out.
        evaluating: zero-shot evaluation and pictures.
    """

    config: TrainConfig
    place: Place
    model: SegCLIP
    step: Step
    optimizer: torch.optim.Optimizer
    dataset: PairDataset
    progress: Progress
    steps: int
    log: RunLog
    damaged: Damaged
    evaluating: Evaluating

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    def position(self, step: int) -> int:
        """Samples shown when `step` steps are finished."""
        return self.progress.position + (step - self.progress.step) * self.batch

    @property
    def batch(self) -> int:
        """Pairs of a step, of all processes."""
        return self.config.global_batch(self.place.world)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` finished steps."""
        position = self.position(step)
        checkpoint.save(self.path, step, self.model, self.optimizer, self.config, position)


# --- before the first step


@contextlib.contextmanager
def processes(config: TrainConfig) -> Iterator[Place]:
    """This process among those of torchrun, or alone.

    Raises:
        ValueError: a device that is not there, or does not go with several processes.
        OSError: the port of the rendezvous is in use.
    """
    try:
        device = choose_device(config.device)
    except ValueError as error:
        raise everywhere(error) from None
    if "WORLD_SIZE" not in os.environ:
        yield Place(0, 1, 0, device)
        return
    if device.index is not None:
        expected = f"{device.type!r} under torchrun, which numbers it"
        raise everywhere(ValueError(f"device: expected {expected}, got {config.device!r}"))
    backend = None if config.dist_backend == "auto" else config.dist_backend
    with process_group(backend, WAIT, device.type) as place:
        yield place


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


def prepare(config: TrainConfig, place: Place) -> Run:
    """Everything that a run needs, continued from a checkpoint where it is to be."""
    agreed(lambda: require_packages(config.report_to) if place.rank == 0 else None)
    labels_here = agreed(lambda: labels_on_device(config.data.superpixels, place.device))
    source = in_turn(place, lambda: make_source(config.data, config.model))
    dataset = PairDataset(source, config.data, config.model, config.seed, superpixels=not labels_here)
    evaluating = agreed(lambda: Evaluating(config, source))
    path, resume = Path(config.output), _resume(config)
    if not resume:  # before there is a folder
        total_steps(config, len(source), beginning(config, place), place.world)
    torch.manual_seed(config.seed)
    model = in_turn(place, lambda: initial_model(config))
    on_first(lambda: check_room(path, model))
    on_first(lambda: prepare_folder(path, config, resume))

    model.to(place.device).train()
    step = wrap(model, config, place)
    optimizer = build_optimizer(model, config.optim)
    notes: list[str] = []
    progress = continued(config, resume, model, optimizer, place, notes)
    steps = total_steps(config, len(source), progress, place.world)
    first = place.rank == 0
    before = on_first(lambda: damaged_before(path, progress.step))
    reporters = agreed(lambda: _reporters(config, path, progress.step) if first else [])
    log = RunLog(path, progress.step, steps, config.quiet, first, reporters)
    pairs = describe_source(source)
    if progress.step < steps:
        log.event("start", progress.step, {"pairs": pairs, "processes": place.world, "notes": notes})
        for line in (pairs, *notes):
            log.say(line)
    damaged = Damaged(config.data.max_damaged, before)
    return Run(config, place, model, step, optimizer, dataset, progress, steps, log, damaged, evaluating)


def initial_model(config: TrainConfig) -> SegCLIP:
    """The model that a run starts from: fresh, a checkpoint's, or CLIP's towers.

    Raises:
        ValueError: the starting point has another architecture than the run.
    """
    kind, _, rest = config.init.partition(":")
    if config.init == "scratch":
        return SegCLIP(config.model, config.loss, config.backend)
    if kind == "clip":
        name, _, pretrained = rest.partition(":")
        model = SegCLIP.from_clip(
            name,
            pretrained or None,
            image_size=config.model.vision.image_size,
            group_after=config.model.vision.group_after,
            grouping=config.model.grouping,
            reconstruction=config.model.reconstruction,
            loss=config.loss,
        )
    else:
        model, values = load_model(SegCLIP, Path(config.init))
        model.load_state_dict(values)
        model.loss = config.loss
    model.backend = config.backend
    same_architecture(model.config, config.model, config.init)
    return model


def _resume(config: TrainConfig) -> str:
    """`config.resume`; "latest" where torchrun has started the processes again after one failed."""
    return "latest" if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else config.resume


def beginning(config: TrainConfig, place: Place) -> Progress:
    """Of a run without a checkpoint."""
    return Progress(0, 0, place.world, config.batch_size, config.accum_freq)


def continued(
    config: TrainConfig,
    resume: str,
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    place: Place,
    notes: list[str],
) -> Progress:
    """Where the run stands, with its checkpoint in `model` and `optimizer`; `notes` says what has changed.

    Raises:
        ValueError: no usable checkpoint, or other pairs per step with as many processes.
    """
    if not resume:
        return beginning(config, place)
    if resume != "latest":
        saved = on_first(lambda: checkpoint.at_path(Path(resume)))
        found = checkpoint.restore(saved, model, optimizer)
        notes.append(f"begins with {resume}, step {found.step}")
    else:
        newest = checkpoint.resume(Path(config.output), model, optimizer)
        if newest is None:
            return beginning(config, place)
        found = newest
    batch, before = config.global_batch(place.world), found.batch
    if found.processes == place.world and batch != before and resume == "latest":
        names = ("batch_size", "accum_freq")
        different = [name for name in names if getattr(config, name) != getattr(found, name)]
        expected = f"the settings of the run in {config.output}"
        raise everywhere(ValueError(f"resume: expected {expected}, got other {different}"))
    if found.processes != place.world:
        same = "as many pairs per step" if batch == before else f"{batch} pairs per step instead of {before}"
        notes.append(
            f"continues with {place.world} processes instead of {found.processes}, {same}: no sample is left "
            "out or shown twice, but noise and rounding differ: not bit for bit the uninterrupted run"
        )
    return found


def damaged_before(run: Path, step: int) -> list[Damage]:
    """The damaged samples in the log up to `step`: later lines are dropped, their steps come again."""
    return [Damage(e["key"], e["reason"]) for e in read_log(run, "damaged") if e["step"] <= step]


def total_steps(config: TrainConfig, samples: int, progress: Progress, world: int) -> int:
    """The number of the last step.

    Raises:
        ValueError: the epochs make no step.
    """
    if not config.epochs:
        return config.steps
    batch = config.global_batch(world)
    left = int(config.epochs * samples - progress.position) // batch
    if progress.step + left < 1:
        got = f"{config.epochs} epochs of {samples} pairs"
        raise everywhere(ValueError(f"epochs: expected at least one step of {batch} pairs, got {got}"))
    return progress.step + max(left, 0)


def _reporters(config: TrainConfig, run: Path, start: int) -> list[Reporter]:
    return make_reporters(config.report_to, run, to_dict(config), start)
