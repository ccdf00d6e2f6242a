"""Tensor files: read without ever running code from them, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

SHOWN = 8


def read_torch(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch.save file (weights only; a leading "module." of every name is dropped).

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not such a file, truncated, or a pickle with code in it (refused, never executed).
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, found nothing at {path}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: expected a torch file of plain tensors, got {path} with other "
            f"objects or code in it (refused, nothing was executed): {_first_line(error)}"
        ) from error
    except Exception as error:  # a damaged file raises anything, down to KeyError from the unpickler
        raise ValueError(
            f"checkpoint: expected a complete torch file, got {path} ({path.stat().st_size} bytes), which is "
            f"truncated or damaged: {_first_line(error)}"
        ) from error
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"checkpoint: expected names and tensors in {path}, got {type(values).__name__}")
    names = [str(name) for name in values]
    prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
    return {str(name).removeprefix(prefix): value for name, value in values.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: damaged or truncated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, found nothing at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint: expected a complete safetensors file, got {path} ({path.stat().st_size} bytes), "
            f"which is truncated or damaged: {_first_line(error)}"
        ) from error


def check_names(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: str) -> None:
    """Raise a ValueError that lists every difference in names and shapes between two sets of tensors."""
    missing = sorted(set(expected) - set(got))
    unexpected = sorted(set(got) - set(expected))
    shapes = [
        f"{name} {tuple(got[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(got))
        if got[name].shape != expected[name].shape
    ]
    differences = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if differences:
        raise ValueError(
            f"checkpoint: expected the {len(expected)} tensors of this architecture, got {source} with "
            + "; ".join(differences)
        )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary sibling, flush it to disk and rename it to `path`: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new and renamed files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
