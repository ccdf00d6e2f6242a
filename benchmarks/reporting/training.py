"""The README's table of training through the loop on a GPU: pairs per second, memory, use of the peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reporting.rows import cells, figure, header
from reporting.tables import LINK

LOOP = "training loop"  # the `op` of bench_training.py's entries
KEY = "training_loop"  # where a condensed run keeps them, apart from the rivals' entries
GIGA, TERA = 1e9, 1e12
PEAKS = {"measured": "measured here", "data sheet": "by the data sheet"}


def training_tables(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each run that measured the loop; nothing without one."""
    return "\n".join(_table(run, name) for name, run in stored.items() if run.get(KEY))


def _table(run: Mapping[str, Any], name: str) -> str:
    entries: Sequence[Mapping[str, Any]] = run[KEY]
    first = entries[0]
    columns = ("pairs of a step", "data", "pairs/s", "ms", "peak memory GB")
    columns += tuple(f"MFU, peak {words}" for words in PEAKS.values())
    columns += ("bound by", "waiting for data", "loader could deliver, pairs/s")
    return "\n".join(
        [
            f"Training through the loop: `{run['command']}` on {run.get('device_name') or run['cpu']}, torch "
            f"{(run.get('versions') or {}).get('torch') or 'unknown'} ([{name}]({LINK}{name})): the steps of "
            "`train()` with loader workers, superpixels, forward, backward, clipping, AdamW and the log; "
            f"ViT-B/16 from random weights, all three losses, {first['dtype']}. The first step's losses are "
            "compared with those of `model.forward` before anything is timed. MFU = 3 x forward x pairs/s / "
            f"peak, where forward is {_forward(entries)} GFLOP per pair, counted on the fast path (a "
            "multiply-add is 2 FLOPs); what is computed again adds nothing. Peak: dense "
            f"{first['dtype']}, {_peaks(first)}.",
            "",
            *header(*columns),
            *(cells(*_columns(entry)) for entry in entries),
            "",
        ]
    )


def _columns(entry: Mapping[str, Any]) -> list[str]:
    report = entry["throughput"]
    return [
        _step(entry),
        entry["source"],
        figure(entry["images_per_second"]),
        figure(entry["median_ms"]),
        figure(entry["peak_bytes"], GIGA),
        *(_share(entry["mfu"].get(peak)) for peak in PEAKS),
        report["bound_by"],
        _share(report["shares"]["data"]),
        figure(report["workers_could_deliver"]),
    ]


def _step(entry: Mapping[str, Any]) -> str:
    """Pairs of a step, and how they are passed."""
    words = str(entry["shape"]["B"])
    if entry["accum_freq"] > 1:
        words += f" as {entry['accum_freq']} x {entry['batch_size']}"
    return words + (", checkpointing" if entry["grad_checkpointing"] else "")


def _forward(entries: Sequence[Mapping[str, Any]]) -> str:
    """The forward's operations of each source's pairs, whose captions are not as long."""
    found = {entry["source"]: entry["model_flops_per_pair"] / 3 for entry in entries}
    return ", ".join(f"{figure(count, GIGA)} ({source})" for source, count in found.items())


def _peaks(entry: Mapping[str, Any]) -> str:
    found = [
        f"{figure(rate, TERA)} TFLOP/s {PEAKS[name]}"
        for name, rate in entry["peak_flops"].items()
        if rate is not None
    ]
    return ", ".join(found)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
