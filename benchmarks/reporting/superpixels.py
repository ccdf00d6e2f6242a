"""The table of docs/superpixels.md: how far other superpixels agree with ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reporting.rows import cells, header
from reporting.tables import LINK

UNCOUNTED = "Not counted yet: `python benchmarks/superpixel_agreement.py`."
FILE = "superpixel_agreement.json"


def agreement_table(run: Mapping[str, Any] | None) -> str:
    """Labels, segments and patch labels of every other way, per setting."""
    if not run:
        return UNCOUNTED + "\n"
    side, patch, used = run["side"], run["patch"], run["versions"]
    opencv = f", OpenCV {used['opencv']}" if used.get("opencv") else ""
    return "\n".join(
        [
            f"`{run['command']}`, commit {run['commit']} ([{FILE}](../{LINK}{FILE})): {run['images']} crops "
            f"of scikit-image's photographs, {side} x {side}; scikit-image {used['scikit-image']}, "
            f"NumPy {used['numpy']}{opencv}. Ours is `felzenszwalb` in float64 on the crop. Of the patches, "
            f"{patch} x {patch} pixels, the share is given whose label changes, after the labels are renamed "
            'one to one to fit best; not so under "numbers". '
            "The release's order and JPEG were tried on random resized crops, as in training.",
            "",
            *header(
                "scale, sigma, min_size",
                "compared with ours",
                "images that differ",
                "adjusted Rand index, mean (least)",
                "segments, theirs / ours",
                "majority labels changed",
                "mean labels changed",
                "mean labels, numbers changed",
            ),
            *(cells(*_columns(row)) for row in run["rows"]),
            "",
        ]
    )


def _columns(row: Mapping[str, Any]) -> list[str]:
    return [
        ", ".join(f"{value:g}" for value in row["setting"].values()),
        row["theirs"],
        share(row["differs"]),
        f"{index(row['rand'])} ({index(row['rand_least'])})",
        f"{row['segments_theirs']:.1f} / {row['segments_ours']:.1f}",
        *(share(row[name]) for name in ("majority_changed", "mean_changed", "mean_numbers_changed")),
    ]


def share(value: float) -> str:
    """In per cent; what is not zero, or not everything, does not look like it."""
    if value in (0, 1):
        return f"{value:.0%}"
    text = f"{value:.1%}"
    return {"0.0%": "< 0.1%", "100.0%": "> 99.9%"}.get(text, text)


def index(value: float) -> str:
    """Four digits; only 1 itself looks like 1."""
    if value == 1:
        return "1"
    text = f"{value:.4f}"
    return "> 0.9999" if text == "1.0000" else text
