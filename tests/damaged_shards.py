"""Tar shards of which 5% of the pairs are damaged in known ways, and runs over them."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from small import WORDS, small_config
from test_shards import claims, write_shard
from test_training import quick

from segclip_fast.config import DataConfig, SuperpixelConfig, TrainConfig

SHARDS, PAIRS = 4, 60  # pairs of each
TOTAL = SHARDS * PAIRS
SEED, BATCH = 42, 12  # of `run_config`
HUGE = 60_000  # pixels a side, that a small file only claims to have

# Damage -> what the log counts it under, and the reason that it must give.
REASONS = {
    "cut": ("picture", "expected a complete picture, not decodable"),
    "huge-png": ("picture", "expected at most 64000000 pixels, got more"),
    "huge-jpeg": ("picture", "expected at most 64000000 pixels, got more"),
    "page": ("picture", "expected one of ('JPEG', 'PNG', 'WEBP'), got b'<html>404"),
    "empty": ("caption", "expected text, got none"),
    "latin": ("caption", "expected UTF-8 text"),
    "no-field": ("caption", 'expected a string in the JSON field "caption", got NoneType'),
}
# By shard: 12 of 240, most of them in the second.
DAMAGED = (
    ("cut", "latin"),
    ("cut", "huge-png", "huge-jpeg", "empty", "no-field"),
    ("page", "empty", "latin"),
    ("huge-png", "page"),
)
ODD = (("png-named-jpg",), (), ("grey",), ("black", "png-named-jpg"))  # unusual, but usable
ALONE = (0, 1, 0, 2)  # pictures without a caption
BAD = sum(len(names) for names in DAMAGED)


@dataclass(frozen=True)
class DamagedShards:
    """What was written.

    Attributes:
        pattern: of the shards.
        paths: of each.
        reasons: by the name of each damaged pair: how its reason begins.
        counts: damaged pairs by shard and kind.
        missing: pictures without caption, by shard.
        odd: names of the unusual pairs that are usable.
    """

    pattern: str
    paths: tuple[str, ...]
    reasons: dict[str, str]
    counts: dict[str, dict[str, int]]
    missing: dict[str, int]
    odd: tuple[str, ...]


def write_damaged(folder: Path) -> DamagedShards:
    """SHARDS shards of PAIRS pairs each, those in DAMAGED among them; captions of `small.WORDS`."""
    rng = random.Random(5)
    paths, reasons, odd = [], {}, []
    counts: dict[str, dict[str, int]] = {}
    for shard, (damaged, unusual) in enumerate(zip(DAMAGED, ODD, strict=True)):
        path = str(folder / f"pairs-{shard:02d}.tar")
        names = ["", *damaged, *unusual]  # scattered, the rest is usual
        rows = dict(zip(rng.sample(range(PAIRS), len(names) - 1), names[1:], strict=True))
        members: list[tuple[str, bytes | str]] = []
        for row in range(PAIRS):
            what = rows.get(row, "")
            key = f"{row:03d}{what and '-' + what}"
            members += _pair(key, what, rng)
            if what in REASONS:
                kind, reason = REASONS[what]
                reasons[f"{path}/{key}"] = f"{kind}: {reason}"
                of_shard = counts.setdefault(path, {})
                of_shard[kind] = of_shard.get(kind, 0) + 1
            elif what:
                odd.append(f"{path}/{key}")
        members += [(f"alone-{number}.jpg", encoded(rng.random())) for number in range(ALONE[shard])]
        write_shard(path, members)
        paths.append(path)
    missing = {path: count for path, count in zip(paths, ALONE, strict=True) if count}
    pattern = str(folder / f"pairs-{{00..{SHARDS - 1:02d}}}.tar")
    return DamagedShards(pattern, tuple(paths), reasons, counts, missing, tuple(odd))


def write_run_of_damage(path: Path, order: np.ndarray, first: int, count: int) -> str:
    """One shard of as many pairs as `order` has, in which `count` in a row of it, from `first`, are cut."""
    rng = random.Random(7)
    bad = {int(order[(first + number) % len(order)]) for number in range(count)}
    members = []
    for row in range(len(order)):
        members += _pair(f"{row:03d}", "cut" if row in bad else "", rng)
    return str(write_shard(path, members))


def encoded(seed: float, kind: str = "JPEG", colour: int | None = None) -> bytes:
    """A file of a picture of 40 x 48 pixels, of smooth colours or of one."""
    if colour is None:
        rng = np.random.default_rng(int(seed * 2**32))
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        picture = coarse.resize((48, 40), Image.Resampling.BICUBIC)
    else:
        picture = Image.new("RGB", (48, 40), (colour,) * 3)
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def claiming_jpeg(data: bytes, width: int, height: int) -> bytes:
    """The JPEG file with other sizes in its header."""
    start = data.index(b"\xff\xc0") + 5  # after marker, length and precision
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def caption(rng: random.Random) -> str:
    """Four words of the small model's vocabulary."""
    return " ".join(rng.choices(WORDS, k=4))


def _pair(key: str, what: str, rng: random.Random) -> list[tuple[str, bytes | str]]:
    """The members of one pair, damaged or unusual as `what` says."""
    picture, text = encoded(rng.random()), caption(rng)
    pictures = {
        "cut": picture[: len(picture) // 2],
        "huge-png": claims(HUGE, HUGE),
        "huge-jpeg": claiming_jpeg(picture, HUGE, HUGE),
        "page": b"<html>404 not found</html>",
        "png-named-jpg": encoded(rng.random(), "PNG"),
        "grey": encoded(0, colour=128),
        "black": encoded(0, "PNG", colour=0),
    }
    texts: dict[str, tuple[str, bytes | str]] = {
        "empty": (f"{key}.txt", " \n"),
        "latin": (f"{key}.txt", text.encode() + b" caf\xe9"),
        "no-field": (f"{key}.json", json.dumps({"url": "u"})),
    }
    return [(f"{key}.jpg", pictures.get(what, picture)), texts.get(what, (f"{key}.txt", f"{text}\n"))]


def run_config(output: Path | str, pairs: str, data: dict | None = None, **changes) -> TrainConfig:
    """A run of the small model over `pairs`; `data` and `changes` are other settings."""
    superpixels = SuperpixelConfig(scale=20, min_size=8)
    config = quick(output, model=small_config(), device="cpu", seed=SEED, batch_size=BATCH, save_every=100)
    of_data = DataConfig(train_data=pairs, superpixels=superpixels, **(data or {}))
    return dataclasses.replace(config, data=of_data, **changes)


def order_of(seed: int, epoch: int, pairs: int) -> np.ndarray:
    """The order in which an epoch of a run shows its pairs."""
    return np.random.default_rng([seed, epoch]).permutation(pairs)
