"""The benchmarks' report: what is kept of a run, the tables made of it, `make gpu` without a GPU."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
from harness import machine  # noqa: E402
from reporting import (  # noqa: E402
    performance,
    rows,
    streaming,
)


def entry(op, rival, median, direction="forward_backward", dtype="fp32", B=96, **facts):
    size = f"B {B}"
    return {
        "group": f"{op}, {size}, {dtype}",
        "name": f"test_{op}[{rival}]",
        "stats": {"median": median / 1e3, "iqr": 0.0, "rounds": 5},
        "extra_info": {
            **{
                "op": op,
                "size": size,
                "shape": {"B": B},
                "dtype": dtype,
                "direction": direction,
                "rival": rival,
            },
            **{"device": "cuda", "device_name": "NVIDIA H200", "commit": "abc", "threads": 2, "smoke": False},
            "versions": {"torch": "2.11.0", "triton": "3.6.0", "xformers": None},
            "absent": {},
            "peak_bytes": 5_000_000,
            **facts,
        },
    }


def fake_run(device="cuda"):
    floor = {"floor_bytes": 4e6, "floor_operations": 1e9}
    benchmarks = [
        entry("copy", "device", 1.0, "forward", floor_bytes=4e9, floor_operations=0),
        entry("product", "device", 1.0, "forward", floor_bytes=1, floor_operations=5e10),
        entry("group_assign", "reference", 8.0, **floor, moved_bytes=9e7, absent={"triton": "refused"}),
        entry("group_assign", "compiled", 4.0, **floor),
        entry("group_assign", "fast", 2.0, **floor, replay_ms=0.002),
        entry("superpixel_kl", "reference", 3.0, **floor, absent={"triton": "auto takes triton"}),
        entry("superpixel_kl", "compiled", 1.0, **floor),
        entry("superpixel_kl", "fast", 1.5, **floor),
        entry("superpixel_kl", "triton", 1.7, **floor),
        entry("training step", "reference", 700.0, "step"),
        entry("training step", "fast", 100.0, "step", dtype="bf16"),
        entry("attention", "reference", 5.0, "forward", **floor),
    ]
    run = {"machine_info": {"cpu": {"brand_raw": "A CPU", "count": 2}, "python_version": "3.12.3"}}
    run["benchmarks"] = benchmarks
    for item in benchmarks:
        item["extra_info"]["device"] = device
    return run


def streamed():
    """A small made-up result of benchmarks/streaming.py."""

    def row(name, superpixels, rate, bound):
        spent = {"read": 1.5, "crop": 1.0, "superpixels": superpixels, "tokens": 0.5}
        total = sum(spent.values())
        return {
            **{"superpixels": name, "pairs": 1000, "pairs_per_second": rate, "bound_by": bound},
            **{"worker_ms_per_pair": {**spent, "all": total}, "workers_busy": 0.95},
            "superpixel_share_of_worker": superpixels / total,
        }

    rows = [
        row("scikit-image", 27.0, 66.0, "superpixels"),
        row("float64", 3.0, 330.0, "superpixels"),
        row("on the device", 0.0, 600.0, "read"),
    ]
    sizes = {"name": "web", "short": 480, "long": 640, "quality": 90, "jpeg_bytes": 54e3, "rows": rows}
    shares = {"data": 0.75, "communication": 0.0, "compute": 0.25}
    trained = {"model": "2 blocks", "parameters": 1.25e6, "workers": 1, "pairs_per_second": 40.0}
    trained |= {"threads": 3, "shares": shares, "bound_by": "data", "workers_could_deliver": 42.0}
    return {
        **{"command": "python benchmarks/streaming.py", "commit": "abc", "cpu": "A CPU", "cores": 2},
        **{"workers": 2, "versions": {"torch": "2.10.0", "scikit-image": "0.26.0"}},
        **{"sets": [sizes], "training": [trained]},
    }


def loop_entry(B, accum_freq, source, **facts):
    """An entry of benchmarks/bench_training.py."""
    shares = {"data": 0.03, "communication": 0.0, "compute": 0.97}
    found = entry("training loop", "loop", 200.0, "step", "bf16", B, source=source, accum_freq=accum_freq)
    found["name"] = f"test_training[{source}-B{B}-{accum_freq}]"
    found["extra_info"] |= {
        **{"batch_size": B // accum_freq, "grad_checkpointing": False, "images_per_second": B / 0.2},
        **{"model_flops_per_pair": 126e9, "peak_flops": {"measured": 800e12, "data sheet": 989e12}},
        **{"mfu": {"measured": 0.6048, "data sheet": 0.4892}, "peak_bytes": 81e9},
        "throughput": {"bound_by": "compute", "shares": shares, "workers_could_deliver": 4000.0},
        **facts,
    }
    return found


def superpixels(implementation, median, images, device="cuda"):
    facts = {"images": images, "implementation": implementation}
    facts |= {"device": "cuda", "device_name": "NVIDIA H200"} if device == "cuda" else {}
    return {
        "group": f"felzenszwalb paper, batch of {images}",
        "name": f"test_batch[{implementation}]",
        "stats": {"median": median / 1e3, "iqr": 0.0, "rounds": 5},
        "extra_info": facts,
    }


def test_superpixels_on_a_gpu():
    run = fake_run()
    run["benchmarks"] += [superpixels("cuda float64", 4.0, 256), superpixels("cuda float32", 3.2, 256)]
    text = report.readme_tables({"nvidia-h200.json": report.condense(run)})
    assert "Superpixels: `make gpu` on NVIDIA H200" in text
    assert "| felzenszwalb paper, batch of 256 | cuda float64 | 0.0156 | 1.25 |" in text
    assert "Superpixels of a batch: 1.5% of a training step (B 96, bf16)" in text
    alone = {**run, "benchmarks": run["benchmarks"][-2:]}
    assert report.file_name(report.condense(alone)) == "nvidia-h200.json"  # not the CPU's file
    assert "training step" not in report.readme_tables({"nvidia-h200.json": report.condense(alone)})


def test_a_run_is_condensed_under_its_gpus_name(tmp_path):
    run = report.condense(fake_run())
    assert report.file_name(run) == "nvidia-h200.json"
    assert run["command"] == "make gpu"
    assert run["versions"]["torch"] == "2.11.0"
    assert run["benchmarks"][2]["median_ms"] == 8.0
    assert "versions" not in run["benchmarks"][2]
    assert report.file_name(report.condense(fake_run("cpu"))) == report.OPS
    report.store(tmp_path / "results/x.json", run)
    assert report.load(tmp_path / "results") == {"x.json": run}


def test_superpixels_are_measured_beside_the_step_of_their_batch():
    run = fake_run()
    run["benchmarks"] += [superpixels("cuda float64", ms, n) for ms, n in ((3.0, 96), (4.0, 256))]
    run["benchmarks"].append(superpixels("cuda patch_labels", 0.01, 96))
    text = report.readme_tables({"nvidia-h200.json": report.condense(run)})
    assert "Superpixels of a batch: 3.0% of a training step (B 96, bf16)" in text
    assert "| patch_labels, batch of 96 | cuda patch_labels | 0.000104 | 1.00 |" in text


def test_several_runs_are_joined():
    first, second = report.condense(fake_run()), report.condense(fake_run())
    second["commit"] = "later"
    second["benchmarks"] = [{**second["benchmarks"][3], "median_ms": 3.0}, {"group": "new", "name": "n"}]
    found = report.join([first, second])
    assert found["commit"] == first["commit"]
    assert len(found["benchmarks"]) == len(first["benchmarks"]) + 1
    by_name = {item["name"]: item for item in found["benchmarks"]}
    assert by_name["test_group_assign[compiled]"]["median_ms"] == 3.0
    assert by_name["test_group_assign[compiled]"]["commit"] == by_name["n"]["commit"] == "later"
    assert "commit" not in by_name["test_group_assign[fast]"]
    with pytest.raises(SystemExit, match="runs of one machine, got nvidia-h200.json and cpu_ops.json"):
        report.join([first, report.condense(fake_run("cpu"))])


def test_a_smoke_run_is_refused():
    run = fake_run()
    run["benchmarks"][0]["extra_info"]["smoke"] = True
    with pytest.raises(SystemExit, match="smoke run"):
        report.condense(run)


def test_readme_tables_of_a_gpu():
    text = report.readme_tables({"nvidia-h200.json": report.condense(fake_run())})
    assert "| group_assign | B 96, fp32 | 8.00 | 4.00 | 2.00 | 4.00x (2.00x) | 5.00 / 5.00 | 50% |" in text
    assert "**Loses to the compiled reference**: superpixel_kl (B 96, fp32, forward + backward)" in text
    assert (
        "Not used by `auto`: superpixel_kl (B 96, fp32, forward + backward), triton 1.70 ms against 1.50"
        in text
    )
    assert "fast in bf16 is 7.00x the eager reference in fp32" in text
    assert "triton not run, group_assign: refused" in text
    assert "auto takes" not in text
    assert "| attention" not in text  # forward only: on the page, not in the README
    assert "unproven" not in text


def test_readme_tables_without_a_gpu_say_so():
    text = report.readme_tables({report.OPS: report.condense(fake_run("cpu"))})
    assert "of copy bandwidth" not in text
    assert text.rstrip().endswith("unproven so far (`make gpu` measures it).")
    assert "unproven" in report.readme_tables({})


def test_performance_tables():
    counted = [
        {"path": path, "of": of, "part": "text tower", "kind": kind, "count": number * 1e9}
        for path, number in (("reference", 6), ("fast", 3))
        for of in ("forward", "backward", "inference")
        for kind in ("products", "attention")
    ]
    operations = {"command": "c", "model": "ViT-B/16", "pairs": 16, "parameters": 1e6, "commit": "abc"}
    operations |= {"versions": {"torch": "2.10"}, "counts": counted}
    text = performance.operations_table(operations)
    assert "| text tower | 12.0 | 6.00 | 2.00x | 12.0 | 6.00 | 2.00x |" in text
    assert "| forward + backward | 24.0 | 12.0 | 2.00x |" in text
    stored = {"nvidia-h200.json": report.condense(fake_run()), "operations.json": operations}
    text = performance.floor_tables(stored)
    assert "### NVIDIA H200" in text
    # 1e9 operations at 5e13 per second: 0.02 ms, above 4e6 bytes at 4e12 per second
    assert "| group_assign | B 96, fp32 | forward + backward | 4.00 | 1.00 | 90.0 | 0.02 |" in text
    assert "| attention | B 96, fp32 | forward |" in text
    assert performance.floor_tables({}).startswith("Not measured yet")
    assert performance.operations_table(None).startswith("Not counted yet")


def test_streaming_tables():
    text = streaming.streaming_tables(streamed())
    assert (
        "superpixels take 90% of a worker's time with scikit-image's felzenszwalb (27.0 ms per pair) and 50% "
        "with this package's (3.00 ms); the loader then delivers 330 pairs/s instead of 66.0, and 600 where"
    ) in text
    assert "on 2 cores of A CPU, 2 workers, commit abc, torch 2.10.0, scikit-image 0.26.0" in text
    assert (
        "| web | float64 | 1,000 | 330 | 1.50 | 1.00 | 3.00 | 0.5 | 6.00 | 50% | 95% | superpixels |" in text
    )
    assert "| web | on the device | 1,000 | 600 | 1.50 | 1.00 | 0 | 0.5 | 3.00 | 0% | 95% | read and" in text
    assert "| 2 blocks, 1.2M parameters | 1 | 3 | 40.0 | 75% | 0% | 25% | data | 42.0 | 1.05x |" in text
    assert streaming.streaming_tables(None).startswith("Not measured yet: `python benchmarks/streaming.py`")


def test_training_through_the_loop_is_a_table_of_its_own():
    run = fake_run()
    before = report.condense(run)
    run["benchmarks"] += [
        loop_entry(768, 1, "synthetic"),
        loop_entry(768, 8, "shards", grad_checkpointing=True, mfu={"measured": 0.3, "data sheet": None}),
    ]
    found = report.condense(run)
    assert found["benchmarks"] == before["benchmarks"]  # the tables of rivals do not see it
    assert [item["source"] for item in found["training_loop"]] == ["synthetic", "shards"]
    text = report.readme_tables({"nvidia-h200.json": found})
    assert text.startswith(report.readme_tables({"nvidia-h200.json": before}))
    assert "Training through the loop: `make gpu` on NVIDIA H200, torch 2.11.0" in text
    assert (
        "MFU = 3 x forward x pairs/s / peak, where forward is 42.0 (synthetic), 42.0 (shards) GFLOP" in text
    )
    assert "800 TFLOP/s measured here, 989 TFLOP/s by the data sheet" in text
    assert "| 768 | synthetic | 3840 | 200 | 81.0 | 60% | 49% | compute | 3% | 4000 |" in text
    assert "| 768 as 8 x 96, checkpointing | shards | 3840 | 200 | 81.0 | 30% | - | compute |" in text
    assert "training loop" not in performance.floor_tables({"nvidia-h200.json": found})
    assert "through the loop" not in report.readme_tables({"nvidia-h200.json": before})


def test_runs_with_the_loop_are_joined():
    first, second = fake_run(), fake_run()
    second["benchmarks"] = [loop_entry(96, 1, "synthetic")]
    without, alone = report.condense(first), report.condense(second)
    alone["commit"] = "later"
    found = report.join([without, alone])
    assert found["benchmarks"] == without["benchmarks"]
    assert [item["commit"] for item in found["training_loop"]] == ["later"]
    assert report.file_name(alone) == "nvidia-h200.json"
    assert "training_loop" not in report.join([without, without])
    assert "through the loop" in report.readme_tables({"nvidia-h200.json": alone})


def test_report_fills_between_the_markers(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(fake_run()))
    readme, page = tmp_path / "README.md", tmp_path / "performance.md"
    readme.write_text("before\n" + "\nold\n".join(report.MARKERS["results"]) + "\nafter\n")
    names = ("operations", "floors", "streaming")
    page.write_text("\n".join(marker for name in names for marker in report.MARKERS[name]))
    command = [sys.executable, ROOT / "benchmarks/report.py", "--benchmarks", tmp_path / "run.json"]
    superpixels = tmp_path / "superpixels.md"
    superpixels.write_text("\n".join([*report.MARKERS["agreement"], *report.MARKERS["counts"]]))
    command += ["--readme", readme, "--performance", page, "--results", tmp_path / "results"]
    command += ["--superpixels", superpixels]
    subprocess.run(command, check=True, cwd=tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "group_assign" in text
    assert "### NVIDIA H200" in page.read_text()
    assert "Not measured yet: `python benchmarks/streaming.py`" in page.read_text()
    (tmp_path / "results/streaming.json").write_text(json.dumps(streamed()))
    subprocess.run(command, check=True, cwd=tmp_path)
    assert "superpixels take 90% of a worker's time" in page.read_text()
    assert superpixels.read_text().count("Not counted yet") == 2
    assert (tmp_path / "results/nvidia-h200.json").exists()
    readme.write_text("no markers")
    assert subprocess.run(command, check=False, cwd=tmp_path, capture_output=True).returncode != 0


def test_the_pages_have_their_markers():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/performance.md").read_text()
    assert all(marker in readme for marker in report.MARKERS["results"])
    assert all(
        marker in page for name in ("operations", "floors", "streaming") for marker in report.MARKERS[name]
    )
    page = (ROOT / "docs/superpixels.md").read_text()
    assert all(marker in page for name in ("agreement", "counts") for marker in report.MARKERS[name])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (1234.5, "1234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.01234, "0.0123"),
    ],
)
def test_figures_have_three_digits(value, text):
    assert rows.figure(value) == text


def test_stored_runs_can_be_shown():
    stored = report.load(report.RESULTS)
    before = copy.deepcopy(stored)
    assert report.readme_tables(stored)
    assert performance.floor_tables(stored)
    assert stored == before


# --- machine


def test_commit_without_git(monkeypatch):
    def fails(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", fails)
    monkeypatch.setenv("COMMIT", "given")
    assert machine.commit() == "given"
    monkeypatch.delenv("COMMIT")
    assert machine.commit() == "unknown"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_stops_before_building_and_says_why(tmp_path):
    command = ["make", "-C", str(ROOT), "gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "make gpu: no CUDA device" in done.stderr
    assert "pip install" not in done.stdout
