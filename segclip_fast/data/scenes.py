"""Embedded scenes: endless, seeded, captioned pictures with pixel-exact ground truth and no download.

A scene is a background material with one or two blobs of other materials on it. Its caption names one of them
("a photo of a zebra") or several ("zebra and lava next to grass"), as captions in the wild do.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from . import materials
from .sample import RawSample

MATERIALS: tuple[str, ...] = tuple(materials.BY_NAME)
MIN_SIZE, MAX_SIZE = 16, 1024
_SINGLE_SHARE = 0.3  # of all captions name one concept only

# Captions by the number of concepts they name. ON: the last one is the background, so that "on" is true.
_ONE = ("a photo of {}", "a photo of a {}", "a picture of {}")
_TWO = (
    "{} and {}",
    "{} next to {}",
    "{} beside {}",
    "{} with {}",
    "a photo of {} and {}",
    "a photo of a {} and a {}",
    "a picture of {} next to {}",
)
_TWO_ON = ("{} on {}", "a photo of {} on {}", "{} in front of {}")
_THREE = ("{}, {} and {}", "{} and {} next to {}", "{} with {} and {}", "a photo of {}, {} and {}")
_THREE_ON = ("{} and {} on {}", "{} and {} in front of {}", "a photo of {} and {} on {}")
_SPLITS = ("train", "val")
_INDEX_BITS = 32


def make_scene(seed: int, size: int = 64) -> RawSample:
    """Draw one scene; the same seed gives the same bytes, and the same scene at every size.

    (The same bytes on one machine; another processor or NumPy may round a colour to its neighbour.)

    Each blob covers 12% to 40% of the picture and no two regions share a material.

    Args:
        seed: any non-negative integer.
        size: side of the square picture in pixels, 16 to 1024.

    Returns:
        A RawSample whose mask indexes `MATERIALS`; `content` names every visible material, background last,
        `mentioned` those that the caption names.

    Raises:
        ValueError: a negative seed or a size out of range.
    """
    seed, size = operator.index(seed), operator.index(size)
    if seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size: expected {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
    rng = np.random.default_rng(seed)
    blob_count = 1 + int(rng.random() < 0.6)
    chosen = rng.choice(len(MATERIALS), size=blob_count + 1, replace=False)  # background last
    content = tuple(MATERIALS[index] for index in chosen)
    caption, mentioned = _caption(content, rng)
    canvas = materials.canvas(size)
    region = _regions(canvas, blob_count, rng)  # (S, S) uint8: which of `chosen` is where
    levels = np.zeros((size, size), dtype=np.uint16)
    ramps = []
    for number, name in enumerate(content):
        material = materials.BY_NAME[name]
        field = material.render_levels(canvas, rng)
        np.copyto(levels, field + np.uint16(number * materials.LEVELS), where=region == number)
        ramps.append(material.render_ramp(rng))
    image = np.concatenate(ramps).take(levels, axis=0)  # (S, S, 3)
    return RawSample(image, caption, chosen.astype(np.int64).take(region), content, mentioned)


def caption_vocabulary() -> tuple[str, ...]:
    """Every word that a scene's caption or the prompt "a photo of a {}." can contain, lower-case, sorted."""
    templates = (*_ONE, *_TWO, *_TWO_ON, *_THREE, *_THREE_ON, "a photo of a {}.")
    words = " ".join(templates).translate(str.maketrans("{},.", "    ")).split()
    return tuple(sorted({*words, *MATERIALS}))


