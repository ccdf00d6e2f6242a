"""Command line: make the label maps that a data set does not come with.

    python -m segclip_fast.evaluation.prepare coco-object --stuffthing FOLDER --output FOLDER

turns every pixel map of COCO-Stuff (stuffthingmaps, `000000000139.png`) in FOLDER into COCO-Object's
`000000000139_instanceTrainIds.png`: 80 things are 1 to 80, everything else, 255 too, is background 0. Files
are written whole or not at all, so a run that was stopped can be started again; files that exist are kept
unless --overwrite is given. Anything unusable is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .._cli import Parser, run_main
from ..interop.files import write_whole
from .label_maps import coco_object_table, read_labels

ENDING = "_instanceTrainIds.png"
_MAP = re.compile(r"\d{12}\.png")


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = Parser(
        prog="python -m segclip_fast.evaluation.prepare",
        description="Make the label maps that a data set does not come with.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    objects = commands.add_parser("coco-object", help="COCO-Object from the pixel maps of COCO-Stuff")
    objects.add_argument("--stuffthing", required=True, type=Path, help="folder of the maps, such as val2017")
    objects.add_argument("--output", required=True, type=Path, help="folder to write to, made if need be")
    objects.add_argument("--overwrite", action="store_true", help="replace maps that exist")
    return parser


def prepare_coco_object(stuffthing: Path, output: Path, *, overwrite: bool = False) -> tuple[int, int]:
    """Write COCO-Object's label map for each pixel map of COCO-Stuff.

    Args:
        stuffthing: folder of the pixel maps, twelve digits and ".png" each; other files are left alone.
        output: folder of the results, 8-bit grey PNG files; it may be the same.
        overwrite: replace results that exist, which are kept otherwise.

    Returns:
        How many were written, how many kept.

    Raises:
        FileNotFoundError: no such folder, or no pixel map in it.
        ValueError: a broken map or one with values that are no id of COCO-Stuff.
        OSError: `output` cannot be written.
    """
    from tqdm import tqdm

    maps = (
        sorted(p for p in stuffthing.glob("*.png") if _MAP.fullmatch(p.name)) if stuffthing.is_dir() else []
    )
    if not maps:
        inner = [name for name in ("val2017", "train2017") if (stuffthing / name).is_dir()]
        hint = f"; did you mean {str(stuffthing / inner[0])!r}?" if inner else ""
        wanted = "a folder of COCO-Stuff's pixel maps, such as 000000000139.png"
        raise FileNotFoundError(f"--stuffthing: expected {wanted}, got none in {str(stuffthing)!r}{hint}")
    output.mkdir(parents=True, exist_ok=True)
    table, kept = coco_object_table(), 0
    for path in tqdm(maps, desc="coco-object", unit="map", disable=None):
        target = output / f"{path.stem}{ENDING}"
        if target.exists() and not overwrite:
            kept += 1
            continue
        labels = read_labels(path, table, name="pixel map").astype(np.uint8)  # (H, W)
        write_whole(target, partial(Image.fromarray(labels).save, format="PNG"))
    return len(maps) - kept, kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 after one line about what is wrong."""
    return run_main("prepare", _run, argv)


def _run(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    written, kept = prepare_coco_object(args.stuffthing, args.output, overwrite=args.overwrite)
    print(f"coco-object: {written} maps written, {kept} kept, in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
