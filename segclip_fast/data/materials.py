"""Eighteen procedural materials, each a scalar field and a colour ramp.

A field (S, S) float32 in [0, 1] carries the texture; a ramp of a few colours turns it into RGB. All lengths
are in 1/64 of the picture's side and random numbers are drawn in an order that does not depend on the size:
one seed gives the same picture at every size. Textures repeat every 3 to 9 units, so that one 8 x 8 patch is
enough to recognise a material. Shapes: S side in pixels, K colour stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

UNITS = 64  # side of every picture, in texture units
LEVELS = 256  # quantisation of a field before its ramp is applied
_TAU = np.float32(2 * np.pi)
Field = Callable[["Canvas", np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Material:
    """A texture with a one-word name.

    Attributes:
        name: a single common noun.
        field: draws (S, S) float32; values outside [0, 1] are clipped later.
        positions: (K,) ascending places of the colour stops, from 0 to 1.
        colours: the K colours there, as RRGGBB.
    """

    name: str
    field: Field
    positions: tuple[float, ...]
    colours: tuple[str, ...]

    def render_levels(self, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
        """One instance's field, quantised: (S, S) uint8."""
        field = self.field(canvas, rng)
        return (np.clip(field, 0.0, 1.0, out=field) * np.float32(LEVELS - 1)).astype(np.uint8)

    def render_ramp(self, rng: np.random.Generator) -> np.ndarray:
        """One instance's colours, (LEVELS, 3) uint8: the ramp, its hue and brightness varied."""
        draw = rng.random(3)
        stops = _stops(self.colours)
        stops = stops @ _hue_rotation(0.22 * (draw[0] - 0.5)).T * (0.88 + 0.2 * draw[1])
        gray = stops.mean(axis=1, keepdims=True)
        stops = gray + (stops - gray) * (0.88 + 0.24 * draw[2])
        return np.clip(_ramp_weights(self.positions) @ stops, 0, 255).astype(np.uint8)


class Canvas:
    """Coordinates and interpolation weights of a square picture of `size` pixels, shared by all scenes.

    Attributes:
        size: side in pixels.
        x: (1, S) and `y` (S, 1) float32 pixel centres in texture units.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        centres = ((np.arange(size) + 0.5) * (UNITS / size)).astype(np.float32)
        self.x, self.y = centres[None, :], centres[:, None]
        self._weights: dict[int, np.ndarray] = {}

    def noise(self, rng: np.random.Generator, rows: int, columns: int | None = None) -> np.ndarray:
        """Value noise (S, S) float32 in [0, 1]: a random lattice of rows x columns cells, interpolated."""
        columns = rows if columns is None else columns
        lattice = rng.random((rows + 1, columns + 1), dtype=np.float32)
        return self._interpolation(rows) @ lattice @ self._interpolation(columns).T

    def rotated(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Texture coordinates (S, S) along and across a direction given in radians."""
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return self.x * cosine + self.y * sine, self.y * cosine - self.x * sine

    def _interpolation(self, cells: int) -> np.ndarray:
        """(S, cells + 1) float32: smoothstep weights of the lattice points around each pixel centre."""
        if cells not in self._weights:
            place = self.x[0] * np.float32(cells / UNITS)
            first = np.minimum(place.astype(np.int64), cells - 1)
            t = place - first
            t = t * t * (3 - 2 * t)
            weights = np.zeros((self.size, cells + 1), dtype=np.float32)
            pixels = np.arange(self.size)
            weights[pixels, first] = 1 - t
            weights[pixels, first + 1] = t
            self._weights[cells] = weights
        return self._weights[cells]


@lru_cache(maxsize=8)
def canvas(size: int) -> Canvas:
    """The shared canvas of a picture size."""
    return Canvas(size)


@lru_cache(maxsize=64)
def _stops(colours: tuple[str, ...]) -> np.ndarray:
    """(K, 3) float64 in 0..255 of RRGGBB colours."""
    return np.array([tuple(bytes.fromhex(colour)) for colour in colours], dtype=np.float64)


@lru_cache(maxsize=64)
def _ramp_weights(positions: tuple[float, ...]) -> np.ndarray:
    """(LEVELS, K): linear interpolation between the colour stops."""
    levels = np.linspace(0, 1, LEVELS)
    return np.stack([np.interp(levels, positions, row) for row in np.eye(len(positions))], axis=1)


