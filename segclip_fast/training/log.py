"""What a run reports: one JSON line per step, always, and a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from ..interop.files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from .reporters import Reporter

FILE = "log.jsonl"


def read_log(run: Path, event: str | None = "step") -> list[dict[str, Any]]:
    """Entries of a run's log, of one event ("step", "evaluation") or all (None); without a cut last line."""
    path = run / FILE
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if event in (None, entry["event"]):
            lines.append(entry)
    return lines


class RunLog:
    """Appends to RUN/log.jsonl and drives the progress bar; use as a context manager.

    Args:
        run: the run folder.
        start: finished steps to continue from; lines of later steps are dropped.
        steps: steps of the whole run.
        quiet: no progress bar.
        active: False for a process that writes nothing (all but the first).
        reporters: where scalars and pictures go besides.
    """

    def __init__(
        self,
        run: Path,
        start: int,
        steps: int,
        quiet: bool = False,
        active: bool = True,
        reporters: Sequence[Reporter] = (),
    ) -> None:
        self.file: TextIO | None = None
        self.reporters = reporters
        if active:
            kept = [json.dumps(entry) + "\n" for entry in read_log(run, None) if entry["step"] <= start]
            write_whole(run / FILE, lambda path: path.write_text("".join(kept)))
            self.file = (run / FILE).open("a")
        interval = 0.2 if sys.stderr.isatty() else 20.0  # seconds; a log file wants few lines
        from tqdm import tqdm

        hidden = quiet or not active
        self.bar = tqdm(
            total=steps, initial=start, disable=hidden, dynamic_ncols=True, unit="step", mininterval=interval
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        for reporter in self.reporters:
            reporter.close()
        if self.file is not None:
            self.file.close()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """One finished step: losses, rates, gradient norm, pairs per second, waiting, memory."""
        self.event("step", step, values)
        self._report(step, {name: value for name, value in values.items() if isinstance(value, float)})
        shown = {"total": "loss", "contrastive": "con", "reconstruction": "rec", "superpixel_kl": "kl"}
        postfix = {short: f"{values[name]:.4f}" for name, short in shown.items() if name in values}
        postfix["img/s"] = f"{values['images_per_second']:.0f}"
        postfix["wait"] = f"{values['data_seconds'] / values['step_seconds']:.0%}"
        postfix["mem"] = f"{values['memory_gb']:.1f}G"
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """One zero-shot evaluation."""
        self.event("evaluation", step, values)
        self._report(step, {f"evaluation/{name}": float(value) for name, value in values.items()})
        self.say(f"step {step}: mIoU {values['miou']:.4f} on {values['images']} held-out images")

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 for the reporters."""
        for reporter in self.reporters:
            reporter.picture(step, name, picture)

    def event(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line of the log."""
        if self.file is not None:
            self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def _report(self, step: int, values: dict[str, float]) -> None:
        for reporter in self.reporters:
            reporter.scalars(step, values)
