"""The tables of docs/performance.md on streaming: the loader's workers, and the loop that they feed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reporting.rows import cells, figure, header, ratio
from reporting.tables import LINK

UNMEASURED = "Not measured yet: `python benchmarks/streaming.py`."
FILE = "streaming.json"
STAGES = {"read": "read and decode", "crop": "crop", "superpixels": "superpixels", "tokens": "tokens"}
BEFORE, AFTER, LEFT_OUT = "scikit-image", "float64", "on the device"
Row = Mapping[str, Any]


def streaming_tables(run: Mapping[str, Any] | None) -> str:
    """What a worker's time goes to, what share the superpixels have, and what bounds the training loop."""
    if not run:
        return UNMEASURED + "\n"
    where = f"{run['cores']} cores of {run['cpu']}, {_count(run['workers'], 'worker')}"
    return "\n".join(
        [
            f"`{run['command']}` on {where}, commit {run['commit']}, torch {run['versions']['torch']}, "
            f"scikit-image {run['versions']['scikit-image']} ([{FILE}](../{LINK}{FILE})).",
            "",
            *(f"- {share_sentence(one)}" for one in run["sets"]),
            "",
            *_loader_table(run),
            "",
            *_training_table(run["training"]),
            "",
        ]
    )


def share_sentence(one: Mapping[str, Any]) -> str:
    """The superpixels' share of a worker's time before and after, for one size of pictures."""
    rows = {row["superpixels"]: row for row in one["rows"]}
    before, after, without = (rows[name] for name in (BEFORE, AFTER, LEFT_OUT))
    shares = [f"{row['superpixel_share_of_worker']:.0%}" for row in (before, after)]
    ms = [figure(row["worker_ms_per_pair"]["superpixels"]) for row in (before, after)]
    rates = [figure(row["pairs_per_second"]) for row in (before, after, without)]
    return (
        f"{_words(one)}: superpixels take {shares[0]} of a worker's time with scikit-image's felzenszwalb "
        f"({ms[0]} ms per pair) and {shares[1]} with this package's ({ms[1]} ms); the loader then delivers "
        f"{rates[1]} pairs/s instead of {rates[0]}, and {rates[2]} where the training device makes them."
    )


def _loader_table(run: Mapping[str, Any]) -> list[str]:
    columns = ("pictures", "superpixels", "pairs", "pairs/s", *(f"{words}, ms" for words in STAGES.values()))
    columns += ("together, ms", "superpixels' share", "workers busy", "bound by")
    lines = [
        "A worker's milliseconds per pair. Superpixels are those of the training crop, on one thread, unless "
        "the line says of the stored picture (`segment_first`, the release's order).",
        "",
        *header(*columns),
    ]
    for one in run["sets"]:
        lines += [cells(one["name"], *_loader_cells(row)) for row in one["rows"]]
    return lines


def _loader_cells(row: Row) -> list[str]:
    spent = row["worker_ms_per_pair"]
    return [
        row["superpixels"],
        f"{row['pairs']:,}",
        figure(row["pairs_per_second"]),
        *(figure(spent[stage]) for stage in STAGES),
        figure(spent["all"]),
        f"{row['superpixel_share_of_worker']:.0%}",
        f"{row['workers_busy']:.0%}",
        STAGES.get(row["bound_by"], row["bound_by"]),
    ]


def _training_table(runs: list[Row]) -> list[str]:
    columns = ("model", "workers", "threads", "pairs/s", "data", "communication", "compute", "bound by")
    return [
        "The training loop on the larger pictures, on the CPU, as its log attributes the time (the event "
        "`throughput`): a small model whose one worker makes the superpixels of whole stored pictures, and a "
        "larger one with those of the crops.",
        "",
        *header(*columns, "workers could deliver, pairs/s", "over what the loop took"),
        *(
            cells(
                f"{row['model']}, {row['parameters'] / 1e6:.1f}M parameters",
                row["workers"],
                row["threads"],
                figure(row["pairs_per_second"]),
                *(f"{row['shares'][name]:.0%}" for name in ("data", "communication", "compute")),
                row["bound_by"],
                figure(row["workers_could_deliver"]),
                ratio(row["workers_could_deliver"], row["pairs_per_second"]),
            )
            for row in runs
        ),
    ]


def _words(one: Mapping[str, Any]) -> str:
    return (
        f"Pictures of {one['short']} pixels on the short side and up to {one['long']} on the long one "
        f"({one['jpeg_bytes'] / 1e3:.0f} KB)"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
