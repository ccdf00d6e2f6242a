"""The tables of the refinements of inference: short for the README, all figures for docs/refinement.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reporting.rows import cells, figure, header
from reporting.tables import LINK

UNMEASURED = "Not measured yet: `python benchmarks/refinements.py --stamps ROOT`."
FILE = "refinements.json"
PLAIN, SNAPPED = "plain", "snapped"
Row = Mapping[str, Any]


def refinement_summary(run: Mapping[str, Any] | None) -> str:
    """The README's table: the sets side by side, without repeats, and whether snapping raises mIoU."""
    if not run:
        return ""
    sets = [one for one in run["sets"] if not one["repeats"]]
    columns = [f"{one['name']}: mIoU" for one in sets], "boundary F", "ms"
    by_name = [{row["refinement"]: row for row in one["rows"]} for one in sets]
    lines = [
        cells(name, *(text for rows in by_name for text in _short(rows[name])))
        for name in by_name[0]
        if all(name in rows for rows in by_name)
    ]
    return "\n".join(
        [
            "Refinements of inference, all off by default ([docs/refinement.md](docs/refinement.md), "
            f"[{FILE}]({LINK}{FILE})): {_pictures(sets)}. {verdict(run)} Milliseconds per picture on "
            f"{_where(run['timed'])}.",
            "",
            *header("", *(text for first in columns[0] for text in (first, *columns[1:]))),
            *lines,
            "",
        ]
    )


def refinement_tables(run: Mapping[str, Any] | None) -> str:
    """A table for each set with everything that was measured."""
    if not run:
        return UNMEASURED + "\n"
    head = (
        f"`{run['command']}`, commit {run['commit']}, torch {run['versions']['torch']} "
        f"([{FILE}](../{LINK}{FILE})). {verdict(run)} Milliseconds: median over {run['timed']['pictures']} "
        f"pictures, one a call, the refinements in turn, prompts encoded before, on {_where(run['timed'])}."
    )
    return "\n".join([head, "", *(line for one in run["sets"] for line in _table(one))])


def verdict(run: Mapping[str, Any]) -> str:
    """Whether snapping raises mIoU, in a sentence for each set."""
    sentences = []
    for one in run["sets"]:
        rows = {row["refinement"]: row for row in one["rows"]}
        gain = _gain(rows[SNAPPED], rows[PLAIN])
        sentences.append(f"Snapping {_effect(rows[SNAPPED])} on the {one['name']} ({gain}).")
    return " ".join(sentences)


def _effect(row: Row) -> str:
    if row["gain_low"] > 0:
        return "raises mIoU"
    return "lowers mIoU" if row["gain_high"] < 0 else "does not change mIoU for certain"


def _gain(row: Row, plain: Row) -> str:
    difference = row["miou"] - plain["miou"]
    return f"{difference:+.3f}, 95% {row['gain_low']:+.3f} to {row['gain_high']:+.3f}"


def _table(one: Mapping[str, Any]) -> list[str]:
    plain = next(row for row in one["rows"] if row["refinement"] == PLAIN)
    background = ", background by threshold among them" if one["background"] else ""
    return [
        f"### {one['name'].capitalize()}",
        "",
        f"{one['images']} held-out pictures of {one['side']} x {one['side']}, {one['classes']} classes"
        f"{background}; a model with windows of {one['window']} x {one['window']} and "
        f"{one['parameters'] / 1e6:.2f}M parameters, {one['steps']} steps of {one['batch_size']} pairs in "
        f"{one['training_seconds'] / 60:.1f} minutes (seed {one['training_seed']}).",
        "",
        *header("refinement", "mIoU", "against plain", "pixel accuracy", "boundary F", "ms"),
        *(
            cells(
                row["refinement"],
                f"{row['miou']:.3f}",
                "" if row is plain else _gain(row, plain),
                f"{row['pixel_accuracy']:.3f}",
                f"{row['boundary_f']:.3f}",
                figure(row["ms"]),
            )
            for row in one["rows"]
        ),
        "",
    ]


def _short(row: Row) -> tuple[str, str, str]:
    return f"{row['miou']:.3f}", f"{row['boundary_f']:.3f}", figure(row["ms"])


def _pictures(sets: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{one['name']} ({one['images']} held-out pictures of {one['side']} x {one['side']}, "
        f"{one['classes']} classes)"
        for one in sets
    )


def _where(timed: Mapping[str, Any]) -> str:
    threads = f"{timed['threads']} thread" + ("s" if timed["threads"] > 1 else "")
    return f"{threads} of {timed['cpu']}"
