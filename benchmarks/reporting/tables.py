"""The README's tables, made from stored runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reporting.rows import END_TO_END, Ceilings, Row, ceilings_of, cells, figure, header, ratio, rows_of

LINK = "benchmarks/results/"
NO_GPU = "No run on a GPU is stored: speed on GPUs is unproven so far (`make gpu` measures it)."
MB = 1e6
RIVALS = {"reference": "the reference", "compiled": "the compiled reference", "fast": "the fast path"}
RATED = {  # of the evaluation; its reference is the release's pipeline
    "reference": "the release's pipeline",
    "official, fast encoder": "the same on the fast encoder",
    "fast": "the fast path",
    "fast bf16": "the fast path in bf16",
}


def demo_table(report: dict[str, Any], file: str) -> str:
    """The demonstration's figures."""
    return "\n".join(
        [
            f"`make demo`: {report['held_out_images']} held-out pictures, {report['classes']} material names "
            f"as labels, {report['parameters'] / 1e6:.2f}M parameters, {report['steps']} steps in "
            f"{report['training_seconds']:.0f} s on {report['threads']} CPU threads "
            f"([{file}]({LINK}{file})).",
            "",
            *header("model", "mIoU", "pixel accuracy"),
            *(
                cells(name, f"{result['miou']:.3f}", f"{result['pixel_accuracy']:.3f}")
                for name, result in report["results"].items()
            ),
            "",
        ]
    )


def felzenszwalb_table(run: Mapping[str, Any], file: str) -> str:
    """Superpixels: ours against other libraries."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in run["benchmarks"]:
        if "op" not in item:
            name = item["group"]
            if item.get("implementation") == "cuda patch_labels":  # another op, no rival
                name = name.replace("felzenszwalb paper", "patch_labels")
            groups.setdefault(name, []).append(item)
    if not groups:
        return ""
    gpu = run.get("device") == "cuda"
    where = run["device_name"] if gpu else f"{run['cores']} cores of {run['cpu']}"
    rows = []
    for group, items in groups.items():
        fastest = min(item["median_ms"] for item in items)
        rows += [
            cells(
                group,
                item.get("implementation") or item["name"].removeprefix("test_"),
                figure(item["median_ms"] / item["images"]),
                f"{item['median_ms'] / fastest:.2f}",
            )
            for item in items
        ]
    return "\n".join(
        [
            f"Superpixels: `{run['command']}` on {where} ([{file}]({LINK}{file})); labels are compared "
            "before anything is timed ([docs/superpixels.md](docs/superpixels.md)).",
            "",
            *header("benchmark", "implementation", "ms per image", "over the fastest"),
            *rows,
            "",
            *superpixel_shares(run),
        ]
    )


def superpixel_shares(run: Mapping[str, Any]) -> list[str]:
    """What the superpixels of a training step's batch cost beside the step, where both ran on a GPU."""
    on_gpu = [item for item in run["benchmarks"] if item.get("implementation") == "cuda float64"]
    if not on_gpu:
        return []
    largest = max(on_gpu, key=lambda item: item["images"])
    measured = {item["images"]: item["median_ms"] for item in on_gpu}
    lines = []
    for row in rows_of(run):
        step = row.ms("fast")
        if row.direction == "step" and step is not None:
            batch = row.first()["shape"]["B"]
            share = measured.get(batch, largest["median_ms"] / largest["images"] * batch) / step
            lines.append(
                f"- Superpixels of a batch: {share:.1%} of a training step ({row.size}, {row.dtype})"
            )
    return [*lines, ""]


def ops_table(run: Mapping[str, Any], file: str) -> str:
    """Ops, training step and inference of one run; on a GPU with the share of its copy bandwidth."""
    rows = [row for row in rows_of(run) if row.op in END_TO_END or row.direction == "forward_backward"]
    if not rows:
        return ""
    gpu, ceilings = run.get("device") == "cuda", ceilings_of(run)
    if gpu:
        rows = _largest(rows)
    columns = ["", "size", "reference ms", "compiled ms", "fast ms", "speed-up", "peak MB, reference / fast"]
    where = run["device_name"] if gpu else f"{run.get('threads')} threads of {run['cpu']}"
    return "\n".join(
        [
            f"`{run['command']}` on {where}, torch {_version(run, 'torch')} ([{file}]({LINK}{file})). "
            "Ops: forward + backward. Speed-up over the eager reference, in brackets over the compiled one. "
            "Outputs and gradients are compared before anything is timed; all figures, with floors, are in "
            "[docs/performance.md](docs/performance.md).",
            "",
            *header(*columns, *(["of copy bandwidth"] if gpu else [])),
            *(cells(*_columns(row), *([bandwidth(row, ceilings)] if gpu else [])) for row in rows),
            "",
            *(f"- {line}" for line in notes(rows_of(run))),
            "",
        ]
    )