def _hue_rotation(angle: float) -> np.ndarray:
    """(3, 3) rotation of RGB about the gray axis, in radians (Rodrigues' formula)."""
    cosine, sine = np.cos(angle), np.sin(angle) / np.sqrt(3)
    low, rest = (1 - cosine) / 3, cosine
    return np.array(
        [
            [rest + low, low - sine, low + sine],
            [low + sine, rest + low, low - sine],
            [low - sine, low + sine, rest + low],
        ]
    )


def _scale(rng: np.random.Generator) -> np.float32:
    return np.float32(0.85 + 0.35 * rng.random())


def _fraction(values: np.ndarray) -> np.ndarray:
    return values - np.floor(values)


def _lattice(
    x: np.ndarray, y: np.ndarray, width: float | np.floating, height: float | np.floating
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cells of a running bond: (column, row) int32 and the place inside the cell, both in [0, 1)."""
    y = y * np.float32(1.0 / float(height))
    row = np.floor(y)
    row_index = row.astype(np.int32)
    x = x * np.float32(1.0 / float(width)) + np.array((0, 0.5), dtype=np.float32)[row_index & 1]
    column = np.floor(x)
    return column.astype(np.int32), row_index, x - column, y - row


def _per_cell(rng: np.random.Generator, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A random value in [0, 1) for every cell, (S, S) float32."""
    return rng.random(128, dtype=np.float32)[(column * 37 + row * 71) & 127]


def _brick(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x, y = c.rotated(0.3 * (rng.random() - 0.5))
    column, row, inside_x, inside_y = _lattice(x + 90, y + 90, 9.5 * scale, 4.8 * scale)
    clay = 0.12 + 0.45 * _per_cell(rng, column, row) + 0.25 * c.noise(rng, 48)
    mortar = (inside_y < 0.22) | (inside_x < 0.11)
    return np.where(mortar, np.float32(0.9) + 0.1 * clay, np.minimum(clay, np.float32(0.78)))


def _grass(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    blades = 0.6 * c.noise(rng, 9, 40) + 0.5 * c.noise(rng, 17, 60) + 0.25 * c.noise(rng, 5)
    return (blades - np.float32(0.68)) * np.float32(1.7) + np.float32(0.5)


def _water(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    bend = 1.9 * c.noise(rng, 6, 4) + 0.8 * c.noise(rng, 20, 9)
    wave = np.sin(c.y * (_TAU / (4.6 * _scale(rng))) + bend * _TAU)
    ripple = c.noise(rng, 40, 10)
    return np.float32(0.42) + 0.33 * wave + 0.5 * (ripple - np.float32(0.5))


def _zebra(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    along, _ = c.rotated(np.pi * rng.random())
    bend = c.noise(rng, 5)
    stripe = np.sin(along * (_TAU / (5.6 * _scale(rng))) + bend * np.float32(6.5))
    return np.float32(0.5) + 1.6 * stripe


def _wood(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    upright = rng.random() < 0.5
    rings = 4.2 * c.noise(rng, 2, 5) if upright else 4.2 * c.noise(rng, 5, 2)
    fibre = c.noise(rng, 7, 60) if upright else c.noise(rng, 60, 7)
    across = c.x if upright else c.y
    turns = _fraction(across / (4.6 * _scale(rng)) + rings)
    return np.float32(0.98) - 0.75 * turns * turns - 0.4 * fibre * (0.4 + turns)


def _sand(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    along, _ = c.rotated(np.pi * rng.random())
    ripple = np.sin(along * (_TAU / (7.0 * _scale(rng))) + 5 * c.noise(rng, 5))
    return np.float32(0.08) + 0.16 * ripple + 0.85 * rng.random((UNITS, UNITS), dtype=np.float32)[_texel(c)]


def _lava(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    flow = c.noise(rng, 12) + 0.5 * c.noise(rng, 23) - np.float32(0.75)
    crack = np.float32(1.0) - np.abs(flow) * np.float32(5.0)
    return np.maximum(crack, 0.35 * c.noise(rng, 40))


def _snow(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    drift = 0.45 * c.noise(rng, 7) + 0.4 * c.noise(rng, 22)
    sparkle = rng.random((UNITS, UNITS), dtype=np.float32)[_texel(c)]
    return drift + np.float32(0.28) - np.float32(0.75) * (sparkle > np.float32(0.92))


def _leopard(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x, y = c.rotated(np.pi * rng.random())
    x = x + 5 * c.noise(rng, 9)
    y = y + 5 * c.noise(rng, 9)
    _, _, inside_x, inside_y = _lattice(x + 90, y + 90, 8.4 * scale, 7.0 * scale)
    radius = np.sqrt(((inside_x - 0.5) * 8.4) ** 2 + ((inside_y - 0.5) * 7.0) ** 2)
    ring = np.abs(radius - np.float32(2.25)) - np.float32(0.95) + 1.1 * (c.noise(rng, 18) - np.float32(0.35))
    fur = np.where(radius < 2.25, np.float32(0.62), np.float32(0.82)) + 0.3 * (c.noise(rng, 44) - 0.5)
    return np.where(ring < 0, np.float32(0.1), fur)


def _chessboard(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = 4.3 * _scale(rng)
    along, across = c.rotated(np.pi / 2 * rng.random())
    parity = (along / scale + 90).astype(np.int32) ^ (across / scale + 90).astype(np.int32)
    return 0.2 * c.noise(rng, 40) + np.array((0, 0.8), dtype=np.float32)[parity & 1]


def _sky(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    cloud = 0.65 * c.noise(rng, 5, 4) + 0.35 * c.noise(rng, 13, 9)
    return (cloud - np.float32(0.47)) * np.float32(2.1) + c.y * np.float32(0.3 / UNITS)


def _leaves(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x, y = c.rotated(2 * np.pi * rng.random())
    x = x + 4 * c.noise(rng, 8)
    y = y + 4 * c.noise(rng, 8)
    column, row, inside_x, inside_y = _lattice(x + 90, y + 90, 5.2 * scale, 7.6 * scale)
    off_rib = np.abs(inside_x - 0.5)
    half_width = np.sin(inside_y * np.float32(np.pi)) * np.float32(0.52)
    tint = 0.28 + 0.62 * _per_cell(rng, column, row) + 0.18 * c.noise(rng, 30)
    tint -= 0.22 * (off_rib < 0.09)
    return np.where(off_rib < half_width, tint, np.float32(0.05))


def _metal(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x, y = c.rotated(0.5 * (rng.random() - 0.5))
    _, row, inside_x, inside_y = _lattice(x + 90, y + 90, 6.2 * scale, 3.7 * scale)
    lean = np.where((row & 1) == 0, np.float32(0.7), np.float32(-0.7))
    u, v = (inside_x - 0.5) * 6.2, (inside_y - 0.5) * 3.7
    along, across = u + v * lean, v - u * lean
    bump = np.float32(1.0) - (along * 0.36) ** 2 - (across * 0.78) ** 2
    brushed = np.float32(0.3) + 0.3 * c.noise(rng, 60, 5)
    return np.where(bump > 0, np.float32(0.62) - 0.3 * across + 0.3 * bump, brushed)


def _honeycomb(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = 7.2 * _scale(rng)
    x, y = c.rotated(np.pi / 3 * rng.random())
    x, y = x / scale + 40, y / scale + 40
    tall = np.float32(np.sqrt(3))
    wall = np.full(x.shape, 9.0, dtype=np.float32)
    for shift_x, shift_y in ((0.0, 0.0), (0.5, np.sqrt(3) / 2)):  # the two square lattices of hexagon centres
        dx = np.abs(_fraction(x + np.float32(shift_x)) - np.float32(0.5))
        dy = np.abs(_fraction((y + np.float32(shift_y)) / tall) - np.float32(0.5)) * tall
        wall = np.minimum(wall, np.maximum(dx, dx / 2 + dy * (tall / 2)))
    return np.float32(1.12) - 2.1 * wall + 0.22 * (c.noise(rng, 30) - 0.5) - np.float32(0.55) * (wall > 0.4)


def _strawberry(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x, y = c.rotated(0.9 * (rng.random() - 0.5))
    x = x + 2 * c.noise(rng, 7)
    _, _, inside_x, inside_y = _lattice(x + 90, y + 90, 4.6 * scale, 3.9 * scale)
    seed = ((inside_x - 0.5) * 5.2) ** 2 + ((inside_y - 0.5) * 3.3) ** 2
    flesh = np.float32(0.22) + 0.4 * c.noise(rng, 12) + 0.16 * np.minimum(seed, np.float32(1.5))
    return np.where(seed < 0.62, np.float32(1.0) - 0.12 * seed, np.minimum(flesh, np.float32(0.74)))


def _lavender(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x = c.x + 2.5 * c.noise(rng, 5)
    y = c.y + 5.0 * c.noise(rng, 3, 16)
    column, row, inside_x, inside_y = _lattice(x + 90, y + 90, 3.5 * scale, 3.0 * scale)
    petal = np.float32(1.0) - ((inside_x - 0.5) * 2.1) ** 2 - ((inside_y - 0.5) * 1.9) ** 2
    bloom = np.float32(0.4) + 0.5 * petal + 0.32 * (_per_cell(rng, column, row) - 0.5)
    return bloom * (0.55 + 0.7 * c.noise(rng, 8, 14))


def _coral(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    angles = np.pi * (np.arange(4) + rng.random(4)) / 4
    phases = rng.random(4) * 2 * np.pi
    pitch = 2 * np.pi / (6.2 * float(_scale(rng)))
    warp = 3.0 * c.noise(rng, 9)
    maze = np.zeros((c.size, c.size), dtype=np.float32)
    for angle, phase in zip(angles, phases, strict=True):
        maze += np.sin(c.rotated(angle)[0] * np.float32(pitch) + np.float32(phase) + warp)
    return np.float32(0.5) + 0.45 * maze + 0.2 * (c.noise(rng, 40) - 0.5)


def _fish(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    scale = _scale(rng)
    x, y = c.rotated(1.2 * (rng.random() - 0.5))
    column, row, inside_x, inside_y = _lattice(x + 90, y + 90, 6.6 * scale, 4.6 * scale)
    radius = ((inside_x - 0.5) * 2.05) ** 2 + (inside_y * 1.04) ** 2
    shade = np.float32(0.62) + 0.3 * _per_cell(rng, column, row)
    gap = np.float32(0.4) + 0.4 * inside_y  # between two scales the next row shows, in their shadow
    return np.where(radius < 1, shade - 0.62 * radius * radius, gap) + 0.2 * c.noise(rng, 20)


def _texel(c: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Index of each pixel's texture unit, for noise that is sharp at every size."""
    unit = c.x[0].astype(np.int64)
    return unit[:, None], unit[None, :]


_ALL = (
    Material("brick", _brick, (0, 0.8, 0.87, 1), ("602620", "c0543c", "cabeae", "e4dcce")),
    Material("grass", _grass, (0, 0.5, 1), ("0e3a0e", "3e8e24", "b0dc54")),
    Material("water", _water, (0, 0.55, 0.85, 1), ("082c70", "1870b8", "78cce8", "f4fcff")),
    Material("zebra", _zebra, (0, 1), ("121014", "f8f4ec")),
    Material("wood", _wood, (0, 0.5, 1), ("4a2f20", "946a48", "cfa67c")),
    Material("sand", _sand, (0, 0.5, 1), ("bc965c", "e4c68e", "fae8be")),
    Material("lava", _lava, (0, 0.45, 0.75, 1), ("160c10", "40100e", "f4500a", "ffe05a")),
    Material("snow", _snow, (0, 0.45, 1), ("96b2de", "e2ecfa", "ffffff")),
    Material("leopard", _leopard, (0, 0.4, 0.6, 1), ("120a06", "22140a", "c88c3c", "fbd284")),
    Material("chessboard", _chessboard, (0, 0.25, 0.75, 1), ("1a4a30", "2c6842", "ece2ba", "faf2d4")),
    Material("sky", _sky, (0, 0.5, 1), ("428ae4", "7ebaf6", "fafcff")),
    Material("leaves", _leaves, (0, 0.15, 0.45, 0.75, 1), ("4a0a2a", "7a0c2c", "d02438", "f4622c", "ffa43a")),
    Material("metal", _metal, (0, 0.5, 1), ("3e444e", "8c94a0", "f4f8fc")),
    Material("honeycomb", _honeycomb, (0, 0.35, 1), ("683206", "d4860a", "ffd642")),
    Material("strawberry", _strawberry, (0, 0.75, 0.85, 1), ("780416", "e82230", "e0963c", "ffe482")),
    Material("lavender", _lavender, (0, 0.3, 0.65, 1), ("425c3c", "5c428a", "9668ce", "dcbafa")),
    Material("coral", _coral, (0, 0.5, 1), ("96244e", "f67084", "ffcec8")),
    Material("fish", _fish, (0, 0.5, 1), ("063a42", "169c96", "aaf6dc")),
)
BY_NAME = {material.name: material for material in _ALL}
