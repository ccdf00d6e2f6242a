"""This library's checkpoint folder (config.json + model.safetensors), and the entry that loads any layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import LossConfig, SegCLIPConfig, from_dict, to_dict
from .authors import from_authors, infer_config
from .files import check_names, read_safetensors, read_torch, sync_folder, write_whole

if TYPE_CHECKING:
    from ..model.segclip import SegCLIP

FORMAT = "segclip_fast"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load(
    cls: type[SegCLIP], path: Path, *, config: SegCLIPConfig | None = None
) -> tuple[SegCLIP, dict[str, Tensor]]:
    """A model of the right architecture and the values to put into it.

    Args:
        cls: the model class.
        path: our folder, or the authors' file.
        config: architecture of an authors' file whose heads cannot be told from its shapes (64 wide heads are
            assumed otherwise); not for folders, which carry their own.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: damaged, or names or shapes differ from the architecture.
    """
    if not path.exists():
        raise FileNotFoundError(f"path: expected a checkpoint folder or file, found nothing at {path}")
    if not path.is_dir():
        values = read_torch(path)
        model = build(cls, config or infer_config(values, str(path)))
        return model, from_authors(model, values, str(path))
    if config is not None:
        raise ValueError(f"config: expected None for the folder {path}, which has its own {CONFIG}, got one")
    model_config, loss = read_config(path / CONFIG)
    values = read_safetensors(path / WEIGHTS)
    model = build(cls, model_config, loss)
    check_names(model.state_dict(), values, str(path / WEIGHTS))
    return model, values


def build(cls: type[SegCLIP], config: SegCLIPConfig, loss: LossConfig | None = None) -> SegCLIP:
    """A model with throw-away initial values; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return cls(config, loss)


def read_config(path: Path) -> tuple[SegCLIPConfig, LossConfig]:
    """The architecture and losses written by `save`.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not JSON, of another format, or unknown fields.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected {CONFIG} beside the weights, found nothing at {path}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint: expected JSON in {path}, got: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'checkpoint: expected "format": "{FORMAT}" in {path}, got something else')
    return (
        from_dict(SegCLIPConfig, values.get("model", {}), "model"),
        from_dict(LossConfig, values.get("loss", {}), "loss"),
    )


def save(
    model: SegCLIP, folder: Path, *, overwrite: bool = False, values: Mapping[str, Tensor] | None = None
) -> None:
    """Write config.json and model.safetensors into `folder`, each whole or not at all.

    `values` are the model's tensors by name where it does not hold them whole itself.

    Raises:
        FileExistsError: the folder holds a checkpoint already and `overwrite` is False.
    """
    from safetensors.torch import save_file

    if (folder / WEIGHTS).exists() and not overwrite:
        raise FileExistsError(
            f"folder: expected one without a checkpoint, got {folder} with {WEIGHTS}; pass overwrite=True"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "version": 1, "model": to_dict(model.config), "loss": to_dict(model.loss)}
    given = model.state_dict() if values is None else values
    tensors = {name: value.detach().cpu().contiguous() for name, value in given.items()}
    write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_whole(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    sync_folder(folder)
