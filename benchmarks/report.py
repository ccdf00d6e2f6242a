"""From measurements to the README: keep what matters of each run as JSON, print the tables from those.

    pytest benchmarks/ --benchmark-only --benchmark-json=out.json
    python benchmarks/report.py --benchmarks out.json --demo demo/report.json \
        --readme README.md --performance docs/performance.md --superpixels docs/superpixels.md \
        --refinement docs/refinement.md

A given run replaces its file in benchmarks/results/: cpu_ops.json, cpu_ops_avx512.json for CPUs with AVX-512,
the GPU's own, cpu_demo.json. Of several runs the later one's entries replace the earlier one's of the same
name; with --add they join those stored, each under its own commit. What is not given is taken as stored;
operations.json comes from flops.py, superpixel_*.json, refinements.json and streaming.json from the script of
that name.
Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from harness.machine import commit, slug
from reporting.performance import floor_tables, operations_table
from reporting.refinements import refinement_summary, refinement_tables
from reporting.streaming import streaming_tables
from reporting.superpixel_counts import counts_table
from reporting.superpixels import agreement_table
from reporting.tables import demo_table, felzenszwalb_table, gpu_tables, ops_table
from reporting.training import KEY as LOOP_ENTRIES
from reporting.training import LOOP, training_tables

RESULTS = Path(__file__).parent / "results"
OPS, OPS_AVX512, DEMO, OPERATIONS = (
    "cpu_ops.json",
    "cpu_ops_avx512.json",
    "cpu_demo.json",
    "operations.json",
)
AGREEMENT, COUNTS = "superpixel_agreement.json", "superpixel_counts.json"
REFINEMENTS, STREAMING = "refinements.json", "streaming.json"
MARKERS = {  # of the README, docs/performance.md, docs/superpixels.md and docs/refinement.md
    "results": ("<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"),
    "operations": ("<!-- operations: written by benchmarks/report.py -->", "<!-- end of operations -->"),
    "streaming": ("<!-- streaming: written by benchmarks/report.py -->", "<!-- end of streaming -->"),
    "floors": ("<!-- floors: written by benchmarks/report.py -->", "<!-- end of floors -->"),
    "agreement": ("<!-- agreement: written by benchmarks/report.py -->", "<!-- end of agreement -->"),
    "counts": ("<!-- counts: written by benchmarks/report.py -->", "<!-- end of counts -->"),
    "refinements": ("<!-- refinements: written by benchmarks/report.py -->", "<!-- end of refinements -->"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benchmarks", type=Path, nargs="+", help="pytest-benchmark's JSON of new runs")
    parser.add_argument("--add", action="store_true", help="keep the stored entries that are not in them")
    parser.add_argument("--demo", type=Path, help="report.json of a new demonstration")
    parser.add_argument("--readme", type=Path, help="write its tables into this file, else print them")
    parser.add_argument("--performance", type=Path, help="write its tables into this file")
    parser.add_argument("--superpixels", type=Path, help="write its tables into this file")
    parser.add_argument("--refinement", type=Path, help="write its tables into this file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the stored runs")
    options = parser.parse_args()
    if options.benchmarks:
        runs = [condense(json.loads(path.read_text())) for path in options.benchmarks]
        path = options.results / file_name(runs[0])
        if options.add and path.is_file():
            runs.insert(0, json.loads(path.read_text()))
        store(path, join(runs))
    if options.demo:
        demo = json.loads(options.demo.read_text()) | {"commit": commit()}
        store(options.results / DEMO, demo)
    stored = load(options.results)
    if options.readme is None:
        print(readme_tables(stored))
    else:
        fill(options.readme, {"results": readme_tables(stored)})
    if options.performance is not None:
        blocks = {"operations": operations_table(stored.get(OPERATIONS)), "floors": floor_tables(stored)}
        fill(options.performance, blocks | {"streaming": streaming_tables(stored.get(STREAMING))})
    if options.superpixels is not None:
        agreement, counts = agreement_table(stored.get(AGREEMENT)), counts_table(stored.get(COUNTS))
        fill(options.superpixels, {"agreement": agreement, "counts": counts})
    if options.refinement is not None:
        fill(options.refinement, {"refinements": refinement_tables(stored.get(REFINEMENTS))})


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The stored runs by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def readme_tables(stored: dict[str, dict[str, Any]]) -> str:
    """What the README says: demonstration, refinements, ops and steps on the CPU, the same on every GPU."""
    parts = []
    if DEMO in stored:
        parts.append(demo_table(stored[DEMO], DEMO))
    parts.append(refinement_summary(stored.get(REFINEMENTS)))
    parts += [
        table(stored[name], name)
        for table in (felzenszwalb_table, ops_table)
        for name in (OPS, OPS_AVX512)
        if name in stored
    ]
    parts += [gpu_tables(stored), training_tables(stored)]
    return "\n".join(part for part in parts if part)


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Replace the text between the markers of each block."""
    text = path.read_text()
    for name, content in blocks.items():
        begin, end = MARKERS[name]
        block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"{path}: expected the markers {begin} and {end}")
        replacement = f"{begin}\n{content}\n{end}"
        text = block.sub(lambda _, new=replacement: new, text)
    path.write_text(text)


