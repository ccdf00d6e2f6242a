"""Run checkpoints: model, optimizer and step in one folder that appears whole or not at all.

RUN/checkpoints/step-000100/ holds config.json + model.safetensors (loadable by `SegCLIP.from_pretrained`) and
training.pt (optimizer moments and the step; plain tensors, no code). Data order, crops and noise are
functions of (seed, step), so nothing else is needed to continue exactly.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..interop.checkpoint import load as load_model
from ..interop.checkpoint import save as save_model
from ..interop.files import sync_folder, write_whole
from ..model.segclip import SegCLIP

FOLDER, STATE = "checkpoints", "training.pt"
KEPT = 2
_NAME = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: the number of finished steps and its folder."""

    step: int
    path: Path


def find(run: Path) -> list[Saved]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    names = folder.iterdir() if folder.is_dir() else ()
    found = [Saved(int(match.group(1)), path) for path in names if (match := _NAME.match(path.name))]
    return sorted(found, key=lambda saved: saved.step)


def save(run: Path, step: int, model: SegCLIP, optimizer: torch.optim.Optimizer) -> Path:
    """Write the checkpoint of `step` finished steps; older ones than the last two are removed afterwards.

    The folder is filled under another name, flushed, and renamed: a kill at any moment leaves the previous
    checkpoint as it was. A checkpoint of this step that is already there is left alone.
    """
    target = run / FOLDER / f"step-{step:06d}"
    if target.exists():
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(model, temporary)
    state = {"step": step, "optimizer": optimizer.state_dict()}
    write_whole(temporary / STATE, lambda path: torch.save(state, path))
    temporary.rename(target)
    sync_folder(target.parent)
    for old in find(run)[:-KEPT]:
        shutil.rmtree(old.path)
    return target


def restore(saved: Saved, model: SegCLIP, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's values into `model` and `optimizer`.

    Raises:
        ValueError: damaged (names the file and the checkpoint before it), or of another architecture.
    """
    try:
        _, values = load_model(type(model), saved.path)
        model.load_state_dict(values)
        state = _read_state(saved.path / STATE)
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, FileNotFoundError, KeyError, RuntimeError) as error:
        others = [str(other.path) for other in find(saved.path.parents[1]) if other.step < saved.step]
        hint = f"; to continue from {others[-1]}, remove {saved.path}" if others else ""
        raise ValueError(
            f"resume: expected a complete checkpoint in {saved.path}, got: {error}{hint}"
        ) from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(f"{path.name} ({size} bytes) cannot be read: {error}") from error
