"""The stored outputs of the authors' model, and our model with the weights they were made with."""

from __future__ import annotations

import functools
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from segclip_fast import SegCLIP
from segclip_fast.interop.authors import from_authors, infer_config
from segclip_fast.model.reconstruction import sincos_positions


def golden_folder() -> Path | None:
    """Where the stored numbers are: SEGCLIP_GOLDEN, or ../shared/golden beside the checkout."""
    named = os.environ.get("SEGCLIP_GOLDEN")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "golden"
    return folder if (folder / "model.pt").is_file() else None


requires_golden = pytest.mark.skipif(
    golden_folder() is None, reason="no stored outputs: set SEGCLIP_GOLDEN or put them at ../shared/golden"
)


def golden(name: str) -> dict:
    """The stored file `name`."""
    folder = golden_folder()
    assert folder is not None
    return torch.load(folder / name, weights_only=True)


def recipe(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The agreed value of the authors' parameter `name`, a function of its name and shape alone."""
    if name.endswith("decoder_pos_embed"):
        return sincos_positions(round((shape[1] - 1) ** 0.5), shape[2])[None]
    if name.endswith("logit_scale"):
        return torch.tensor(4.0)
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    z = np.random.RandomState(seed).standard_normal(shape)
    if len(shape) == 1 and name.endswith("weight"):
        base = 0.3 if ".cross_ln." in name or ".k_ln." in name else 1.0
        z = base * (1 + 0.1 * z)
    elif len(shape) == 1:
        z = 0.05 * z
    elif name.endswith("visual.positional_embedding"):
        z = 0.5 * z
    elif name.endswith(("positional_embedding", "token_embedding.weight", "mask_token")):
        z = 0.1 * z
    elif name.endswith(("visual.proj", "text_projection")):
        z = z / np.sqrt(shape[0])
    elif not name.endswith("semantic_center"):
        z = z / np.sqrt(np.prod(shape[1:]))
        if name.endswith(("out_proj.weight", "c_proj.weight")):
            z = 0.3 * z
    return torch.from_numpy(z.astype(np.float32))


@functools.cache
def recipe_state() -> dict[str, torch.Tensor]:
    """All 415 tensors in the authors' layout."""
    folder = golden_folder()
    assert folder is not None
    shapes = json.loads((folder / "checkpoint_shapes.json").read_text())
    return {name: recipe(name, tuple(shape)) for name, shape in shapes.items()}


def golden_model() -> SegCLIP:
    """A fresh model with the recipe's weights, in evaluation mode."""
    state = recipe_state()
    model = SegCLIP(infer_config(state, "recipe"))
    model.load_state_dict(from_authors(model, state, "recipe"))
    return model.eval()
