"""The tables of docs/performance.md: operations that are counted, and floors against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reporting.rows import Ceilings, Row, ceilings_of, cells, figure, header, ratio, rows_of
from reporting.tables import LINK, MB, bandwidth, notes

GIGA = 1e9
UNCOUNTED = "Not counted yet: `python benchmarks/flops.py`."
UNMEASURED = "Not measured yet: `make bench`, and `make gpu` on a machine with a GPU."
# What is done per pair or image of a row's batch, by (op, directions).
COUNTED = {"training step": ("forward", "backward"), "encode_image": ("inference",)}


def operations_table(operations: Mapping[str, Any] | None) -> str:
    """Operations per pair (training) and per image (inference), reference against fast path, by part."""
    if not operations:
        return UNCOUNTED + "\n"
    counts = operations["counts"]
    parts = dict.fromkeys(row["part"] for row in counts if row["of"] != "backward")
    kinds = (("forward",), ("inference",))
    lines = [_operation_cells(part, counts, part, kinds) for part in parts]
    lines += [
        _operation_cells("all", counts, "all", kinds),
        _operation_cells("backward", counts, "all", (("backward",),)),
        _operation_cells("forward + backward", counts, "all", (("forward", "backward"),)),
    ]
    return "\n".join(
        [
            f"`{operations['command']}`: {operations['model']}, {operations['pairs']} pairs, "
            f"{operations['parameters'] / 1e6:.1f}M parameters, torch {operations['versions']['torch']}, "
            f"commit {operations['commit']} ([operations.json](../{LINK}operations.json)). 10^9 "
            "multiplications and additions, per image-text pair for training, per image for inference.",
            "",
            *header("", "training, forward: reference", "fast", "", "inference: reference", "fast", ""),
            *lines,
            "",
        ]
    )


def _operation_cells(
    name: str, counts: list[dict[str, Any]], part: str, kinds: tuple[tuple[str, ...], ...]
) -> str:
    columns: list[str] = []
    for of in kinds:
        pair = [_total(counts, path, of, part) for path in ("reference", "fast")]
        columns += ["", "", ""] if not any(pair) else [figure(x, GIGA) for x in pair] + [ratio(*pair)]
    return cells(name, *columns, *[""] * (6 - len(columns)))


def floor_tables(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows of all runs: floor, what the reference moves, times, and how far the fast path is above."""
    tables = [
        _floor_table(name, run, stored.get("operations.json"))
        for name, run in stored.items()
        if "benchmarks" in run and rows_of(run)
    ]
    return "\n".join(tables) if tables else UNMEASURED + "\n"


def _floor_table(name: str, run: Mapping[str, Any], operations: Mapping[str, Any] | None) -> str:
    ceilings = ceilings_of(run)
    rates = ", ".join(f"{figure(rate, 1e12)} TFLOP/s {dtype}" for dtype, rate in ceilings.operations.items())
    copied = "not measured" if ceilings.bytes is None else f"{figure(ceilings.bytes, GIGA)} GB/s"
    versions = ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items() if v)
    columns = (
        *("", "size", "direction", "floor MB", "floor GFLOP", "reference moves MB", "floor ms"),
        *("reference ms", "compiled ms", "fast ms", "fast, replayed, ms", "fast over floor"),
        "of copy bandwidth",
        *("peak MB: reference", "compiled", "fast"),
    )
    return "\n".join(
        [
            f"### {run.get('device_name') or run['cpu']}",
            "",
            f"[{name}](../{LINK}{name}), commit {run['commit']}, {versions}, {run.get('threads')} host "
            f"threads. Measured in the same run: copy {copied} (read + written), matrix product "
            f"{rates or 'not measured'}.",
            "",
            *header(*columns),
            *(cells(*_floor_columns(row, ceilings, operations)) for row in rows_of(run)),
            "",
            *(f"- {line}" for line in notes(rows_of(run))),
            "",
        ]
    )


def _floor_columns(row: Row, ceilings: Ceilings, operations: Mapping[str, Any] | None) -> list[str]:
    floor_bytes, floor_operations = _floor(row, operations)
    floor_ms = None
    if floor_operations is not None:
        floor_ms = ceilings.floor_ms(floor_bytes or 0, floor_operations, row.dtype)
    replay = row.fact("fast", "replay_ms")
    return [
        row.op,
        f"{row.size}, {row.dtype}",
        row.direction.replace("_", " + "),
        figure(floor_bytes, MB),
        figure(floor_operations, GIGA),
        figure(row.fact("reference", "moved_bytes"), MB),
        figure(floor_ms),
        *(figure(row.ms(rival)) for rival in ("reference", "compiled", "fast")),
        figure(replay),
        ratio(row.device_ms("fast"), floor_ms),
        bandwidth(row, ceilings),
        *(figure(row.fact(rival, "peak_bytes"), MB) for rival in ("reference", "compiled", "fast")),
    ]


def _floor(row: Row, operations: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """Floor bytes and operations; of a whole step the operations that the fast path does."""
    first = row.first()
    if "floor_operations" in first:
        return first["floor_bytes"], first["floor_operations"]
    if operations is None or row.op not in COUNTED:
        return None, None
    return None, first["shape"]["B"] * _total(operations["counts"], "fast", COUNTED[row.op], "all")


def _total(counts: list[dict[str, Any]], path: str, of: tuple[str, ...], part: str) -> float:
    """Sum of the counts of a path; part "all" for all of them."""
    return sum(
        row["count"]
        for row in counts
        if row["path"] == path and row["of"] in of and part in ("all", row["part"])
    )