def condense(run: dict[str, Any]) -> dict[str, Any]:
    """Median, quartile range and rounds of every benchmark, with machine, versions and commit."""
    cpu, entries = run["machine_info"]["cpu"], [dict(item["extra_info"]) for item in run["benchmarks"]]
    if any(entry.get("smoke") for entry in entries):
        raise SystemExit("this was a smoke run (SEGCLIP_BENCH_SMOKE=1): its times mean nothing")
    common: dict[str, Any] = {}
    for entry in entries:  # the same for all: kept once
        for name in ("commit", "versions", "device", "device_name", "threads"):
            if name in entry and ("op" in entry or name.startswith("device")):
                common.setdefault(name, entry.pop(name))
    gpu = common.get("device") == "cuda"
    wide = "avx512f" in cpu.get("flags", ())  # products in float32 depend on it
    kept = [
        {
            "group": item["group"],
            "name": item["name"],
            "median_ms": round(item["stats"]["median"] * 1e3, 5),
            "iqr_ms": round(item["stats"]["iqr"] * 1e3, 5),
            "rounds": item["stats"]["rounds"],
            **entry,
        }
        for item, entry in zip(run["benchmarks"], entries, strict=True)
    ]
    loop = [entry for entry in kept if entry.get("op") == LOOP]  # no rivals: apart from those that have
    return {
        "command": "make gpu" if gpu else "pytest benchmarks/ --benchmark-only",
        "commit": commit(),
        "cpu": cpu.get("brand_raw", "unknown") + (" with AVX-512" if wide else ""),
        "cores": cpu.get("count"),
        "python": run["machine_info"]["python_version"],
        **common,
        "benchmarks": [entry for entry in kept if entry.get("op") != LOOP],
        **({LOOP_ENTRIES: loop} if loop else {}),
    }


def join(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several condensed runs of one machine as one: the last entry of every name, its commit with it.

    Raises:
        SystemExit: they are of different machines.
    """
    first = runs[0]
    lists: dict[str, dict[tuple[str, str], dict[str, Any]]] = {"benchmarks": {}, LOOP_ENTRIES: {}}
    for run in runs:
        if file_name(run) != file_name(first):
            raise SystemExit(f"expected runs of one machine, got {file_name(first)} and {file_name(run)}")
        own = {"commit": run["commit"]} if run["commit"] != first["commit"] else {}
        for name, entries in lists.items():
            entries.update({(item["group"], item["name"]): {**own, **item} for item in run.get(name, ())})
    found = {name: list(entries.values()) for name, entries in lists.items()}
    return {**first, **{name: items for name, items in found.items() if items or name in first}}


def file_name(run: dict[str, Any]) -> str:
    """Where a condensed run is stored: the GPU's name, or cpu_ops.json, CPUs with AVX-512 apart."""
    if run.get("device") == "cuda":
        return f"{slug(run['device_name'])}.json"
    return OPS_AVX512 if run["cpu"].endswith("AVX-512") else OPS


def store(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
