"""Streaming image-text pairs from tar shards: a loader worker's time, and what a training run is bound by.

    python benchmarks/streaming.py    # 5 minutes on 2 cores, 1 GB of temporary files; prints the tables
    python benchmarks/streaming.py --pairs 40 --output FILE    # to see that everything runs

Writes results/streaming.json. Generated pairs (`harness/pairs.py`), at the sizes of COCO and at those that
the paper's preparation leaves, are read once by the training pipeline: CLIP's tokens, crops of 224 x 224, the
paper's superpixels, made in several ways. Then the training loop itself runs on them, once with a model so
small that it waits for data, once with one that keeps the processor busy. Files come from the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.captions import CAPTIONS
from harness.machine import commit, versions
from harness.pairs import RESIZED, WEB, Sizes, Written, write_shards
from harness.pictures import PAPER
from reporting.streaming import streaming_tables

from segclip_fast.config import (
    DataConfig,
    GroupingConfig,
    ReconstructionConfig,
    SegCLIPConfig,
    SuperpixelConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from segclip_fast.data.opening import make_source
from segclip_fast.data.pipeline import STAGES, PairDataset, Positions, batches
from segclip_fast.data.sample import RawSample
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train

RESULT = Path(__file__).parent / "results" / "streaming.json"
PAIRS, SHARDS, BATCH = 10_000, 10, 20
BUSY = 0.5  # share of the workers' time in STAGES from which on the longest of these bounds the loader
SEED = 42
CHECKED = 4  # pairs whose labels are compared before anything is timed


class Skimage:
    """scikit-image's felzenszwalb in place of this package's."""

    def __call__(self, picture: RawSample) -> np.ndarray:
        """(H, W) int64 of `picture.image` (H, W, 3) uint8."""
        from skimage.segmentation import felzenszwalb

        return felzenszwalb(picture.image, **PAPER)


@dataclass(frozen=True)
class Variant:
    """A way to make the superpixels.

    Attributes:
        name: in the table.
        pairs: the most that are read.
        order: as in `SuperpixelConfig`.
        precision: as there.
        skimage: by scikit-image.
        passes: over the same pairs; from two on with a cache on disk.
        left_out: nothing is made in the workers, as with `where="device"`.
    """

    name: str
    pairs: int
    order: str = "crop_first"
    precision: str = "float64"
    skimage: bool = False
    passes: int = 1
    left_out: bool = False


VARIANTS = (
    Variant("scikit-image", 500, skimage=True),
    Variant("scikit-image, stored picture", 200, "segment_first", skimage=True),
    Variant("float64", PAIRS),
    Variant("float32", 2000, precision="float32"),
    Variant("float64, stored picture, cache", 1000, "segment_first", passes=2),
    Variant("on the device", 2000, left_out=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of a set")
    parser.add_argument("--workers", type=int, default=cores(), help="loader processes; default: all cores")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON to write")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    options = parser.parse_args(arguments)
    if options.pairs < BATCH or options.pairs % BATCH:
        parser.error(f"pairs: expected a multiple of {BATCH}, got {options.pairs}")
    if options.workers < 1:
        parser.error(f"workers: expected at least 1, got {options.workers}")
    if options.pairs < PAIRS and options.output == RESULT:
        parser.error(f"pairs: expected another --output than the stored results, which are of {PAIRS} pairs")
    given = sys.argv[1:] if arguments is None else arguments
    run = {"command": shlex.join(["python", "benchmarks/streaming.py", *given]), **whereabouts()}
    run |= {"workers": options.workers, "batch": BATCH, "setting": PAPER}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sets = {sizes: write(sizes, folder, options) for sizes in (WEB, RESIZED)}
        run["sets"] = [measure(sizes, written, folder, options) for sizes, written in sets.items()]
        run["training"] = [training(each, sets[WEB], folder, options) for each in runs(options.workers)]
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(run, indent=1) + "\n")
    print(streaming_tables(run))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whereabouts() -> dict[str, Any]:
    """Commit, versions and processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = {"cpu": names[0] if names else "unknown", "cores": os.cpu_count()}
    return {"commit": commit(), "versions": versions(), **cpu, "threads": torch.get_num_threads()}


def write(sizes: Sizes, folder: Path, options: argparse.Namespace) -> Written:
    """The shards of a set."""
    shards = SHARDS if options.pairs % SHARDS == 0 else 1
    return write_shards(folder / sizes.name, sizes, options.pairs, shards, options.workers)


# --- the loader


