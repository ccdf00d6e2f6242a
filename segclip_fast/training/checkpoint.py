"""Run checkpoints: all that a run needs to continue exactly, in one folder that appears whole or not at all.

RUN/checkpoints/step-000100/ holds config.json + model.safetensors (loadable by `SegCLIP.from_pretrained`),
training.safetensors (optimizer moments, states of the random generators), training.json (step, data position,
rates, settings, versions) and manifest.json (size and SHA-256 of the others). Nothing in it is code.
RUN/checkpoints/best.json names the checkpoint with the best zero-shot mIoU, which is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..config import TrainConfig, to_dict
from ..interop.checkpoint import CONFIG, WEIGHTS
from ..interop.checkpoint import load as load_model
from ..interop.checkpoint import save as save_model
from ..interop.files import read_safetensors, sync_folder, write_whole
from ..model.segclip import SegCLIP
from .random_state import random_state, set_random_state

FOLDER = "checkpoints"
TENSORS, STATE, MANIFEST, BEST = "training.safetensors", "training.json", "manifest.json", "best.json"
FILES = (CONFIG, WEIGHTS, TENSORS, STATE)
FORMAT = "segclip_fast training"
_NAME = re.compile(r"step-(\d{6,})$")
_BLOCK = 1 << 20  # bytes hashed at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: the number of finished steps and its folder."""

    step: int
    path: Path


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


def save(run: Path, step: int, model: SegCLIP, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Path:
    """Write the checkpoint of `step` finished steps; then remove all but the last `config.keep` and the best.

    The folder is filled under another name, flushed, renamed, and read back before any older one goes: a kill
    or a full disk at any moment leaves the previous checkpoint as it was. A checkpoint of this step that is
    already there is left alone.

    Raises:
        OSError: it could not be written, as on a full disk, or reads back other than it was written; the
            older checkpoints are all there.
    """
    target = run / FOLDER / f"step-{step:06d}"
    if target.exists():
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    for left in (run / FOLDER).glob(".step-*.tmp"):  # of a killed process
        shutil.rmtree(left, ignore_errors=True)
    with _explained(run, target):
        try:
            _fill(temporary, step, model, optimizer, config)
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
    _remove_old(run, config.keep)
    return target


def save_if_best(
    run: Path,
    step: int,
    miou: float,
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> bool:
    """Save and keep the checkpoint of `step` if its mIoU beats all before; whether it does."""
    known = best(run)
    if not miou > (known.miou if known else -1.0):  # also when it is NaN
        return False
    target = save(run, step, model, optimizer, config)
    text = json.dumps({"checkpoint": target.name, "step": step, "miou": miou}) + "\n"
    with _explained(run, target):
        write_whole(run / FOLDER / BEST, lambda path: path.write_text(text))
    _remove_old(run, config.keep)
    return True


def _fill(
    folder: Path, step: int, model: SegCLIP, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> None:
    # safetensors and JSON throughout: on a full disk torch.save reports a wrong file position instead.
    from safetensors.torch import save_file

    save_model(model, folder)
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    random_tensors, random_values = random_state()
    tensors |= {f"random.{name}": value for name, value in random_tensors.items()}
    entry = {
        "format": FORMAT,
        "library": __version__,
        "torch": torch.__version__,
        "step": step,
        "position": step * config.batch_size,
        "groups": [{"lr": group["lr"], "names": group["names"]} for group in state["param_groups"]],
        "random": random_values,
        "config": to_dict(config),
    }
    write_whole(folder / TENSORS, lambda path: save_file(tensors, path))
    write_whole(folder / STATE, lambda path: path.write_text(json.dumps(entry, indent=2) + "\n"))
    files = {name: _measure(folder / name) for name in FILES}
    manifest = {"format": FORMAT, "files": files}
    write_whole(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))


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


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        ValueError: a file is missing, cut or altered, or there is no manifest; names the file.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        old = (path / "training.pt").exists()
        reason = "it is of an earlier version; --init takes the model in it" if old else "it is incomplete"
        raise ValueError(f"{manifest} is missing ({reason})")
    files = _read_json(manifest).get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise ValueError(f"{manifest} does not list the files {', '.join(FILES)}")
    for name in FILES:
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        try:
            size, digest = int(files[name]["size"]), str(files[name]["sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{manifest} gives no size and SHA-256 of {name}") from error
        if file.stat().st_size != size:
            raise ValueError(f"{file} is cut: {file.stat().st_size} bytes instead of {size}")
        if _measure(file)["sha256"] != digest:
            raise ValueError(f"{file} is altered: its SHA-256 is not the one in {MANIFEST}")


def resume(run: Path, model: SegCLIP, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest intact checkpoint into `model`, `optimizer` and the random generators.

    Damaged ones on the way to it are logged and renamed to damaged-step-..., so that the run can write theirs
    again.

    Returns:
        The number of finished steps; 0 without any checkpoint.

    Raises:
        ValueError: none is intact, or it is of another architecture.
    """
    refused: list[tuple[Saved, str]] = []
    for saved in reversed(find(run)):
        try:
            verify(saved.path)
        except (ValueError, OSError) as error:
            refused.append((saved, str(error)))
            continue
        restore(saved, model, optimizer)
        for damaged, reason in refused:
            aside = damaged.path.with_name(f"damaged-{damaged.path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.path.rename(aside)
            _log.warning("resume: %s is refused, now %s: %s", damaged.path.name, aside.name, reason)
        if refused:
            _log.warning("resume: continuing from %s, the newest intact one", saved.path.name)
        return saved.step
    if refused:
        raise ValueError(
            f"resume: expected an intact checkpoint in {run / FOLDER}, got {len(refused)} refused, the "
            f"newest because {refused[0][1]}; --overwrite starts the run anew"
        )
    return 0


def restore(saved: Saved, model: SegCLIP, optimizer: torch.optim.Optimizer) -> None:
    """Put a verified checkpoint's values into `model`, `optimizer` and the random generators.

    Raises:
        ValueError: damaged, or of another architecture.
    """
    try:
        _, values = load_model(type(model), saved.path)
        entry, tensors = _read_json(saved.path / STATE), read_safetensors(saved.path / TENSORS)
        if entry["format"] != FORMAT or entry["step"] != saved.step:
            raise ValueError(f"{STATE} is of step {entry['step']}")
        state = optimizer.state_dict()
        if [group["names"] for group in entry["groups"]] != [g["names"] for g in state["param_groups"]]:
            raise ValueError("an optimizer of other parameters")
        for group, found in zip(state["param_groups"], entry["groups"], strict=True):
            group["lr"] = found["lr"]
        model.load_state_dict(values)
        optimizer.load_state_dict({**state, "state": _moments(tensors)})
        prefix = "random."
        set_random_state(
            {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)},
            entry["random"],
        )
    except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
        raise ValueError(
            f"resume: expected a checkpoint of this run in {saved.path}, got: {error}"
        ) from error


def _moments(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state by the number of the parameter."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, moment = rest.partition(".")
            found.setdefault(int(index), {})[moment] = value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__} instead of names and values")
    return values


def _measure(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, read from the disk where the system lets us ask for that."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # forget the copy in memory
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}
