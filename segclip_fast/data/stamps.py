"""A small real image-text-mask set: photographic Tux Paint stamps pasted on photographs.

The stamps come from the Debian package `tuxpaint-stamps-default` (GPL-2, not part of this library); the
photographs behind them are those that scikit-image ships. `python -m segclip_fast.data.stamps ROOT OUTPUT`
writes the set as an image folder. Which stamps are used and what they are called: see `stamp_catalog`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import operator
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .sample import RawSample
from .stamp_catalog import Stamp, read_catalog

BACKGROUND = "background"
CACHE_BYTES = 256 * 2**20
MIN_SIZE, MAX_SIZE = 32, 1024
_SPLITS = ("train", "val", "val_seen")
_log = logging.getLogger(__name__)

_ONE = ("a photo of a {}.", "a photo of a {}.", "a photo of {}", "{}")
_TWO = ("{} and {}", "{} next to {}", "a photo of a {} and a {}", "{} with {}", "a photo of {} and {}")
_THREE = ("{}, {} and {}", "{} and {} next to {}", "a photo of {}, {} and {}")

# Photographs in scikit-image's wheel, the part (left, top, right, bottom; fractions) that shows nothing a
# stamp could be called, and the tints that make the gray ones look natural (None: in colour already).
_GREENS, _EARTHS = (
    ((0.72, 1.05, 0.5), (1.0, 1.05, 0.6)),
    ((1.12, 1.0, 0.85), (1.0, 1.0, 1.0), (1.2, 0.85, 0.7)),
)
_PHOTOGRAPHS: tuple[
    tuple[str, tuple[float, float, float, float], tuple[tuple[float, float, float], ...] | None], ...
]
_PHOTOGRAPHS = (
    ("grass.png", (0, 0, 1, 1), _GREENS),
    ("gravel.png", (0, 0, 1, 1), _EARTHS),
    ("brick.png", (0, 0, 1, 1), _EARTHS),
    ("rocket.jpg", (0, 0, 1, 1), None),
    ("hubble_deep_field.jpg", (0, 0, 1, 1), None),
    ("ihc.png", (0, 0, 1, 1), None),
    ("coffee.png", (0.82, 0, 1, 1), None),
    ("motorcycle_left.png", (0.44, 0, 1, 0.36), None),
)


@dataclass(frozen=True)
class _Placed:
    """A cut-out at its final size: premultiplied (h, w, 4) uint8, and where its top-left corner goes."""

    pixels: np.ndarray
    top: int
    left: int


class StampSource:
    """Scenes of one to three stamps, with captions and exact masks (an ImageTextSource).

    Four in ten samples show a single cut-out (half of them on a plain background), the others two or three on
    a photograph; captions are "a photo of a lion.", "lion and mango", or the stamp's own sentence. The mask
    is alpha > 0.5; 0 is "background". A sample depends on (seed, split, index), the stamps and
    the photographs.

    The splits separate stamps and compositions; most classes have a single stamp, so no split can hold out
    pictures of all classes:
    - "train": the stamps that are not held out;
    - "val": unseen stamps of seen classes: only the held-out ones, one third (at least one) of every class
      that has two or more;
    - "val_seen": the stamps of "train" in compositions that "train" never shows (other random streams).

    Backgrounds are the same in all splits. Where scikit-image lacks some photographs the others are used;
    without any, plain backgrounds are, with a warning in the log.

    Args:
        root: the stamps folder (.../usr/share/tuxpaint/stamps of the package).
        length: number of samples, at least 1.
        seed: chooses the compositions.
        size: side of the square pictures in pixels, 32 to 1024.
        split: "train", "val" or "val_seen".

    Attributes:
        class_names: "background", then every concept in alphabetical order, the same for all splits.
        stamps: the stamps this split draws from.

    Raises:
        FileNotFoundError: `root` does not hold the stamps; the message says how to fetch them.
        ValueError: another argument out of range, a split without stamps, or a stamp that cannot be decoded.
    """

    def __init__(
        self, root: str | Path, length: int, seed: int = 0, size: int = 224, split: str = "train"
    ) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1 sample, got {length}")
        if operator.index(seed) < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed}")
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"size: expected {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
        if split not in _SPLITS:
            raise ValueError(f"split: expected one of {_SPLITS}, got {split!r}")
        self.root, self.length, self.seed, self.size = (
            Path(root).absolute(),
            length,
            operator.index(seed),
            size,
        )
        self.split = split
        catalog = read_catalog(self.root)
        self.class_names: Sequence[str] = (BACKGROUND, *sorted({stamp.concept for stamp in catalog}))
        self.stamps = tuple(stamp for stamp in catalog if stamp.held_out == (split == "val"))
        if not self.stamps:
            raise ValueError(f"split: expected stamps to draw from, got none in {split!r} of {str(root)!r}")
        self._index_of = {name: index for index, name in enumerate(self.class_names)}
        self._cut_outs: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> RawSample:
        """Sample number `index`."""
        index = operator.index(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"index: expected 0 to {self.length - 1}, got {index}")
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), index % self.length])
        chosen = self._choose(rng)
        image = _background(self.size, len(chosen) == 1, rng).astype(np.float32)  # (S, S, 3)
        mask = np.zeros((self.size, self.size), dtype=np.int64)
        for stamp, place in zip(chosen, _slots(len(chosen), rng), strict=True):
            placed = _place(self._cut_out(stamp), place, self.size, rng)
            _paste(image, mask, placed, self._index_of[stamp.concept])
        visible = set(np.unique(mask).tolist())
        shown = [stamp for stamp in chosen if self._index_of[stamp.concept] in visible]
        caption, mentioned = _caption(shown, rng)
        content = tuple(stamp.concept for stamp in shown)
        return RawSample(np.rint(image).astype(np.uint8), caption, mask, content, mentioned)

    def caption_vocabulary(self) -> tuple[str, ...]:
        """Every word that a caption of these stamps or a prompt can contain, lower-case, sorted.

        A prompt is "a photo of a {}." with any class but the background, whatever the split.
        """
        texts = (*_ONE, *_TWO, *_THREE, *self.class_names[1:], *(stamp.caption for stamp in self.stamps))
        return tuple(sorted({word for text in texts for word in re.findall(r"[^\W_]+", text.lower())}))

    def __getstate__(self) -> dict[str, object]:
        """Without the lock and the cache, so that loader workers can receive the source."""
        state = {key: value for key, value in vars(self).items() if key not in ("_lock", "_cut_outs")}
        return {**state, "_cached_bytes": 0}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock, self._cut_outs = threading.Lock(), OrderedDict()

    def _choose(self, rng: np.random.Generator) -> list[Stamp]:
        """One, two or three stamps of different concepts."""
        wanted = int(rng.choice(3, p=(0.4, 0.4, 0.2))) + 1
        chosen: list[Stamp] = []
        for position in rng.permutation(len(self.stamps)):
            stamp = self.stamps[position]
            if stamp.concept not in {other.concept for other in chosen}:
                chosen.append(stamp)
            if len(chosen) == wanted:
                break
        return chosen

    def _cut_out(self, stamp: Stamp) -> np.ndarray:
        """The stamp's bounding box, premultiplied (h, w, 4) uint8, longest side at most `size`; cached."""
        with self._lock:
            if stamp.path in self._cut_outs:
                self._cut_outs.move_to_end(stamp.path)
                return self._cut_outs[stamp.path]
        pixels = _decode(self.root / stamp.path, self.size)
        with self._lock:
            if stamp.path not in self._cut_outs:
                self._cut_outs[stamp.path] = pixels
                self._cached_bytes += pixels.nbytes
            while self._cached_bytes > CACHE_BYTES and len(self._cut_outs) > 1:
                self._cached_bytes -= self._cut_outs.popitem(last=False)[1].nbytes
        return pixels


