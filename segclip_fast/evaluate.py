"""Command line: zero-shot segmentation of a standard data set, by the published protocol.

    python -m segclip_fast.evaluate --dataset voc --data-root VOCdevkit --checkpoint segclip.bin
    torchrun --nproc-per-node 8 -m segclip_fast.evaluate --dataset context --data-root ... --checkpoint ...

prints the IoU of every class and the means and writes them, with all settings, to a JSON file. Refinements
(--snap, --pamr, --short-side with --stride, --templates) are off by default and named in the result. Under
torchrun every process takes its share of the images; the result is the same. docs/evaluation.md says more.
Anything unusable is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli import Parser, add_model, leave, run_main

WAIT = 6 * 3600.0  # seconds that processes wait for the slowest one

if TYPE_CHECKING:
    import torch

    from .evaluation.datasets import SegmentationSet
    from .evaluation.options import Options
    from .evaluation.segmenter import Segmenter
    from .evaluation.vocabulary_file import OwnPrompts


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    from .evaluation.datasets import DATASETS

    parser = Parser(
        prog="python -m segclip_fast.evaluate",
        description="Zero-shot segmentation of a standard data set, by the published protocol.",
    )
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="which data set")
    parser.add_argument("--data-root", required=True, type=Path, help="its folder, as published")
    add_model(parser)
    parser.add_argument("--output", type=Path, help="JSON file (default: DATASET.json)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing JSON file")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images only")
    parser.add_argument("--partial", action="store_true", help="accept a part of the data set on disk")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the best and the worst images")
    parser.add_argument("--pictures-count", type=int, default=8, metavar="N", help="how many of each (8)")
    _add_protocol(parser.add_argument_group("protocol"))
    _add_refinements(parser.add_argument_group("refinements, off by default and named in the result"))
    _add_speed(parser.add_argument_group("speed and memory; the result stays the same, but for --precision"))
    return parser


def _add_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--protocol", choices=("official", "paper"), default="official")
    group.add_argument("--threshold", type=float, help="of the background (default: the data set's)")


def _add_refinements(group: argparse._ArgumentGroup) -> None:
    from .evaluation.prompts import TEMPLATE_SETS

    group.add_argument("--snap", action="store_true", help="follow the image's edges (superpixels)")
    group.add_argument("--pamr", action="store_true", help="follow the image's edges (pixel-adaptive)")
    group.add_argument("--short-side", type=int, help="short side in pixels after resizing")
    group.add_argument("--stride", type=int, help="pixels between sliding windows")
    group.add_argument("--templates", choices=TEMPLATE_SETS, help="set of prompts (default: release)")
    group.add_argument("--background-names", metavar="NAMES", help='background by name: "wall, floor"')
    group.add_argument("--vocabulary", type=Path, metavar="YAML", help="own prompts, synonyms and templates")


def _add_speed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch-size", type=int, help="windows at a time (default: what memory holds)")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    group.add_argument("--workers", type=int, help="processes that read images (default: by the CPUs)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU")


def read_prompts(args: argparse.Namespace, data: SegmentationSet) -> OwnPrompts:
    """The prompts: the data set's own, or what --vocabulary says in their place."""
    from .evaluation.prompts import split_labels, template_set
    from .evaluation.vocabulary_file import OwnPrompts, read_vocabulary

    classes = data.class_names[int(data.background) :]
    own = OwnPrompts(None, tuple(data.prompts))
    if args.vocabulary is not None:
        own = read_vocabulary(args.vocabulary, classes, data.prompts)
    if args.templates is not None:
        own = dataclasses.replace(own, templates=template_set(args.templates))
    if args.background_names is not None:
        names = split_labels(args.background_names, "--background-names")
        own = dataclasses.replace(own, background=names)
    if own.background is not None and not data.background:
        raise ValueError(f"background: expected none, {data.name} has no background class")
    return own


