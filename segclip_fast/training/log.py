"""What a run reports: one JSON line per step, always, and a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from ..interop.files import write_whole

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
    """

    def __init__(self, run: Path, start: int, steps: int, quiet: bool = False) -> None:
        kept = [json.dumps(entry) + "\n" for entry in read_log(run, None) if entry["step"] <= start]
        write_whole(run / FILE, lambda path: path.write_text("".join(kept)))
        self.file = (run / FILE).open("a")
        interval = 0.2 if sys.stderr.isatty() else 20.0  # seconds; a log file wants few lines
        from tqdm import tqdm

        self.bar = tqdm(
            total=steps, initial=start, disable=quiet, dynamic_ncols=True, unit="step", mininterval=interval
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.file.close()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """One finished step: losses, rates, gradient norm, images per second."""
        self._write({"event": "step", "step": step, **values})
        shown = {"total": "loss", "contrastive": "con", "reconstruction": "rec", "superpixel_kl": "kl"}
        losses = {short: f"{values[name]:.4f}" for name, short in shown.items() if name in values}
        self.bar.set_postfix({**losses, "img/s": f"{values['images_per_second']:.0f}"}, refresh=False)
        self.bar.update()

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """One zero-shot evaluation."""
        self._write({"event": "evaluation", "step": step, **values})
        self.bar.write(f"step {step}: mIoU {values['miou']:.4f} on {values['images']} held-out images")

    def _write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
