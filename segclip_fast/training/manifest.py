"""What a checkpoint consists of, with sizes and SHA-256, so that damage is found before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..interop.checkpoint import CONFIG, WEIGHTS
from ..interop.files import write_whole

TENSORS, STATE, MANIFEST = "training.safetensors", "training.json", "manifest.json"
FILES = (CONFIG, WEIGHTS, TENSORS, STATE)
FORMAT = "segclip_fast training"
_BLOCK = 1 << 20  # bytes hashed at a time


def write_manifest(folder: Path) -> None:
    """Read the files of a checkpoint back and write down their sizes and SHA-256."""
    content = {"format": FORMAT, "files": {name: measure(folder / name) for name in FILES}}
    write_whole(folder / MANIFEST, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))


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
    files = read_json(manifest).get("files")
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
        if measure(file)["sha256"] != digest:
            raise ValueError(f"{file} is altered: its SHA-256 is not the one in {MANIFEST}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError for anything else."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__} instead of names and values")
    return values


def measure(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, read from the disk where the system lets us ask for that."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # forget the copy in memory
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}
