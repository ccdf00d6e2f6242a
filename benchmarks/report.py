"""From measurements to the README: keep what matters of each run as JSON, print the tables from those.

    pytest benchmarks/ --benchmark-only --benchmark-json=out.json
    python benchmarks/report.py --benchmarks out.json --demo demo/report.json --readme README.md

A given run replaces its file in benchmarks/results/ (cpu_ops.json, cpu_demo.json); else the stored is used.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OPS, DEMO = RESULTS / "cpu_ops.json", RESULTS / "cpu_demo.json"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benchmarks", type=Path, help="pytest-benchmark's JSON of a new run")
    parser.add_argument("--demo", type=Path, help="report.json of a new demonstration")
    parser.add_argument("--readme", type=Path, help="write the tables into this file, else print them")
    options = parser.parse_args()
    if options.benchmarks:
        store(OPS, condense(json.loads(options.benchmarks.read_text())))
    if options.demo:
        store(DEMO, json.loads(options.demo.read_text()) | {"commit": commit()})
    text = demo_table(json.loads(DEMO.read_text())) + "\n" + ops_table(json.loads(OPS.read_text()))
    if options.readme is None:
        print(text)
        return
    readme = options.readme.read_text()
    block = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not block.search(readme):
        raise SystemExit(f"{options.readme}: expected the markers {BEGIN} and {END}")
    options.readme.write_text(block.sub(lambda _: f"{BEGIN}\n{text}\n{END}", readme))


def condense(run: dict[str, Any]) -> dict[str, Any]:
    """Median, quartile range and rounds of every benchmark, with machine, versions and commit."""
    cpu = run["machine_info"]["cpu"]
    return {
        "command": "pytest benchmarks/ --benchmark-only",
        "commit": commit(),
        "cpu": cpu.get("brand_raw", "unknown"),
        "cores": cpu.get("count"),
        "python": run["machine_info"]["python_version"],
        "benchmarks": [
            {
                "group": item["group"],
                "name": item["name"],
                "median_ms": round(item["stats"]["median"] * 1e3, 3),
                "iqr_ms": round(item["stats"]["iqr"] * 1e3, 3),
                "rounds": item["stats"]["rounds"],
                **item["extra_info"],
            }
            for item in run["benchmarks"]
        ],
    }


def commit() -> str:
    """The checkout's commit, marked if the tree has changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def store(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def demo_table(report: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {result['miou']:.3f} | {result['pixel_accuracy']:.3f} |"
        for name, result in report["results"].items()
    ]
    return "\n".join(
        [
            f"`make demo`: {report['held_out_images']} held-out pictures, {report['classes']} material names "
            f"as labels, {report['parameters'] / 1e6:.2f}M parameters, {report['steps']} steps in "
            f"{report['training_seconds']:.0f} s on {report['threads']} CPU threads "
            f"([cpu_demo.json](benchmarks/results/{DEMO.name})).",
            "",
            "| model | mIoU | pixel accuracy |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def ops_table(run: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in run["benchmarks"]:
        groups.setdefault(item["group"], []).append(item)
    rows = []
    for group, items in groups.items():
        fastest = min(item["median_ms"] for item in items)
        rows += [
            f"| {group} | {item['name'].removeprefix('test_')} | {item['median_ms'] / item['images']:.2f} | "
            f"{item['median_ms'] / fastest:.2f} |"
            for item in items
        ]
    return "\n".join(
        [
            f"`{run['command']}` on {run['cores']} cores of {run['cpu']} "
            f"([cpu_ops.json](benchmarks/results/{OPS.name})); labels are compared before anything is timed.",
            "",
            "| benchmark | implementation | ms per image | over the fastest |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
