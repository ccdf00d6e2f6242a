"""Command line: segment one photo, or a folder of them, by a list of labels.

    python -m segclip_fast.segment photo.jpg --labels "cat, sofa" --checkpoint DIR --output out.png

writes `out.png` (pixel value = position of the label, the background first if asked for), `out.overlay.png`
(photo, labels and legend) and `out.regions.png` (the regions before labelling), and prints how much of the
photo each label covers. Anything unusable is one line on stderr and exit code 2.

    python -m segclip_fast.segment photos/ --labels "cat, sofa" --checkpoint DIR --output masks/

segments every photo below a folder: `masks/sub/name.png` for `photos/sub/name.jpg`, and `masks/labels.json`;
docs/segment.md describes them. Photos that cannot be read are skipped: one line each, and exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli import Parser, add_model, run_main

if TYPE_CHECKING:
    from .evaluation.mask_folder import MaskFolder
    from .evaluation.segmentation import Segmentation
    from .evaluation.segmenter import Segmenter


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = Parser(
        prog="python -m segclip_fast.segment",
        description="Segment one photo, or every photo below a folder, by a list of labels.",
    )
    parser.add_argument("photo", help="image file, or folder of image files")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", help='what to look for, comma-separated: "cat, sofa"')
    labels.add_argument("--labels-file", metavar="FILE", type=Path, help="what to look for, one per line")
    add_model(parser)
    parser.add_argument(
        "--output", required=True, type=Path, help="label picture to write, ending in .png; or folder of them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")
    _add_settings(parser.add_argument_group("settings"))
    folder = parser.add_argument_group("folders only")
    folder.add_argument("--resume", action="store_true", help="keep what an earlier, equal run has done")
    folder.add_argument("--overlay", action="store_true", help="also write photo, labels and legend")
    folder.add_argument("--rle", metavar="FILE", type=Path, help="also write COCO-style masks to FILE.json")
    return parser


def _add_settings(group: argparse._ArgumentGroup) -> None:
    """What shapes the result, of a photo as of a folder."""
    group.add_argument("--background", action="store_true", help="allow background, where no label fits")
    group.add_argument("--background-names", metavar="NAMES", help='background by name: "wall, floor"')
    group.add_argument("--threshold", type=float, help="with --background: score below which it wins")
    group.add_argument("--snap", action="store_true", help="follow the photo's edges (superpixels)")
    group.add_argument("--pamr", action="store_true", help="follow the photo's edges (pixel-adaptive)")
    group.add_argument("--template", action="append", help="prompt with {} for the label; may be repeated")
    group.add_argument("--short-side", type=int, help="resolution: short side in pixels")
    group.add_argument("--stride", type=int, help="pixels between sliding windows")
    group.add_argument("--protocol", choices=("official", "paper"), default="official")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    group.add_argument("--batch-size", type=int, help="photos and windows at a time: fewer need less memory")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )


def read_labels(args: argparse.Namespace) -> tuple[str, ...]:
    """The labels of --labels or --labels-file.

    Raises:
        ValueError: no labels, or some that cannot be used.
        FileNotFoundError: no such file.
    """
    from .evaluation.prompts import check_labels, split_labels

    path: Path | None = args.labels_file
    if path is None:
        return split_labels(args.labels, "--labels")
    if not path.is_file():
        raise FileNotFoundError(f"--labels-file: expected an existing text file, got {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels-file: expected UTF-8 text, got {str(path)!r} ({error})") from error
    return check_labels([line for line in lines if line.strip()], "--labels-file")


def segment_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `segment` and `segment_batch`, but for the batch size.

    Raises:
        ValueError: two kinds of background, or names that cannot be used.
    """
    from .evaluation.prompts import TEMPLATES, split_labels

    background: bool | tuple[str, ...] = args.background
    if args.background_names is not None:
        if args.background:
            raise ValueError("--background-names: expected without --background, got both")
        background = split_labels(args.background_names, "--background-names")
    options = {
        "background": background,
        "threshold": args.threshold,
        "templates": args.template or TEMPLATES,
        "snap": args.snap,
        "short_side": args.short_side,
        "stride": args.stride,
        "protocol": args.protocol,
    }
    if args.pamr:
        options["pamr"] = True
    if args.precision != "fp32":
        options["precision"] = args.precision
    return options


def load_model(spec: str, device: str) -> Segmenter:
    """The model, in evaluation mode on `device` ("auto": a GPU if there is one)."""
    from .evaluation.models import load_segmenter

    return load_segmenter(spec, device)


def output_paths(output: Path) -> tuple[Path, Path, Path]:
    """The three files of a run: `out.png`, `out.overlay.png`, `out.regions.png`."""
    return output, output.with_suffix(".overlay.png"), output.with_suffix(".regions.png")


