"""Stored benchmark entries as rows: one per op, size, precision and direction, its rivals side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
CEILINGS = ("copy", "product")
END_TO_END = ("training step", "encode_image", "segment", "evaluation")


@dataclass(frozen=True)
class Row:
    """The rivals of one comparison.

    Attributes:
        op: stem of the op, or "training step" and the like.
        size: in words.
        dtype: fp32 or bf16.
        direction: forward, forward_backward, step ...
        rivals: entries by rival; those that did not run are missing.
    """

    op: str
    size: str
    dtype: str
    direction: str
    rivals: dict[str, Entry]

    def ms(self, rival: str) -> float | None:
        """Median time of a call as the host makes it."""
        return self.rivals[rival]["median_ms"] if rival in self.rivals else None

    def device_ms(self, rival: str) -> float | None:
        """Median time without the host's launch overhead, where it was measured; else as called."""
        entry = self.rivals.get(rival, {})
        return entry.get("replay_ms") or self.ms(rival)

    def fact(self, rival: str, name: str) -> Any:
        """What is stored with a rival's times."""
        return self.rivals.get(rival, {}).get(name)

    def first(self) -> Entry:
        """Any entry: sizes and floors are the same for all."""
        return next(iter(self.rivals.values()))

    def words(self) -> str:
        """The row in a sentence."""
        return f"{self.op} ({self.size}, {self.dtype}, {self.direction.replace('_', ' + ')})"


def rows_of(run: Mapping[str, Any]) -> list[Row]:
    """The comparisons of a run: ops in the order they ran, then what runs the whole model."""
    found: dict[tuple[str, ...], Row] = {}
    for entry in run["benchmarks"]:
        if "op" not in entry or entry["op"] in CEILINGS:
            continue
        key = tuple(entry[name] for name in ("op", "size", "dtype", "direction"))
        found.setdefault(key, Row(*key, rivals={})).rivals[entry["rival"]] = entry
    return sorted(found.values(), key=lambda row: row.op in END_TO_END)


@dataclass(frozen=True)
class Ceilings:
    """What the machine did at best, measured in the same run.

    Attributes:
        bytes: per second, read and written by a large copy.
        operations: per second of a large matrix product, by precision.
    """

    bytes: float | None
    operations: dict[str, float]

    def floor_ms(self, floor_bytes: float, operations: float, dtype: str) -> float | None:
        """The time that neither the memory bus nor the arithmetic can go below."""
        rate = self.operations.get(dtype)
        if self.bytes is None or rate is None:
            return None
        return max(floor_bytes / self.bytes, operations / rate) * 1e3


def ceilings_of(run: Mapping[str, Any]) -> Ceilings:
    """From the entries of bench_ceilings.py."""
    moved, rates = None, {}
    for entry in run["benchmarks"]:
        if entry.get("op") == "copy":
            moved = entry["floor_bytes"] / entry["median_ms"] * 1e3
        elif entry.get("op") == "product":
            rates[entry["dtype"]] = entry["floor_operations"] / entry["median_ms"] * 1e3
    return Ceilings(moved, rates)


def cells(*values: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, values)) + " |"


def header(*names: str) -> list[str]:
    """The head of a Markdown table."""
    return [cells(*names), "|" + "---|" * len(names)]


def figure(value: float | None, unit: float = 1.0) -> str:
    """Three significant digits, without exponent; a dash for nothing."""
    if value is None:
        return "-"
    value /= unit
    if value == 0:
        return "0"
    digits = 2 - len(str(int(abs(value)))) + (1 if abs(value) >= 1 else 0)
    if abs(value) < 1:
        return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"
    return f"{value:.{max(digits, 0)}f}"


def ratio(numerator: float | None, denominator: float | None) -> str:
    """How many times, or a dash."""
    if numerator is None or not denominator:
        return "-"
    return f"{figure(numerator / denominator)}x"