def _decode(path: Path, longest: int) -> np.ndarray:
    """Crop to the visible part and scale down, in premultiplied colour so that no hidden colour bleeds in."""
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    box = rgba.getchannel("A").point(lambda value: 255 if value > 127 else 0).getbbox()
    premultiplied = rgba.crop(box).convert("RGBa")
    premultiplied.thumbnail((longest, longest), Image.Resampling.BOX)
    return _rgba_bytes(premultiplied)


def _rgba_bytes(premultiplied: Image.Image) -> np.ndarray:
    width, height = premultiplied.size
    return np.frombuffer(premultiplied.tobytes(), dtype=np.uint8).reshape(height, width, 4)


def _slots(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(centre y, centre x, longest side) of each stamp as fractions of the picture."""
    if count == 1:
        centres, sides = np.full((1, 2), 0.5), 0.55 + 0.4 * rng.random(1)
    else:
        turn = 2 * np.pi * (rng.random() + np.arange(count) / count)
        centres = 0.5 + (0.21 + 0.02 * count) * np.stack([np.sin(turn), np.cos(turn)], axis=1)
        sides = (0.62 if count == 2 else 0.52) * (0.8 + 0.25 * rng.random(count))
    centres = centres + 0.08 * (rng.random((count, 2)) - 0.5)
    return [(float(y), float(x), float(side)) for (y, x), side in zip(centres, sides, strict=True)]


def _place(
    pixels: np.ndarray, place: tuple[float, float, float], size: int, rng: np.random.Generator
) -> _Placed:
    """Scale a cut-out so that its longest side fills the slot, mirror half of them, and move it inside."""
    centre_y, centre_x, side = place
    scale = side * size / max(pixels.shape[:2])
    height, width = (max(3, round(extent * scale)) for extent in pixels.shape[:2])
    shape = (pixels.shape[1], pixels.shape[0])
    picture = Image.frombuffer("RGBa", shape, pixels.tobytes(), "raw", "RGBa", 0, 1)
    pixels = _rgba_bytes(picture.resize((width, height), Image.Resampling.BILINEAR))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    top = int(np.clip(round(centre_y * size - height / 2), 0, max(0, size - height)))
    left = int(np.clip(round(centre_x * size - width / 2), 0, max(0, size - width)))
    return _Placed(pixels, top, left)


def _paste(image: np.ndarray, mask: np.ndarray, placed: _Placed, label: int) -> None:
    """Blend one cut-out over `image` (S, S, 3) float32 and label alpha > 0.5 in `mask` (S, S), in place."""
    size = mask.shape[0]
    height, width = placed.pixels.shape[:2]
    rows = slice(placed.top, min(size, placed.top + height))
    columns = slice(placed.left, min(size, placed.left + width))
    pixels = placed.pixels[: rows.stop - rows.start, : columns.stop - columns.start]
    alpha = pixels[:, :, 3:]
    image[rows, columns] = pixels[:, :, :3] + image[rows, columns] * ((255 - alpha) * np.float32(1 / 255))
    mask[rows, columns][alpha[:, :, 0] > 127] = label


def _caption(stamps: list[Stamp], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A caption of the visible stamps, and the concepts that it names."""
    if len(stamps) == 1 or rng.random() < 0.25:
        stamp = stamps[rng.integers(len(stamps))]
        sentence = rng.random() < 0.35
        return (stamp.caption if sentence else _ONE[rng.integers(len(_ONE))].format(stamp.concept)), (
            stamp.concept,
        )
    named = tuple(stamps[position].concept for position in rng.permutation(len(stamps)))
    if len(named) == 3 and rng.random() < 0.3:
        named = named[:2]
    templates = _TWO if len(named) == 2 else _THREE
    return templates[rng.integers(len(templates))].format(*named), named


@lru_cache(maxsize=1)
def _photographs() -> tuple[tuple[Image.Image, tuple[tuple[float, float, float], ...] | None], ...]:
    """The background photographs found inside the installed scikit-image, never from the network."""
    found = []
    spec = importlib.util.find_spec("skimage")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for name, box, tints in _PHOTOGRAPHS:
        path = next((p for f in folders if (p := Path(f) / "data" / name).is_file()), None)
        if path is None:
            continue
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
        edges = [round(part * rgb.size[side % 2]) for side, part in enumerate(box)]
        found.append((rgb.crop((edges[0], edges[1], edges[2], edges[3])), tints))
    if not found:
        _log.warning("scikit-image ships none of the background photographs: plain backgrounds are used")
    return tuple(found)


def _background(size: int, may_be_plain: bool, rng: np.random.Generator) -> np.ndarray:
    """(S, S, 3) float32 in 0..255: a plain shaded colour or a random square of a photograph."""
    photographs = _photographs()
    if not photographs or (may_be_plain and rng.random() < 0.5):
        colour, slope = 60 + 180 * rng.random(3), 50 * (rng.random(2) - 0.5)
        ramp = np.linspace(-1, 1, size)
        shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
        return np.clip(colour + shade[:, :, None], 0, 255).astype(np.float32)
    picture, tints = photographs[rng.integers(len(photographs))]
    shortest = min(picture.size)
    side = int(shortest * (0.5 + 0.5 * rng.random()))
    left = int(rng.integers(picture.size[0] - side + 1))
    top = int(rng.integers(picture.size[1] - side + 1))
    square = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(square).astype(np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    tint = np.array(tints[rng.integers(len(tints))] if tints else (1, 1, 1), dtype=np.float32)
    gain = 0.75 + 0.4 * rng.random()
    return np.clip(pixels * (tint * np.float32(gain)), 0, 255)


def write_folder(source: StampSource, output: Path) -> None:
    """Write every sample as images/NNNNNN.png and masks/NNNNNN.png (indexed), captions.csv and labels.txt."""
    for name in ("images", "masks"):
        (output / name).mkdir(parents=True, exist_ok=True)
        for stale in (output / name).glob("*.png"):
            stale.unlink()
    (output / "labels.txt").write_text("\n".join(source.class_names) + "\n", encoding="utf-8")
    palette = np.random.default_rng(0).integers(40, 256, (256, 3), dtype=np.uint8)
    palette[0] = 0
    with (output / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "mask", "caption", "content", "mentioned"))
        for index in range(len(source)):
            sample, name = source[index], f"{index:06d}.png"
            assert sample.mask is not None
            Image.fromarray(sample.image).save(output / "images" / name)
            indexed = Image.fromarray(sample.mask.astype(np.uint8)).convert("P")
            indexed.putpalette(palette.tobytes())
            indexed.save(output / "masks" / name)
            concepts = ("; ".join(sample.content), "; ".join(sample.mentioned))
            table.writerow((f"images/{name}", f"masks/{name}", sample.caption, *concepts))


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m segclip_fast.data.stamps ROOT OUTPUT`: write the set as an image folder."""
    parser = argparse.ArgumentParser(prog="python -m segclip_fast.data.stamps", description=main.__doc__)
    parser.add_argument("root", type=Path, help="stamps folder, e.g. /usr/share/tuxpaint/stamps")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=1000, help="number of pictures (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (default: %(default)s)")
    parser.add_argument(
        "--split", choices=_SPLITS, default="train", help="which stamps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other compositions (default: %(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run wrote to OUTPUT"
    )
    options = parser.parse_args(arguments)
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"output: expected a folder, got the file {str(options.output)!r}")
    if options.output.is_dir() and any(options.output.iterdir()) and not options.overwrite:
        parser.error(f"output: expected an empty folder or --overwrite, got {str(options.output)!r}")
    try:
        source = StampSource(options.root, options.count, options.seed, options.size, options.split)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if len(source.class_names) > 255:
        parser.error(
            f"root: expected at most 254 concepts (masks are 8-bit), got {len(source.class_names) - 1}"
        )
    write_folder(source, options.output)
    print(f"{len(source)} pictures of {len(source.class_names) - 1} concepts in {options.output}")


if __name__ == "__main__":
    main()
