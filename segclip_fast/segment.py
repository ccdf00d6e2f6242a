"""Command line: segment one photo by a list of labels.

    python -m segclip_fast.segment photo.jpg --labels "cat, sofa" --checkpoint DIR --output out.png

writes `out.png` (pixel value = position of the label, the background first if asked for; coloured by a
palette), `out.overlay.png` (photo, labels and legend) and `out.regions.png` (the regions before labelling),
and prints how much of the photo each label covers. Anything unusable is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .evaluation.segmentation import Segmentation
    from .model.segclip import SegCLIP


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: `ValueError` instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = _Parser(
        prog="python -m segclip_fast.segment", description="Segment one photo by a list of labels."
    )
    parser.add_argument("photo", help="image file")
    parser.add_argument("--labels", required=True, help='what to look for, comma-separated: "cat, sofa"')
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or file of the authors")
    parser.add_argument("--output", required=True, type=Path, help="label picture to write, ending in .png")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")
    parser.add_argument("--background", action="store_true", help="allow background, where no label fits")
    parser.add_argument("--background-names", metavar="NAMES", help='background by name: "wall, floor"')
    parser.add_argument("--threshold", type=float, help="with --background: score below which it wins")
    parser.add_argument("--snap", action="store_true", help="follow the photo's edges (superpixels)")
    parser.add_argument("--template", action="append", help="prompt with {} for the label; may be repeated")
    parser.add_argument("--short-side", type=int, help="resolution: short side in pixels")
    parser.add_argument("--stride", type=int, help="pixels between sliding windows")
    parser.add_argument("--protocol", choices=("official", "paper"), default="official")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )
    return parser


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


def load_model(checkpoint: str, device: str) -> SegCLIP:
    """The model, in evaluation mode on `device` ("auto": a GPU if there is one)."""
    import torch

    from segclip_fast import SegCLIP

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device: expected a device of this machine, got {device!r} but no GPU is available"
        )
    return SegCLIP.from_pretrained(checkpoint).to(target).eval()


def coverage_table(result: Segmentation) -> str:
    """Labels and the share of the photo that each covers, the largest first, one line each."""
    rows = sorted(result.coverage.items(), key=lambda item: -item[1])
    width = max(len("label"), *(len(name) for name, _ in rows))
    lines = [f"{'label':<{width}}  coverage", *(f"{name:<{width}}  {part:>8.1%}" for name, part in rows)]
    return "\n".join(lines)


def run(argv: Sequence[str] | None) -> None:
    """Parse, segment, write, print.

    Raises:
        ValueError, OSError, RuntimeError, ImportError: whatever makes the run impossible.
    """
    args = build_parser().parse_args(argv)
    from .data.images import load_image
    from .evaluation.prompts import TEMPLATES, split_labels
    from .evaluation.segmentation import segment

    labels = split_labels(args.labels, "--labels")
    background: bool | tuple[str, ...] = args.background
    if args.background_names is not None:
        if args.background:
            raise ValueError("--background-names: expected without --background, got both")
        background = split_labels(args.background_names, "--background-names")
    check_output(args.output, args.photo, args.overwrite)
    photo = load_image(args.photo, name="photo")  # before the model, which takes longer
    result = segment(
        load_model(args.checkpoint, args.device),
        photo,
        labels,
        background=background,
        threshold=args.threshold,
        templates=args.template or TEMPLATES,
        snap=args.snap,
        short_side=args.short_side,
        stride=args.stride,
        protocol=args.protocol,
    )
    paths = output_paths(args.output)
    result.save(paths[0])
    result.overlay().save(paths[1])
    result.region_image().save(paths[2])
    print(coverage_table(result))
    print("written:", ", ".join(str(path) for path in paths))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 after one line about what is wrong."""
    try:
        run(argv)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"segment: error: {lines[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
