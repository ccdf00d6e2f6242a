"""Draws docs/superpixels.png: photographs, their superpixels at the paper's setting, their patch labels.

    python benchmarks/superpixel_picture.py

Nothing is written unless ours and scikit-image's labels (with a stable argsort) are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from harness.machine import ROOT
from harness.pictures import PAPER, SIDE, photo_paths
from PIL import Image, ImageDraw, ImageFont
from skimage.color import rgb2lab
from superpixel_agreement import PATCH, stable_scikit

from segclip_fast.ops import felzenszwalb, patch_labels

PICTURE = ROOT / "docs" / "superpixels.png"
PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png")
COLUMNS = (
    ("photograph", f"{SIDE} x {SIDE} pixels"),
    ("segclip_fast", "scale {scale:g}, sigma {sigma:g}, min_size {min_size:g}".format(**PAPER)),
    ("scikit-image", "the same labels, pixel for pixel"),
    ("patch labels", f"one for each of {SIDE // PATCH} x {SIDE // PATCH} patches"),
)
GAP, HEAD = 16, 52  # pixels between the cells, above them
INK, GREY, LINE = (20, 20, 20), (110, 110, 110), (255, 235, 0)
LEVELS = 64  # per colour channel: fewer make a smaller file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE, help="PNG to write")
    options = parser.parse_args()
    paths = {path.name: path for path in photo_paths()}
    rows = [cells_of(squared(Image.open(paths[name]).convert("RGB"))) for name in PHOTOS]
    sheet(rows).save(options.output, optimize=True)
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB")


def squared(photo: Image.Image) -> np.ndarray:
    """The central square of a photograph, scaled to (224, 224, 3) uint8."""
    side = min(photo.size)
    left, top = ((extent - side) // 2 for extent in photo.size)
    square = photo.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def cells_of(photo: np.ndarray) -> list[np.ndarray]:
    """The columns of a photograph (224, 224, 3), each (224, 224, 3) uint8."""
    ours = felzenszwalb(photo, **PAPER)  # (H, W)
    theirs = stable_scikit(photo, PAPER)
    np.testing.assert_array_equal(ours, theirs)
    shown = np.round(np.round(photo / 255 * (LEVELS - 1)) * 255 / (LEVELS - 1)).astype(np.uint8)
    return [shown, outlined(shown, ours), outlined(shown, theirs), coloured(patch_labels(ours, PATCH))]


def outlined(photo: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: where two of the labels (H, W) meet, a line of two pixels."""
    edge = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return np.where(edge[..., None], np.array(LINE, np.uint8), photo)


def coloured(labels: np.ndarray) -> np.ndarray:
    """Patch labels (h, w) as squares, (224, 224, 3) uint8."""
    names, index = np.unique(labels, return_inverse=True)
    palette = distinct_colours(len(names))
    squares = palette[index.reshape(labels.shape)].repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    squares[::PATCH] = squares[:, ::PATCH] = 255
    return squares


def distinct_colours(count: int) -> np.ndarray:
    """(count, 3) uint8: each the candidate that looks least like those before it."""
    steps = np.linspace(75, 235, 9).astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    vivid = np.ptp(candidates, axis=-1)
    candidates = candidates[(vivid >= 60) & (vivid <= 130)]  # neither grey nor glaring
    looks = rgb2lab(candidates / 255)  # distances are differences as seen
    chosen = [0]
    nearest = np.full(len(looks), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, np.linalg.norm(looks - looks[chosen[-1]], axis=-1))
        chosen.append(int(nearest.argmax()))
    return candidates[chosen]


def sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    """Cells (224, 224, 3) in rows and columns under the columns' names."""
    step = SIDE + GAP
    picture = Image.new("RGB", (GAP + step * len(COLUMNS), HEAD + step * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for x, (name, detail) in enumerate(COLUMNS):
        middle = GAP + x * step + SIDE // 2
        draw.text((middle, 18), name, INK, ImageFont.load_default(19), anchor="mm")
        draw.text((middle, 38), detail, GREY, ImageFont.load_default(13), anchor="mm")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            picture.paste(Image.fromarray(cell), (GAP + x * step, HEAD + y * step))
    return picture


if __name__ == "__main__":
    main()
