"""Curves of training runs: `python -m segclip_fast.training.plot RUN [RUN ...] [--output curves.png]`.

Losses, gradient norm, learning rates, images per second and zero-shot mIoU over the steps, from the run's
log, which may still grow. Measured values are pale, their running mean is strong; several runs share axes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._cli import Parser, run_main
from ..interop.files import write_whole
from .log import FILE, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES = ("contrastive", "reconstruction", "superpixel_kl")
WINDOW = 25  # steps of the running mean, fewer in a short run
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what it shows.
        values: names in the log; those that no run has are left out.
        event: "step" or "evaluation".
        smooth: also draw the running mean.
        scale: of the vertical axis: "zero" starts at 0, "log" is logarithmic.
    """

    title: str
    values: tuple[str, ...]
    event: str = "step"
    smooth: bool = True
    scale: str = "zero"


def loss_panels() -> tuple[Panel, ...]:
    """One panel for each of the three losses."""
    return tuple(Panel(name.replace("_", " "), (name,)) for name in LOSSES)


def all_panels() -> tuple[Panel, ...]:
    """Everything that a log tells of a run."""
    return (
        Panel("total loss", ("total",)),
        *loss_panels(),
        Panel("gradient norm before clipping", ("gradient_norm",), scale="log"),
        Panel("learning rates", ("lr", "lower_lr"), smooth=False),
        Panel("images per second", ("images_per_second",)),
        Panel("zero-shot mIoU", ("miou",), event="evaluation", smooth=False),
    )


def draw(runs: Sequence[Path], output: Path, panels: Sequence[Panel] | None = None) -> None:
    """Draw the curves of `runs` into the PNG `output`, which is replaced.

    Args:
        runs: run folders; several are overlaid.
        output: file to write, whole or not at all.
        panels: what to show, all of it by default; panels without any value are left out.

    Raises:
        ValueError: no run, a log without steps, or none of the values; an output that is no .png.
        FileNotFoundError: no such run, or the folder has no log; no folder for the output.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not runs:
        raise ValueError("runs: expected at least one run folder, got none")
    if output.suffix.lower() != ".png":
        raise ValueError(f"output: expected a .png file, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: expected a file in an existing folder, got {output}")
    logs = [_read(run) for run in runs]
    shown = [
        panel
        for panel in panels or all_panels()
        if any(_series(log, panel, name)[0].size for log in logs for name in panel.values)
    ]
    if not shown:
        raise ValueError(f"panels: expected values that the log has, got none of them in {runs[0] / FILE}")
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3 * columns + (columns < 2), 3 * rows), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    labels = _labels(runs)
    for axis, panel in zip(axes, shown, strict=False):
        for index, (log, label) in enumerate(zip(logs, labels, strict=True)):
            _draw_run(axis, panel, log, f"C{index % 10}", label)
        axis.set(title=panel.title, xlabel="step")
        if panel.scale == "log":
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, None)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    if len(runs) > 1:
        axes[0].legend(fontsize=7)
    figure.tight_layout()
    write_whole(output, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _read(run: Path) -> list[dict[str, Any]]:
    """A run's log, all events."""
    if not run.is_dir():
        raise FileNotFoundError(f"run: expected a run folder, found none at {run}")
    if not (run / FILE).is_file():
        raise FileNotFoundError(f"run: expected a run folder with {FILE}, found none in {run}")
    entries = read_log(run, None)
    if not any(entry["event"] == "step" for entry in entries):
        raise ValueError(f"run: expected at least one finished step in {run / FILE}, got none")
    return entries


def _series(log: list[dict[str, Any]], panel: Panel, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and values (S,) of what is called `name`; skipped steps and missing values are left out."""
    points = [
        (entry["step"], entry[name])
        for entry in log
        if entry["event"] == panel.event and not entry.get("skipped") and _is_number(entry.get(name))
    ]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _draw_run(axis: Axes, panel: Panel, log: list[dict[str, Any]], colour: str, label: str) -> None:
    for number, name in enumerate(panel.values):
        steps, values = _series(log, panel, name)
        if not values.size:
            continue
        style = "--" if number else "-"
        own = label if number == 0 else None
        if panel.smooth:
            window = max(1, min(WINDOW, len(values) // 4))
            mean = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps[window - 1 :], mean, style, color=colour, label=own)
        else:
            marker = "." if panel.event == "evaluation" or len(values) == 1 else ""
            axis.plot(steps, values, style, marker=marker, color=colour, label=own)


def _labels(runs: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two runs have the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def parse(argv: Sequence[str] | None) -> int:
    """Parse the command line and draw."""
    parser = Parser(prog="python -m segclip_fast.training.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are overlaid")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG (default: curves.png)")
    options = parser.parse_args(argv)
    draw(options.runs, options.output)
    print(f"curves: {options.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 done, 2 unusable runs or output."""
    return run_main("plot", parse, argv)


if __name__ == "__main__":
    sys.exit(main())