def gpu_tables(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """One table per GPU, or that there is none."""
    runs = {name: run for name, run in stored.items() if run.get("device") == "cuda"}
    tables = [table(run, name) for name, run in runs.items() for table in (felzenszwalb_table, ops_table)]
    return "\n".join(tables) if runs else NO_GPU + "\n"


def bandwidth(row: Row, ceilings: Ceilings) -> str:
    """Floor bytes over the fast path's time, as a share of the copy bandwidth measured in the same run."""
    time, moved = row.device_ms("fast"), row.first().get("floor_bytes")
    if time is None or moved is None or ceilings.bytes is None:
        return "-"
    return f"{moved / (time / 1e3) / ceilings.bytes:.0%}"


def notes(rows: list[Row]) -> list[str]:
    """What a reader must know: where the fast path loses, kernels left out, rivals that did not run."""
    lines: dict[str, None] = {}
    for row in rows:
        fast = row.ms("fast")
        for name in ("compiled", "reference"):
            rival = row.ms(name)
            if fast is not None and rival is not None and fast > rival:
                times = f"{figure(fast)} ms against {figure(rival)} ms"
                lines[f"**Loses to {RIVALS[name]}**: {row.words()}, {times}"] = None
        if "fast without oneDNN" in row.rivals:
            times = f"{figure(row.ms('fast without oneDNN'))} ms"
            lines[
                f"The fast path with PyTorch's own products instead of oneDNN's: {row.words()}, {times}"
            ] = None
        for name in row.rivals.keys() - {*RIVALS, *RATED, "fast compiled", "fast without oneDNN"}:
            times = f"{name} {figure(row.ms(name))} ms against {figure(fast)} ms"
            lines[f"Not used by `auto`: {row.words()}, {times}"] = None
        if "fast compiled" in row.rivals:
            times = f"{figure(row.ms('fast compiled'))} ms"
            lines[f"The fast path under torch.compile: {row.words()}, {times}"] = None
        for name, reason in (row.first().get("absent") or {}).items():
            if name in RIVALS or not reason.startswith(("auto takes", "asked for")):
                lines[f"{name} not run, {row.op}: {reason}"] = None
    return [*lines, *_best_step(rows), *_rates(rows)]


def _rates(rows: list[Row]) -> list[str]:
    """Images per second of what is measured on whole photos."""
    lines = []
    for row in rows:
        rates = {words: row.fact(name, "images_per_second") for name, words in RATED.items()}
        found = ", ".join(f"{words} {figure(rate)}" for words, rate in rates.items() if rate is not None)
        if found:
            lines.append(f"Images per second, {row.op} of {row.size}: {found}")
    return lines


def _best_step(rows: list[Row]) -> list[str]:
    """The fast step in bf16 against the eager reference in fp32, where both were measured."""
    steps = {(row.size, row.dtype): row for row in rows if row.direction == "step"}
    lines = []
    for (size, dtype), row in steps.items():
        plain = steps.get((size, "fp32"))
        if dtype == "bf16" and plain is not None and plain.ms("reference") and row.ms("fast"):
            times = ratio(plain.ms("reference"), row.ms("fast"))
            lines.append(f"Training step, {size}: fast in bf16 is {times} the eager reference in fp32")
    return lines


def _columns(row: Row) -> list[str]:
    reference, compiled, fast = (row.ms(name) for name in ("reference", "compiled", "fast"))
    speed = ratio(reference, fast)
    if compiled is not None:
        speed += f" ({ratio(compiled, fast)})"
    peaks = [figure(row.fact(name, "peak_bytes"), MB) for name in ("reference", "fast")]
    name = row.op if row.direction in ("forward_backward", "step", "forward") else row.direction
    return [
        name,
        f"{row.size}, {row.dtype}",
        figure(reference),
        figure(compiled),
        figure(fast),
        speed,
        " / ".join(peaks),
    ]


def _largest(rows: list[Row]) -> list[Row]:
    """Of each op and precision the largest batch; everything end to end."""
    best: dict[tuple[str, ...], int] = {}
    for row in rows:
        key = _kind(row)
        best[key] = max(best.get(key, 0), row.first()["shape"]["B"])
    return [row for row in rows if row.op in END_TO_END or row.first()["shape"]["B"] == best[_kind(row)]]


def _kind(row: Row) -> tuple[str, ...]:
    return row.op, row.size.partition(",")[0] if row.op == "attention" else "", row.dtype


def _version(run: Mapping[str, Any], package: str) -> str:
    return (run.get("versions") or {}).get(package) or "unknown"
