"""Run checkpoints: all that a run needs to continue exactly, in one folder that appears whole or not at all.

RUN/checkpoints/step-000100/ holds config.json + model.safetensors (loadable by `SegCLIP.from_pretrained`),
training.safetensors (optimizer moments, states of the random generators), training.json (step, data position,
rates, settings, versions) and manifest.json (size and SHA-256 of the others). Nothing in it is code.
RUN/checkpoints/best.json names the checkpoint with the best zero-shot mIoU, which is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..config import TrainConfig, to_dict
from ..interop.checkpoint import load as load_model
from ..interop.checkpoint import save as save_model
from ..interop.files import read_safetensors, sync_folder, write_whole
from ..model.segclip import SegCLIP
from .agreement import agreed, gather_objects, on_first, share_tensors
from .distributed import own_rank, world
from .manifest import FORMAT, STATE, TENSORS, read_json, verify, write_manifest
from .optim import trained
from .parallel import gather_whole, put_whole
from .random_state import random_state, set_random_state

FOLDER = "checkpoints"
BEST = "best.json"
_NAME = re.compile(r"step-(\d{6,})$")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: the number of finished steps and its folder."""

    step: int
    path: Path


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: finished steps.
        position: samples shown.
        processes: of the run so far.
        batch_size: pairs of a process and forward pass.
        accum_freq: forward passes of a step.
    """

    step: int
    position: int
    processes: int
    batch_size: int
    accum_freq: int

    @property
    def batch(self) -> int:
        """Pairs of a step."""
        return self.batch_size * self.accum_freq * self.processes


_PROGRESS = tuple(field.name for field in dataclasses.fields(Progress))


@dataclass(frozen=True)
class Best:
    """The best evaluated checkpoint of a run and its zero-shot mIoU (0 to 1)."""

    saved: Saved
    miou: float


def find(run: Path) -> list[Saved]:
    """The checkpoints of a run, oldest first; whether they are intact says `verify`."""
    folder = run / FOLDER
    names = folder.iterdir() if folder.is_dir() else ()
    found = [Saved(int(match.group(1)), path) for path in names if (match := _NAME.match(path.name))]
    return sorted(found, key=lambda saved: saved.step)


def best(run: Path) -> Best | None:
    """The checkpoint with the best evaluation so far, or None."""
    try:
        entry = json.loads((run / FOLDER / BEST).read_text())
        step, miou = int(entry["step"]), float(entry["miou"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((Best(saved, miou) for saved in find(run) if saved.step == step), None)


# --- writing


def save(
    run: Path,
    step: int,
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    position: int | None = None,
) -> Path:
    """Write the checkpoint of `step` finished steps; then remove all but the last `config.keep` and the best.

    Every rank must call it; rank 0 writes. The folder is filled under another name, flushed, renamed, and
    read back before any older one goes: a kill or a full disk at any moment leaves the previous checkpoint
    as it was. A checkpoint of this step that is already there is left alone.

    Args:
        run: the run folder.
        step: finished steps.
        model: its weights; may be sharded.
        optimizer: its moments and rates.
        config: the run.
        position: samples shown so far; by default those of `step` steps of the present size.

    Raises:
        OSError: it could not be written, as on a full disk, or reads back other than it was written; the
            older checkpoints are all there.
    """
    target = run / FOLDER / f"step-{step:06d}"
    if on_first(target.exists):
        return target
    shown = step * config.global_batch(world()) if position is None else position
    progress = Progress(step, shown, world(), config.batch_size, config.accum_freq)
    state = _collect(progress, model, optimizer, config)
    on_first(lambda: _write(run, target, model, state, config.keep))
    return target


def save_if_best(
    run: Path,
    step: int,
    miou: float,
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    position: int | None = None,
) -> bool:
    """Save and keep the checkpoint of `step` if its mIoU beats all before; whether it does."""
    known = on_first(lambda: best(run))
    if not miou > (known.miou if known else -1.0):  # also when it is NaN
        return False
    target = save(run, step, model, optimizer, config, position)
    on_first(lambda: _name_best(run, target, step, miou, config.keep))
    return True


def _name_best(run: Path, target: Path, step: int, miou: float, keep: int) -> None:
    text = json.dumps({"checkpoint": target.name, "step": step, "miou": miou}) + "\n"
    with _explained(run, target):
        write_whole(run / FOLDER / BEST, lambda path: path.write_text(text))
    _remove_old(run, keep)


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds: whole tensors in host memory, and the rest for JSON."""

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    entry: dict[str, Any]