def make_options(
    args: argparse.Namespace, data: SegmentationSet, own: OwnPrompts, model: Segmenter
) -> Options:
    """All settings, the data set's threshold filled in.

    Raises:
        ValueError: settings that do not go together or are out of range.
    """
    from .evaluation.options import Options
    from .evaluation.prompts import TEMPLATES
    from .evaluation.vocabularies import default_threshold
    from .evaluation.windows import Sliding

    threshold = args.threshold
    if threshold is None and data.background and own.background is None:
        released = getattr(model, "thresholds", {})  # a baseline's own
        threshold = released.get(data.name, default_threshold(data.name, args.protocol))
    return Options(
        background=own.background if own.background is not None else data.background,
        threshold=threshold,
        templates=own.templates or TEMPLATES,
        snap=args.snap,
        pamr=args.pamr,
        sliding=Sliding(args.protocol, args.short_side, args.stride, args.batch_size, args.precision),
    )


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a JSON file that cannot or must not be written.

    Raises:
        ValueError: no such folder, a folder in its place, or a file in the way (without `overwrite`).
    """
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output: expected an existing folder, got {str(output.parent)!r}")
    if output.is_dir():
        raise ValueError(f"--output: expected a file, {str(output)!r} is a folder")
    if output.exists() and not overwrite:
        raise ValueError(f"--output: {str(output)!r} exists; --overwrite replaces it")


@contextmanager
def processes(device: str) -> Iterator[tuple[torch.device, int, int]]:
    """Device, number and count of the processes; under torchrun a process group for the block."""
    from .evaluation.models import pick_device

    target = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield target, 0, 1
        return
    from .training.distributed import process_group

    backend = "nccl" if target.type == "cuda" else "gloo"
    with process_group(backend, timeout=WAIT) as place:
        yield place.device, place.rank, place.world


def run(argv: Sequence[str] | None) -> None:
    """Parse, evaluate, print, write.

    Raises:
        ValueError, OSError, RuntimeError, ImportError: whatever makes the run impossible.
    """
    args = build_parser().parse_args(argv)
    from .evaluation.datasets import open_dataset

    output = args.output or Path(f"{args.dataset}.json")
    check_output(output, args.overwrite)
    data = open_dataset(args.dataset, args.data_root, partial=args.partial)
    own = read_prompts(args, data)  # before the model, which takes longer
    with processes(args.device) as (device, rank, world):
        _evaluate(args, data, own, output, device, rank, world)


def _evaluate(
    args: argparse.Namespace,
    data: SegmentationSet,
    own: OwnPrompts,
    output: Path,
    device: torch.device,
    rank: int,
    world: int,
) -> None:
    from .evaluation import report
    from .evaluation.harness import evaluate_set
    from .evaluation.models import load_segmenter
    from .evaluation.options import prepare_vocabulary

    model = load_segmenter(args.model, device)
    options = make_options(args, data, own, model)
    found = evaluate_set(
        model,
        data,
        own.labels,
        options,
        synonyms=own.synonyms,
        limit=args.limit,
        workers=default_workers(world) if args.workers is None else args.workers,
        progress=True,
    )
    if rank != 0:
        return
    print(report.table(found.metric))
    print(f"\n{data.name}: {found.images} images, {found.images_per_second:.2f} images/s on {device}")
    values = describe(args, data, own, options, model)
    values |= report.environment(device, world) | {"result": report.as_dict(found)}
    report.write_json(output, values)
    print(f"written: {output}")
    if args.pictures is not None:
        vocabulary = prepare_vocabulary(model, own.labels, options, own.synonyms)
        shown = report.draw_extremes(
            model, data, vocabulary, options, found, args.pictures, args.pictures_count
        )
        print(f"written: {len(shown)} pictures in {args.pictures}")


def describe(
    args: argparse.Namespace, data: SegmentationSet, own: OwnPrompts, options: Options, model: Segmenter
) -> dict[str, Any]:
    """What was evaluated on what and how, for JSON."""
    from .evaluation.models import fingerprint

    whole = args.limit is None and not args.partial
    return {
        "dataset": data.name,
        "images_on_disk": len(data),
        "part_of_the_data_set": not whole,
        "protocol": options.sliding.protocol,
        "refinement": options.refinement,
        "options": options.as_dict(),
        "prompts": dict(zip(data.class_names[int(data.background) :], own.labels, strict=True)),
        "synonyms": own.synonyms,
        "model": args.model,
        "checkpoint": fingerprint(args.model, model),
    }


def default_workers(world: int) -> int:
    """Reading processes: the CPUs shared among the `world` processes of this machine, 8 at most."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max(0, min(8, len(os.sched_getaffinity(0)) // local - 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 after one line about what is wrong."""
    return run_main("evaluate", run, argv)


if __name__ == "__main__":
    leave(main())
