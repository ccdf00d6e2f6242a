"""Counted, not timed: operations of a training step and of inference, reference against fast path, ViT-B/16.

    python benchmarks/flops.py     # about a minute; prints the table, writes results/operations.json

Counted are the multiplications and additions of matrix products, convolutions and attention, as PyTorch's
counter sees them, and those of this package's operations by the formulas of counts.py. The step has 16
pairs, one for each of the captions, which are packed to their lengths on the fast path. Counts depend on
neither machine nor time.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness.captions import CAPTIONS
from harness.counts import counted
from harness.machine import commit, versions
from harness.models import Batch, batch, clear, model
from reporting.performance import operations_table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segclip_fast.ops._dispatch import force

Parts = dict[str, dict[str, int]]
RESULT = Path(__file__).parent / "results" / "operations.json"
SCOPES = {"reference": "reference", "fast": "auto"}
# Modules that do not contain one another; what runs outside all of them is the rest.
PARTS = {
    "text tower": "text",
    "grouping module": "vision.grouping",
    "first stage": "vision.first_stage",
    "third stage": "vision.third_stage",
    "reconstruction branch": "reconstruction",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON to write")
    parser.add_argument("--pairs", type=int, default=len(CAPTIONS), help="pairs of a step")
    options = parser.parse_args()
    values = count(options.pairs)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(values, indent=1) + "\n")
    print(operations_table(values))


def count(pairs: int) -> dict[str, Any]:
    """All counts, per image-text pair (a step) or per image (inference)."""
    given = batch(pairs, "fp32")
    rows = []
    for path, scope in SCOPES.items():
        with force(scope):
            found = _step(given, path) | {"inference": _inference(given)}
        for what, counts in found.items():
            for part, kinds in counts.items():
                row = {"path": path, "of": what, "part": part}
                rows += [row | {"kind": kind, "count": number / pairs} for kind, number in kinds.items()]
    return {
        "command": "python benchmarks/flops.py",
        "commit": commit(),
        "versions": versions(),
        "model": "ViT-B/16",
        "pairs": pairs,
        "parameters": sum(p.numel() for p in model().parameters()),
        "counts": rows,
    }


class _Whole(nn.Module):
    """The model behind one call, so that the counter knows its parts by name whatever method is called."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.model, self.method = model(), method

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.model, self.method)(*arguments)


def _step(given: Batch, path: str) -> dict[str, Parts]:
    """Counts of the forward and of the backward pass of one training step.

    The backward pass is counted as a whole: PyTorch's tracker is not reliable about whose it is.
    """
    with counted() as counter:
        losses = _Whole("forward")(*given.arguments(path))
        forward = _parts(counter)
    with counted() as counter:
        losses.total.backward()
        backward = {"whole model": _by_kind(counter.get_flop_counts()["Global"])}
    clear()
    return {"forward": forward, "backward": backward}


def _inference(given: Batch) -> Parts:
    """Counts of encode_image. Gradients stay on: without them PyTorch's module tracker fails."""
    with counted() as counter:
        _Whole("encode_image")(given.images)
        return _parts(counter)


def _parts(counter: FlopCounterMode) -> Parts:
    """Operations so far by part of the model and kind of operation."""
    modules = counter.get_flop_counts()
    rest = _by_kind(modules.get("Global", {}))
    found: Parts = {}
    for part, name in PARTS.items():
        prefix = f"{_Whole.__name__}.model.{name}"
        # The module itself where it is called, else its children (a stage is a list of blocks).
        names = [prefix] if prefix in modules else [m for m in modules if m.rpartition(".")[0] == prefix]
        found[part] = defaultdict(int)
        for module in names:
            for kind, number in _by_kind(modules[module]).items():
                found[part][kind] += number
                rest[kind] -= number
    return found | {"rest": rest}


def _by_kind(operations: dict[Any, int]) -> dict[str, int]:
    kinds: dict[str, int] = defaultdict(int)
    for operation, number in operations.items():
        name = str(operation)
        own = name.split(".")[-1] if "segclip_fast" in name else "products"
        kinds["attention" if "attention" in name else own] += number
    return kinds


if __name__ == "__main__":
    main()
