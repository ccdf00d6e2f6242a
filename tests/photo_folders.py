"""Folders of photos for tests, and the command line over them with a model that sees colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_windows import COLOURS, GREY, ColourModel, painted

from segclip_fast import segment as cli

NAMES = ["0.png", "1.jpg", "sub/2.PNG", "sub/deep/3.webp", "sub/deep/4.png", "z.tif"]
MASKS = ["0.png", "1.png", "sub/2.png", "sub/deep/3.png", "sub/deep/4.png", "z.png"]


def write(root: Path, *names: str) -> Path:
    """Photos of stripes, each of another size."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stripes = painted(COLOURS["red"], GREY, COLOURS["blue"], height=40 + 8 * i)
        Image.fromarray(np.roll(stripes, 8 * i, axis=1)).save(path)
    return root


def truncated(path: Path) -> None:
    """A JPEG cut off in the middle of its pixels."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def give_colour_models(monkeypatch: pytest.MonkeyPatch) -> list[ColourModel]:
    """Let the command line load a model that sees colours, whatever is asked for; returns those it loads."""
    models: list[ColourModel] = []

    def load(spec: str, device: str) -> ColourModel:
        models.append(ColourModel().eval())
        return models[-1]

    monkeypatch.setattr(cli, "load_model", load)
    return models


def call(*options: str, photos="photos", labels="red, blue, green", output="masks") -> int:
    """The command line over a folder of the working folder; its exit code."""
    given = ["--labels", labels, "--checkpoint", "weights", "--output", str(output)]
    return cli.main([str(photos), *given, *options])


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