def _collect(
    progress: Progress, model: SegCLIP, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> _State:
    """The state of all ranks, with the large tensors on rank 0 only."""
    state = optimizer.state_dict()
    moments = {
        f"optimizer.{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    tensors = gather_whole(moments)
    generators = gather_objects(random_state())
    for rank, (random_tensors, _) in enumerate(generators):
        tensors |= {f"random.{rank}.{name}": value for name, value in random_tensors.items()}
    entry = {
        "format": FORMAT,
        "library": __version__,
        "torch": torch.__version__,
        **vars(progress),
        "groups": [{"lr": group["lr"], "names": group["names"]} for group in state["param_groups"]],
        "random": [values for _, values in generators],
        "config": to_dict(config),
    }
    return _State(gather_whole(model.state_dict()), tensors, entry)


def _write(run: Path, target: Path, model: SegCLIP, state: _State, keep: int) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    for left in (run / FOLDER).glob(".step-*.tmp"):  # of a killed process
        shutil.rmtree(left, ignore_errors=True)
    with _explained(run, target):
        try:
            _fill(temporary, model, state)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(target.parent)
    try:
        verify(target)
    except ValueError as error:
        raise OSError(
            f"checkpoint: expected to read what was written, got: {error}; nothing older was removed: look "
            "at the disk, then continue with --resume"
        ) from error
    _remove_old(run, keep)


def _fill(folder: Path, model: SegCLIP, state: _State) -> None:
    # safetensors and JSON throughout: on a full disk torch.save reports a wrong file position instead.
    from safetensors.torch import save_file

    save_model(model, folder, values=state.model)
    write_whole(folder / TENSORS, lambda path: save_file(state.training, path))
    write_whole(folder / STATE, lambda path: path.write_text(json.dumps(state.entry, indent=2) + "\n"))
    write_manifest(folder)


def _remove_old(run: Path, keep: int) -> None:
    known = best(run)
    for old in find(run)[:-keep]:
        if known is None or old != known.saved:
            shutil.rmtree(old.path)


@contextlib.contextmanager
def _explained(run: Path, target: Path) -> Iterator[None]:
    """Errors of a full disk as one OSError that says what is left and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        text = str(error)
        full = (errno.ENOSPC, errno.EDQUOT)
        if number not in full and not any(f"(os error {code})" in text for code in full):
            raise
        names = [saved.path.name for saved in find(run) if saved.path != target]
        left = f"{names[-1]} is intact" if names else "there is none before it"
        raise OSError(
            errno.ENOSPC,
            f"checkpoint: expected room for {target.name}, got a full disk; {left}: free some space (or "
            "lower keep), then continue with --resume",
            str(target.parent),
        ) from error


# --- reading


def resume(run: Path, model: SegCLIP, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Put the newest intact checkpoint into `model`, `optimizer` and the random generators of every rank.

    Damaged ones on the way to it are logged and renamed to damaged-step-..., so that the run can write theirs
    again.

    Returns:
        How far the run was, or None without any checkpoint.

    Raises:
        ValueError: none is intact, or it is of another architecture.
    """
    found = on_first(lambda: _newest_intact(run))
    if found is None:
        return None
    saved, refused = found
    progress = restore(saved, model, optimizer)
    on_first(lambda: _put_aside(saved, refused))
    return progress


def _newest_intact(run: Path) -> tuple[Saved, list[tuple[Saved, str]]] | None:
    """The checkpoint to continue from, and the newer ones that are damaged, with the reasons."""
    refused: list[tuple[Saved, str]] = []
    for saved in reversed(find(run)):
        try:
            verify(saved.path)
        except (ValueError, OSError) as error:
            refused.append((saved, str(error)))
            continue
        return saved, refused
    if refused:
        raise ValueError(
            f"resume: expected an intact checkpoint in {run / FOLDER}, got {len(refused)} refused, the "
            f"newest because {refused[0][1]}; --overwrite starts the run anew"
        )
    return None


def _put_aside(saved: Saved, refused: list[tuple[Saved, str]]) -> None:
    for damaged, reason in refused:
        aside = damaged.path.with_name(f"damaged-{damaged.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.path.rename(aside)
        _log.warning("resume: %s is refused, now %s: %s", damaged.path.name, aside.name, reason)
    if refused:
        _log.warning("resume: continuing from %s, the newest intact one", saved.path.name)


def at_path(path: Path) -> Saved:
    """The checkpoint in a folder such as RUN/checkpoints/step-000100, verified.

    Raises:
        ValueError: no such folder, another name, or damaged.
    """
    match = _NAME.match(path.name)
    if not path.is_dir() or match is None:
        expected = "'latest' or a checkpoint folder such as RUN/checkpoints/step-000100"
        raise ValueError(f"resume: expected {expected}, got {str(path)!r}")
    try:
        verify(path)
    except ValueError as error:
        raise ValueError(f"resume: expected an intact checkpoint, got: {error}") from error
    return Saved(int(match.group(1)), path)


def restore(saved: Saved, model: SegCLIP, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a verified checkpoint's values into `model`, `optimizer` and the random generators of every rank.

    Rank 0 reads and shares; generators are left alone if there were other processes then.

    Raises:
        ValueError: damaged, or of another architecture.
    """
    names = [group["names"] for group in optimizer.param_groups]
    read = agreed(lambda: _read(saved, type(model), names) if own_rank() == 0 else None)
    entry = gather_objects(read.entry if read else None)[0]
    assert entry is not None
    device = model.logit_scale.device
    values = share_tensors(read.model if read else None, device)
    tensors = share_tensors(read.training if read else None, device)
    progress = Progress(**{name: entry[name] for name in _PROGRESS})
    try:
        with torch.no_grad():
            for name, target in model.state_dict().items():
                target.copy_(put_whole(target, values[name]))
        state = optimizer.state_dict()
        for group, found in zip(state["param_groups"], entry["groups"], strict=True):
            group["lr"] = found["lr"]
        optimizer.load_state_dict({**state, "state": _moments(tensors, trained(optimizer))})
        if progress.processes == world():
            prefix = f"random.{own_rank()}."
            own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            set_random_state(own, entry["random"][own_rank()])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"resume: expected a checkpoint of this run in {saved.path}, got: {error}"
        ) from error
    return progress


def _read(saved: Saved, kind: type[SegCLIP], names: list[list[str]]) -> _State:
    """The files of a checkpoint, whose optimizer groups must be `names`."""
    try:
        _, values = load_model(kind, saved.path)
        entry, tensors = read_json(saved.path / STATE), read_safetensors(saved.path / TENSORS)
        if entry["format"] != FORMAT or entry["step"] != saved.step:
            raise ValueError(f"{STATE} is of step {entry['step']}")
        if [group["names"] for group in entry["groups"]] != names:
            raise ValueError("an optimizer of other parameters")
        _ = [entry[name] for name in (*_PROGRESS, "random")]
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"resume: expected a checkpoint of this run in {saved.path}, got: {error}"
        ) from error
    return _State(values, tensors, entry)


def _moments(tensors: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state by the number of the parameter, cut as the parameters are."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, moment = rest.partition(".")
            placed = put_whole(parameters[int(index)], value) if value.ndim else value
            found.setdefault(int(index), {})[moment] = placed
    return found