def measure(sizes: Sizes, written: Written, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every variant on one set; labels are compared before."""
    check(written, folder / f"{sizes.name}-checked")
    rows = []
    for variant in VARIANTS:
        cache = folder / f"{sizes.name}-cache" if variant.passes > 1 else None
        dataset = opened(variant, written, options.workers, cache)
        for number in range(variant.passes):
            row = stream(dataset, min(variant.pairs, written.pairs))
            name = variant.name if variant.passes == 1 else f"{variant.name}, pass {number + 1}"
            kept = {"order": variant.order, "precision": variant.precision, "skimage": variant.skimage}
            rows.append({"superpixels": name, **kept, "left_out": variant.left_out, **row})
            print(f"{sizes.name}, {name}: {row['pairs_per_second']:.1f} pairs/s", file=sys.stderr)
    return {**asdict(sizes), "jpeg_bytes": written.jpeg_bytes, "pixels": written.pixels, "rows": rows}


def opened(variant: Variant, written: Written, workers: int, cache: Path | None = None) -> PairDataset:
    """The pairs of a set, prepared as in the paper's run, but for the way to the superpixels."""
    superpixels = SuperpixelConfig(
        order=variant.order,  # type: ignore[arg-type]
        precision=variant.precision,  # type: ignore[arg-type]
        where="workers",
        cache=str(cache or ""),
    )
    data = DataConfig("webdataset", written.pattern, superpixels=superpixels, workers=workers)
    model = SegCLIPConfig()
    source = make_source(data, model)
    dataset = PairDataset(source, data, model, SEED, superpixels=not variant.left_out)
    if variant.skimage and dataset.labels is not None:
        dataset.labels.segmenter = Skimage()
    return dataset


def stream(dataset: PairDataset, pairs: int) -> dict[str, Any]:
    """Read `pairs` pairs once: pairs per second, a worker's time, and what bounds it.

    The time begins before the workers start.
    """
    workers, seconds, damaged = dataset.data.workers, np.zeros(len(STAGES)), 0
    start = time.perf_counter()
    for batch in batches(dataset, Positions(0, pairs // BATCH, BATCH)):
        seconds += batch.seconds
        damaged += len(batch.damaged)
    passed = time.perf_counter() - start
    if damaged:
        raise RuntimeError(f"expected pairs without damage, got {damaged} damaged ones")
    spent = dict(zip(STAGES, (1e3 * seconds / pairs).tolist(), strict=True))
    busy = float(seconds.sum()) / (workers * passed)
    slowest = max(spent, key=lambda stage: spent[stage])
    return {
        "pairs": pairs,
        "pairs_per_second": pairs / passed,
        "worker_ms_per_pair": {**spent, "all": sum(spent.values())},
        "superpixel_share_of_worker": spent["superpixels"] / sum(spent.values()),
        "workers_busy": busy,
        "bound_by": slowest if busy >= BUSY else "handing over",
    }


def check(written: Written, cache: Path) -> None:
    """The gate: scikit-image's, this package's and the cached labels are the same.

    scikit-image's argsort is made stable for this; as shipped it may order ties otherwise.
    """
    on_crop, on_stored = Variant("", CHECKED), Variant("", CHECKED, "segment_first")
    for variant, caches in ((on_crop, [None]), (on_stored, [None, cache, cache])):  # the last reads
        theirs = opened(replace(variant, skimage=True), written, 0)
        with stable_argsort():
            expected = [theirs[position].superpixels for position in range(CHECKED)]
        for each in caches:
            ours = opened(variant, written, 0, each)
            for position, labels in enumerate(expected):
                np.testing.assert_array_equal(ours[position].superpixels, labels)


@contextlib.contextmanager
def stable_argsort() -> Iterator[None]:
    """NumPy's argsort keeps the order of ties."""
    plain = np.argsort
    np.argsort = lambda a, *_, **__: plain(a, kind="stable")  # type: ignore[assignment]
    try:
        yield
    finally:
        np.argsort = plain


# --- the training loop


@dataclass(frozen=True)
class Training:
    """A run of the training loop.

    Attributes:
        name: what it is expected to be bound by.
        model: in words.
        config: the architecture.
        pairs: the most that it trains on.
        batch: pairs of a step.
        workers: loader processes.
        order: of the superpixels; those of the stored picture take the longest.
    """

    name: str
    model: str
    config: SegCLIPConfig
    pairs: int
    batch: int
    workers: int
    order: str


def runs(workers: int) -> tuple[Training, Training]:
    """One that waits for its worker, with the sizes of the demonstration's model, and one that computes."""
    words = tuple(sorted({word for text in CAPTIONS for word in re.findall(r"[^\W_]+", text.lower())}))
    closed = TextConfig(len(words) + 3, 32, width=96, layers=2, heads=4, vocabulary=words)
    small = SegCLIPConfig(
        embed_dim=96,
        vision=VisionConfig(patch_size=32, width=96, layers=2, heads=4, group_after=2),
        grouping=GroupingConfig(centers=4, cross_layers=1),
        text=closed,
        reconstruction=ReconstructionConfig(decoder_width=64, decoder_layers=1, decoder_heads=4),
    )
    text = TextConfig(width=128, layers=2, heads=4)
    large = replace(small, vision=VisionConfig(width=384, layers=6, heads=6, group_after=5), text=text)
    return (
        Training("data", "2 blocks of width 96, patches of 32 x 32", small, 400, 20, 1, "segment_first"),
        Training(
            "compute", "6 blocks of width 384, patches of 16 x 16", large, 160, 10, workers, "crop_first"
        ),
    )


def training(run: Training, written: Written, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the log says the run was bound by."""
    superpixels = SuperpixelConfig(order=run.order, where="workers")  # type: ignore[arg-type]
    data = DataConfig("webdataset", written.pattern, superpixels=superpixels, workers=run.workers)
    output = folder / f"run-{run.name}"
    steps = min(run.pairs, options.pairs) // run.batch
    before, threads = torch.get_num_threads(), max(1, cores() - run.workers)
    torch.set_num_threads(threads)  # threads that wait for one another must not wait for the workers too
    model = train(
        TrainConfig(
            output=str(output),
            model=run.config,
            data=data,
            steps=steps,
            batch_size=run.batch,
            save_every=steps,
            seed=SEED,
            device="cpu",
            quiet=True,
        )
    )
    torch.set_num_threads(before)
    (throughput,) = read_log(output, "throughput")
    kept = {name: value for name, value in throughput.items() if name not in ("event", "step")}
    parameters = sum(value.numel() for value in model.parameters())
    return {
        "expected": run.name,
        "model": run.model,
        "parameters": parameters,
        "batch": run.batch,
        "threads": threads,
        "order": run.order,
        **kept,
    }


if __name__ == "__main__":
    main()
