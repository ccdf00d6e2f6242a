"""What torchrun starts for test_parallel_training: runs one after the other, of a JSON file.

Each entry has the changes of `test_training.quick` and maybe a step after whose end a rank raises SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from test_training import quick

from segclip_fast._cli import leave
from segclip_fast.training.distributed import process_group
from segclip_fast.training.loop import train


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for entry in json.loads(plan.read_text()):
        stop = entry.pop("stop", None)

        def on_step(step, losses, stop=stop):
            if stop is not None and [step, rank] == stop:
                signal.raise_signal(signal.SIGTERM)

        try:
            train(quick(device="cpu", **entry), on_step)
        except SystemExit as end:
            if end.code != 0:
                raise
        except (ValueError, OSError) as error:
            (plan.parent / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    with process_group("gloo", timeout=60):
        main(Path(sys.argv[1]))
    leave(0)
