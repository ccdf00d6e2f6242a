"""Pictures of a segmentation: colours that stay apart, the overlay, its legend.

Shape legend: H W the photo's own size, C labels.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from .vocabularies import BACKGROUND

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from .segmentation import Segmentation

# OKLab (https://bottosson.github.io/posts/oklab): lightness and colour axes -> cone responses -> linear sRGB
_LAB_TO_CONES = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.291485548],
    ]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)


def distinct_colours(count: int) -> np.ndarray:
    """Colours that stay apart, (count, 3) uint8; the first ones do not change with `count`."""
    table = _colour_table()
    return table[np.arange(count) % len(table)]


@functools.cache
def _colour_table() -> np.ndarray:
    """All colours to choose from, each the one farthest from those before it, (563, 3) uint8.

    They lie on a grid in OKLab, where distances follow the eye: 40 hues, five levels of lightness (none too
    dark or light for a photo) and of chroma, as far as sRGB can show them. The first is the reddest.
    """
    light, chroma, turn = np.meshgrid(
        [0.52, 0.60, 0.68, 0.76, 0.84], [0.08, 0.12, 0.16, 0.20, 0.24], np.arange(40) / 40, indexing="ij"
    )
    hue = 2 * np.pi * turn + 0.45
    lab = np.stack((light, chroma * np.cos(hue), chroma * np.sin(hue)), axis=-1).reshape(-1, 3)
    linear = (lab @ _LAB_TO_CONES.T) ** 3 @ _CONES_TO_RGB.T
    shown = ((linear > -0.02) & (linear < 1.02)).all(axis=1)
    lab, linear = lab[shown], linear[shown].clip(0, 1)
    order, nearest = [int((linear @ [1, -1, -1]).argmax())], np.full(len(lab), np.inf)
    while len(order) < len(lab):
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[order[-1]], axis=1))
        order.append(int(nearest.argmax()))
    linear = linear[order]
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255.0 * gamma).astype(np.uint8)


def row_blocks(labels: np.ndarray) -> list[slice]:
    """Rows in blocks of about a million pixels, so that float copies of a large photo stay small."""
    step = max(1, 2**20 // labels.shape[1])
    return [slice(start, start + step) for start in range(0, labels.shape[0], step)]


def borders(labels: np.ndarray) -> np.ndarray:
    """Pixels where the label changes, (H, W) bool; the line grows with the photo."""
    line = np.zeros(labels.shape, dtype=bool)
    line[1:] |= labels[1:] != labels[:-1]
    line[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    for _ in range(round(min(labels.shape) / 400)):
        line[1:] |= line[:-1].copy()
        line[:, 1:] |= line[:, :-1].copy()
    return line


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except TypeError:  # Pillow 10.0 has one size only
        return ImageFont.load_default()


def with_legend(photo: PILImage, result: Segmentation) -> PILImage:
    """`photo` above a white strip that names the labels present, the largest first."""
    from PIL import Image, ImageDraw

    size = int(np.clip(math.sqrt(photo.width * photo.height) / 28, 12, 60))
    font, margin = _font(size), size // 2
    share = result.coverage
    present = sorted(
        (i for i, name in enumerate(result.names) if share[name] > 0), key=lambda i: -share[result.names[i]]
    )
    texts = [f"{result.names[i]}  {share[result.names[i]]:.0%}" for i in present]
    measure = ImageDraw.Draw(photo)
    widths = [size + margin + math.ceil(measure.textlength(text, font=font)) for text in texts]
    width = max(photo.width, max(widths) + 2 * margin)
    places, x, row = [], margin, 0
    for entry in widths:
        if x > margin and x + entry + margin > width:
            x, row = margin, row + 1
        places.append((x, photo.height + margin + row * (size + margin)))
        x += entry + 2 * margin
    canvas = Image.new("RGB", (width, photo.height + margin + (row + 1) * (size + margin)), "white")
    canvas.paste(photo, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, text, (x, y) in zip(present, texts, places, strict=True):
        colour = tuple(int(c) for c in result.colours[i])
        fill = None if result.names[i] == BACKGROUND else colour  # the background is not painted
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=fill, outline=colour)
        draw.text((x + size + margin, y + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas
