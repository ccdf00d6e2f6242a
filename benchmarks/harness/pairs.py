"""Image-text pairs as tar shards, made of scikit-image's photographs: the same every time, no two alike.

Crops that are enlarged to the wanted size are smoother than photographs of that size: their files are
smaller and decode faster than those of COCO or CC3M would.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from harness.captions import CAPTIONS
from harness.pictures import photo_paths

SMALLEST = 0.5  # side of a crop over the largest of its shape that the photograph has


@dataclass(frozen=True)
class Sizes:
    """How pictures are stored.

    Attributes:
        name: of the set.
        short: short side in pixels.
        long: the longest long side in pixels.
        quality: of JPEG.
    """

    name: str
    short: int
    long: int
    quality: int


WEB = Sizes("web", 480, 640, 90)  # as COCO's
RESIZED = Sizes("resized", 224, 299, 95)  # what the paper's preparation by img2dataset leaves


@dataclass(frozen=True)
class Written:
    """The shards of a set.

    Attributes:
        pattern: finds them all.
        pairs: number of pairs.
        jpeg_bytes: mean size of a picture's file.
        pixels: mean number of pixels of a picture.
    """

    pattern: str
    pairs: int
    jpeg_bytes: float
    pixels: float


def write_shards(folder: Path, sizes: Sizes, pairs: int, shards: int = 1, processes: int = 1) -> Written:
    """Write `pairs` pairs KEY.jpg and KEY.txt into `folder`, spread evenly over `shards` tar files.

    Args:
        folder: made if it is missing.
        sizes: of the pictures.
        pairs: a multiple of `shards`.
        shards: number of files.
        processes: that write at the same time.

    Raises:
        ValueError: `pairs` is no multiple of `shards`.
        AssertionError: two pictures came out the same.
    """
    if pairs % shards:
        raise ValueError(f"pairs: expected a multiple of {shards} shards, got {pairs}")
    folder.mkdir(parents=True, exist_ok=True)
    each = pairs // shards
    context = multiprocessing.get_context("fork")  # a fresh process would first import PyTorch
    with ProcessPoolExecutor(processes, context) as pool:
        jobs = repeat(folder), repeat(sizes), range(shards), repeat(each)
        found = [item for part in pool.map(_write_shard, *jobs) for item in part]
    assert len({digest for digest, _, _ in found}) == pairs, "two pictures are the same"
    _, sizes_in_bytes, pixels = zip(*found, strict=True)
    return Written(str(folder / "*.tar"), pairs, float(np.mean(sizes_in_bytes)), float(np.mean(pixels)))


def _write_shard(folder: Path, sizes: Sizes, shard: int, pairs: int) -> list[tuple[bytes, int, int]]:
    """Hash, bytes and pixels of every picture of a shard."""
    found = []
    with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for within in range(pairs):
            rng = np.random.default_rng([sizes.short, shard, within])
            picture = draw_picture(sizes, rng)
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=sizes.quality)
            caption = CAPTIONS[rng.integers(len(CAPTIONS))]
            key, data = f"{shard:05d}{within:04d}", file.getvalue()
            for ending, content in ((".jpg", data), (".txt", caption.encode())):
                member = tarfile.TarInfo(key + ending)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            found.append((hashlib.blake2b(data).digest(), len(data), picture.width * picture.height))
    return found


def draw_picture(sizes: Sizes, rng: np.random.Generator) -> Image.Image:
    """A random crop of a random photograph, upright or lying, flipped or not, with its colours changed."""
    photo = _photos()[rng.integers(len(_photos()))]
    aspect = rng.uniform(1, sizes.long / sizes.short)
    extent = np.array([aspect, 1.0] if rng.random() < 0.75 else [1.0, aspect])  # width, height
    largest = min(photo.width / extent[0], photo.height / extent[1])
    width, height = extent * largest * rng.uniform(SMALLEST, 1)
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    size = (round(extent[0] * sizes.short), round(extent[1] * sizes.short))
    box = (left, top, left + width, top + height)
    picture = photo.resize(size, Image.Resampling.BICUBIC, box)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains, offsets = rng.uniform(0.8, 1.2, (3, 1)), rng.uniform(-20, 20, (3, 1))
    curves = np.clip(gains * np.arange(256) + offsets, 0, 255).astype(np.uint8)
    return picture.point(curves.ravel().tolist())


@cache
def _photos() -> tuple[Image.Image, ...]:
    """The photographs; a blocky random picture where scikit-image is missing."""
    paths = photo_paths()
    if not paths:
        blocks = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        return (Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1)),)
    return tuple(Image.open(path).convert("RGB") for path in paths)
