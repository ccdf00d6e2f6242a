"""The table of docs/superpixels.md: what the CUDA superpixels do, and the time predicted from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reporting.rows import cells, header
from reporting.tables import LINK

UNCOUNTED = "Not counted yet: `python benchmarks/superpixel_counts.py`."
FILE = "superpixel_counts.json"
COLUMNS = {  # of an image
    "edges": "edges in bins",
    "survivors": "ordered",
    "batches": "batches",
    "rounds": "rounds",
    "round_steps": "steps to roots",
    "small_rounds": "rounds of pass 2",
    "small_visits": "edges visited by pass 2",
}


def counts_table(run: Mapping[str, Any] | None) -> str:
    """Counts per image (mean, largest), bytes and predicted time of each batch."""
    if not run:
        return UNCOUNTED + "\n"
    lines = [
        f"`{run['command']}`, commit {run['commit']} ([{FILE}](../{LINK}{FILE})): crops of "
        f"{run['side']} x {run['side']} at the paper's setting; mean per image, in brackets the largest. "
        "The time on an H200 is **predicted** from these counts, not measured.",
        "",
        *header(
            "precision",
            "batch",
            *COLUMNS.values(),
            "GB moved by the batch",
            "ms per image",
            "ms per batch",
            "images / s",
        ),
    ]
    for row in run["rows"]:
        counts = [f"{row['mean'][name]:,.0f} ({row['largest'][name]:,.0f})" for name in COLUMNS]
        lines.append(
            cells(
                row["precision"],
                str(row["batch"]),
                *counts,
                f"{row['bytes'] / 1e9:.2f}",
                f"{row['image_ms']['mean']:.2f} ({row['image_ms']['largest']:.2f})",
                f"{row['predicted_ms']:.1f}",
                f"{row['predicted_images_per_second']:,.0f}",
            )
        )
    return "\n".join([*lines, ""])
