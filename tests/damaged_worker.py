"""What torchrun starts for test_damaged_data: runs one after the other, of a JSON file.

Each entry has the arguments of `run_config`, and maybe the steps in which the second process has a loss
("bad_loss") or pictures ("bad_pictures") that are not finite. Errors go to OUTPUT-RANK.txt, and a digest of
the parameters of every process, after the run, to OUTPUT-RANK.sha.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from damaged_shards import run_config

from segclip_fast import SegCLIP
from segclip_fast._cli import leave
from segclip_fast.training import loop
from segclip_fast.training.distributed import process_group

real = loop.losses_and_gradients


def poison(bad_loss: list[int], bad_pictures: list[int]) -> None:
    """Make steps of this process fail."""

    def poisoned(run, batch, step):
        if step in bad_pictures:
            batch = dataclasses.replace(batch, images=batch.images * float("nan"))
        losses = real(run, batch, step)
        return dataclasses.replace(losses, total=losses.total * float("nan")) if step in bad_loss else losses

    loop.losses_and_gradients = poisoned


def digest(model: SegCLIP) -> str:
    """Of all parameters, bit by bit."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().numpy().tobytes())
    return found.hexdigest()


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for entry in json.loads(plan.read_text()):
        bad = entry.pop("bad_loss", []), entry.pop("bad_pictures", [])
        poison(*(bad if rank == 1 else ([], [])))
        try:
            model = loop.train(run_config(**entry))
        except (ValueError, OSError, FloatingPointError) as error:
            Path(f"{entry['output']}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        else:
            Path(f"{entry['output']}-{rank}.sha").write_text(digest(model))


if __name__ == "__main__":
    with process_group("gloo", timeout=60):
        main(Path(sys.argv[1]))
    leave(0)