class SceneSource:
    """A finite, indexable window on the endless set of scenes (an ImageTextSource).

    Args:
        length: number of scenes, at least 1.
        seed: chooses the window; different seeds share no scene.
        size: side of the pictures in pixels.
        split: "train" or "val"; for any two seeds the two splits share no scene.

    Raises:
        ValueError: an argument out of range.
    """

    class_names: Sequence[str] = MATERIALS

    def __init__(self, length: int, seed: int = 0, size: int = 64, split: str = "train") -> None:
        if not 1 <= length <= 2**_INDEX_BITS:
            raise ValueError(f"length: expected 1 to 2**{_INDEX_BITS} scenes, got {length}")
        if operator.index(seed) < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed}")
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"size: expected {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
        if split not in _SPLITS:
            raise ValueError(f"split: expected one of {_SPLITS}, got {split!r}")
        self.length, self.seed, self.size, self.split = length, operator.index(seed), size, split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RawSample:
        """Scene number `index`; the key of its generator is (seed, split, index) packed into one integer."""
        index = operator.index(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"index: expected 0 to {self.length - 1}, got {index}")
        stream = 2 * self.seed + _SPLITS.index(self.split)
        return make_scene((stream << _INDEX_BITS) | (index % self.length), self.size)


def _caption(content: tuple[str, ...], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """The caption and the concepts it names, given the visible ones (background last)."""
    named: tuple[str, ...]
    templates: tuple[str, ...]
    if rng.random() < _SINGLE_SHARE:
        named = (content[rng.integers(len(content))],)
        return _ONE[rng.integers(len(_ONE))].format(*named), named
    if rng.random() < 0.3:  # a true spatial relation
        front = content[:-1]
        if len(front) == 2 and rng.random() < 0.3:
            front = (front[rng.integers(2)],)
        named = (*front, content[-1])
        templates = _TWO_ON if len(named) == 2 else _THREE_ON
    else:
        count = 3 if len(content) == 3 and rng.random() < 0.7 else 2
        named = tuple(content[i] for i in rng.permutation(len(content))[:count])
        templates = _TWO if count == 2 else _THREE
    return templates[rng.integers(len(templates))].format(*named), named


def _regions(canvas: materials.Canvas, blob_count: int, rng: np.random.Generator) -> np.ndarray:
    """(S, S) uint8: 0 and 1 the blobs, `blob_count` the background; a blob has its exact share of pixels."""
    if blob_count == 1:
        centres, shares = 32 + 16 * (rng.random((1, 2)) - 0.5), 0.16 + 0.22 * rng.random(1)
    else:
        angle = 2 * np.pi * rng.random()
        apart = (14.0 + 4.0 * rng.random()) * np.array([np.cos(angle), np.sin(angle)])
        centres, shares = np.stack([32 + apart, 32 - apart]), 0.13 + 0.13 * rng.random(2)
    region = np.full((canvas.size, canvas.size), blob_count, dtype=np.uint8)
    for number in range(blob_count):
        distance = _shape_distance(canvas, centres[number], rng)
        distance[region != blob_count] = np.inf  # a later blob passes behind the earlier one
        wanted = round(float(shares[number]) * distance.size)
        region[distance <= np.partition(distance.ravel(), wanted - 1)[wanted - 1]] = number
    return region


def _shape_distance(canvas: materials.Canvas, centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(S, S) float32 whose level sets are one shape at every scale: ellipse, rounded rectangle or polygon.

    A smooth factor of 0.8 to 1.2 makes the outline irregular.
    """
    kind, angle, stretch = rng.integers(3), 2 * np.pi * rng.random(), np.float32(0.8 + 0.45 * rng.random())
    sides = int(rng.integers(4, 7))
    reach = (0.85 + 0.3 * rng.random(sides)).astype(np.float32)  # of each polygon side
    x, y = canvas.rotated(angle)  # (S, S)
    offset_x, offset_y = centre
    x = (x - np.float32(offset_x * np.cos(angle) + offset_y * np.sin(angle))) * stretch
    y = (y - np.float32(offset_y * np.cos(angle) - offset_x * np.sin(angle))) / stretch
    if kind == 0:
        distance = np.sqrt(x * x + y * y)
    elif kind == 1:
        x, y = x * x, y * y
        distance = np.sqrt(np.sqrt(x * x + y * y))
    else:
        distance = np.zeros_like(x)
        for side in range(sides):
            turn = 2 * np.pi * side / sides
            along = x * np.float32(np.cos(turn) * reach[side]) + y * np.float32(np.sin(turn) * reach[side])
            np.maximum(distance, along, out=distance)
    return distance * (np.float32(0.8) + np.float32(0.4) * canvas.noise(rng, 5))
