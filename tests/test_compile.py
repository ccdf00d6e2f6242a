"""Every kernel variant compiled ahead of time, without a GPU: no spills at paper sizes, memory fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
MODULE = "segclip_fast.kernels.compile"


def run(*arguments, **environment):
    """The command in a process of its own: here Triton interprets, there it compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", MODULE, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_variant_compiles_and_fits(arch, tmp_path):
    report = tmp_path / "usage.json"
    done = run("--arch", arch, "--json", str(report))
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    usages = json.loads(report.read_text())
    assert {usage["arch"] for usage in usages} == {int(arch)}
    kernels = {usage["name"].split()[0] for usage in usages if usage["paper"]}
    assert kernels == {
        "group_assign.assign",
        "group_assign.pool",
        "group_assign.rows_backward",
        "group_assign.scores_backward",
        "group_assign.patches_backward",
        "group_assign.centers_backward",
        "superpixel_kl",
    }
    assert not [usage["name"] for usage in usages if usage["paper"] and usage["spilled"]]


def test_problems_are_named():
    from segclip_fast.kernels.compile import SHARED_LIMIT, Usage

    fine = Usage("a", 90, 100, 0, 1000, 4, True)
    assert fine.problem() is None
    assert "spills 8 bytes" in Usage("a", 90, 255, 8, 1000, 4, True).problem()
    assert Usage("a", 90, 255, 8, 1000, 4, False).problem() is None
    assert "shared memory" in Usage("a", 80, 100, 0, SHARED_LIMIT[80] + 1, 4, False).problem()


def test_refuses_to_run_under_the_interpreter_and_without_variants():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET: expected it unset" in done.stderr
    assert run("--only", "no such kernel").returncode == 1