def check_output(output: Path, photo: str, overwrite: bool) -> None:
    """Refuse output that cannot or must not be written.

    Raises:
        ValueError: no .png, no such folder, a file in the way (without `overwrite`), or the photo itself.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output: expected a file name ending in .png, got {str(output)!r}")
    if not output.parent.is_dir():
        raise ValueError(f"--output: expected an existing folder, got {str(output.parent)!r}")
    for path in output_paths(output):
        if path.resolve() == Path(photo).resolve():
            raise ValueError(f"--output: expected another file than the photo, got {str(path)!r}")
        if path.is_dir():
            raise ValueError(f"--output: expected a file, {str(path)!r} is a folder")
        if path.exists() and not overwrite:
            raise ValueError(f"--output: {str(path)!r} exists; --overwrite replaces it")


def coverage_table(result: Segmentation) -> str:
    """Labels and the share of the photo that each covers, the largest first, one line each."""
    rows = sorted(result.coverage.items(), key=lambda item: -item[1])
    width = max(len("label"), *(len(name) for name, _ in rows))
    lines = [f"{'label':<{width}}  coverage", *(f"{name:<{width}}  {part:>8.1%}" for name, part in rows)]
    return "\n".join(lines)


def run_photo(args: argparse.Namespace) -> int:
    """Segment one photo, write three pictures, print the table."""
    from .data.images import load_image
    from .evaluation.mask_folder import save_png
    from .evaluation.segmentation import segment

    for name in ("resume", "overlay", "rle"):
        if getattr(args, name):
            raise ValueError(f"--{name}: expected with a folder of photos only, got {args.photo!r}")
    labels, options = read_labels(args), segment_options(args)
    if args.batch_size is not None:
        options["batch_size"] = args.batch_size
    check_output(args.output, args.photo, args.overwrite)
    photo = load_image(args.photo, name="photo")  # before the model, which takes longer
    result = segment(load_model(args.model, args.device), photo, labels, **options)
    paths = output_paths(args.output)
    pictures = (result.label_image(), result.overlay(), result.region_image())
    for path, picture in zip(paths, pictures, strict=True):
        save_png(picture, path)
    print(coverage_table(result))
    print("written:", ", ".join(str(path) for path in paths))
    return 0


def record_settings(
    args: argparse.Namespace, labels: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """All that shapes the masks of a folder, defaults filled in where no model is needed for that.

    Raises:
        ValueError: an option out of range.
    """
    from . import __version__
    from .evaluation.options import Options
    from .evaluation.windows import Sliding

    sliding = Sliding(args.protocol, args.short_side, args.stride, args.batch_size, args.precision)
    known = {key: options[key] for key in ("background", "threshold", "templates", "snap")}
    settings = Options(**known, pamr=args.pamr, sliding=sliding).as_dict()
    windows = settings.pop("sliding")
    del windows["batch_size"], settings["refinement"]  # changes nothing; told by the others
    run = {"version": __version__, "model": args.model, "photos": str(Path(args.photo)), "labels": labels}
    return run | settings | windows


def run_folder(args: argparse.Namespace) -> int:
    """Segment every photo below a folder; 0, or 1 if some were skipped.

    Raises:
        ValueError: also if no photo could be read.
    """
    from .evaluation.mask_folder import MaskFolder
    from .evaluation.photos import find_photos

    if args.overwrite and args.resume:
        raise ValueError("--resume: expected without --overwrite, got both")
    labels, options, root = read_labels(args), segment_options(args), Path(args.photo)
    settings = record_settings(args, labels, options)
    photos, count = find_photos(root), len(labels) + bool(options["background"])
    masks = MaskFolder(args.output, root, photos, settings, labels=count, overlay=args.overlay, rle=args.rle)
    todo = masks.begin(overwrite=args.overwrite, resume=args.resume)
    try:
        if todo:
            with closing(_results(masks, todo, args, {"labels": labels, **options})) as results:
                masks.add_all(results)
    except BaseException:
        if masks.added:
            done = len(masks.kept) + len(masks.added)
            print(f"segment: {done} of {len(photos)} photos are done, --resume continues", file=sys.stderr)
        raise
    if not (masks.kept or masks.added):
        raise ValueError(f"photo: expected photos that can be read, got {len(photos)} that cannot")
    masks.finish()
    counts = f"{len(masks.added)} photos, {len(masks.kept)} kept, {len(masks.skipped)} skipped"
    print(f"written: {args.output} ({counts})")
    return 1 if masks.skipped else 0


def _results(
    masks: MaskFolder, todo: Sequence[str], args: argparse.Namespace, options: dict[str, Any]
) -> Generator[tuple[str, Segmentation], None, None]:
    """Load the model and run it over the photos still to do; photos that cannot be read are reported."""
    from tqdm import tqdm

    from .evaluation.models import fingerprint
    from .evaluation.photos import BATCH_SIZE, segment_files

    model = load_model(args.model, args.device)
    masks.confirm("weights", fingerprint(args.model, model)["sha256"])
    paths, batch_size = [Path(args.photo, name) for name in todo], args.batch_size
    options |= {"batch_size": BATCH_SIZE if batch_size is None else batch_size, "window_batch": batch_size}
    results = segment_files(model, paths, **options)
    names = tqdm(todo, unit="photo", file=sys.stderr, disable=not sys.stderr.isatty())
    with closing(results):
        for name, photo in zip(names, results, strict=True):
            if photo.result is not None:
                yield name, photo.result
                continue
            tqdm.write(f"segment: skipped {photo.path}: {photo.error}", file=sys.stderr)
            masks.skip(name, str(photo.error))


def run(argv: Sequence[str] | None) -> int:
    """Parse, segment, write, print; the exit code.

    Raises:
        ValueError, OSError, RuntimeError, ImportError, MemoryError: whatever makes the run impossible.
    """
    args = build_parser().parse_args(argv)
    return run_folder(args) if Path(args.photo).is_dir() else run_photo(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 1 if photos were skipped, 2 after one line about what is wrong."""
    return run_main("segment", run, argv)


if __name__ == "__main__":
    sys.exit(main())
