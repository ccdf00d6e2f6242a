"""Whole runs on two processes under the real torchrun: DDP, FSDP2, accumulation, SIGTERM, SIGKILL."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import parallel_worker
import pytest
import torch.distributed as dist
import torchrun
from test_training import assert_same_weights, quick

from segclip_fast.training import checkpoint
from segclip_fast.training.distributed import process_group
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train


def totals(run: Path) -> list[float]:
    return [entry["total"] for entry in read_log(run)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of two processes, in folders of their names."""
    folder = tmp_path_factory.mktemp("runs")

    def entry(name, **changes):
        return {"output": str(folder / name), **changes}

    plan = [
        entry("ddp", save_every=6, keep=3),
        entry("stopped", save_every=100, stop=[5, 1]),
        entry("stopped", save_every=100, resume="latest"),
        entry("parts", batch_size=2, accum_freq=2),
        entry("fsdp", fsdp=True, save_every=6, keep=3),
        entry("recomputed", grad_checkpointing=True),
        entry("fsdp", overwrite=False),  # refused on both
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    done = torchrun.run(parallel_worker.__file__, folder / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM: step 6 of 12 is saved" in done.stderr
    return folder


def test_log_is_of_both_processes(runs):
    steps = read_log(runs / "ddp")
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    start = read_log(runs / "ddp", "start")[0]
    assert (start["processes"], start["notes"]) == (2, [])
    state = json.loads((runs / "ddp" / "checkpoints" / "step-000012" / "training.json").read_text())
    assert (state["position"], state["processes"], len(state["random"])) == (12 * 2 * 4, 2, 2)


def test_sigterm_of_one_process_stops_both_and_the_run_goes_on_exactly(runs):
    assert_same_weights(runs / "ddp", runs / "stopped")
    assert totals(runs / "ddp") == totals(runs / "stopped")


@pytest.mark.parametrize("other", ["parts", "fsdp", "recomputed"])
def test_accumulation_fsdp_and_checkpointing_train_the_same_model(runs, other):
    """The noise is the same too, so that only rounding differs."""
    assert totals(runs / other) == pytest.approx(totals(runs / "ddp"), rel=1e-4)
    if other == "recomputed":
        assert_same_weights(runs / other, runs / "ddp")


def test_errors_are_raised_on_every_process(runs):
    found = [(runs / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert found[0] == found[1]
    assert found[0].startswith("output: expected an empty folder")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_continues_the_run_of_two(runs, tmp_path, kind):
    """All pairs of a step in one process, in two parts: the same samples, other noise."""
    shutil.copytree(runs / kind, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    seen = []
    config = quick(tmp_path / "run", resume="latest", accum_freq=2, save_every=6, keep=3, fsdp=kind == "fsdp")
    train(dataclasses.replace(config, device="cpu"), lambda step, _: seen.append(step))
    assert seen == list(range(7, 13))
    notes = read_log(tmp_path / "run", "start")[-1]["notes"]
    assert "continues with 1 processes instead of 2, as many pairs per step" in notes[0]
    assert "not bit for bit" in notes[0]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000012" / "training.json").read_text())
    assert (state["position"], state["processes"]) == (96, 1)


def test_fewer_pairs_per_step_go_on_where_the_samples_stopped(runs, tmp_path):
    shutil.copytree(runs / "ddp", tmp_path / "run")
    train(quick(tmp_path / "run", resume="latest", steps=12, device="cpu"))  # finished already
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    train(quick(tmp_path / "run", resume="latest", device="cpu"))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000012" / "training.json").read_text())
    assert state["position"] == 6 * 8 + 6 * 4
    assert "4 pairs per step instead of 8" in read_log(tmp_path / "run", "start")[-1]["notes"][0]


def test_a_checkpoint_begins_another_run(tmp_path):
    train(quick(tmp_path / "a", steps=12))
    first = tmp_path / "a" / "checkpoints" / "step-000008"
    train(quick(tmp_path / "b", steps=12, resume=str(first)))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"resume: expected 'latest' or a checkpoint folder .*got '.*nothing'"
    ):
        train(quick(tmp_path / "c", resume=str(tmp_path / "nothing")))
    (first / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"resume: expected an intact checkpoint, got: .*is cut"):
        train(quick(tmp_path / "d", resume=str(first)))


def test_processes_that_torchrun_starts_again_continue(tmp_path, monkeypatch):
    train(quick(tmp_path / "run"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    seen = []
    train(quick(tmp_path / "run"), lambda step, _: seen.append(step))
    assert seen == []


def test_a_port_in_use_is_named(monkeypatch):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        known = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(
                OSError, match=f"MASTER_PORT: expected a free port, got {port}; another run has it"
            ),
            process_group("gloo", timeout=5),
        ):
            pass
    assert not dist.is_initialized()


def test_devices_and_backends_that_do_not_go_together(tmp_path, monkeypatch):
    with (
        pytest.raises(ValueError, match="backend: expected 'gloo' on device 'cpu', got 'nccl'"),
        process_group("nccl", device="cpu"),
    ):
        pass


# --- killed


def launch(plan: list[dict], folder: Path) -> subprocess.Popen:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    command = torchrun.command(parallel_worker.__file__, file)
    return subprocess.Popen(
        command, env=torchrun.environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )


def worker_pids(parent: int) -> list[int]:
    """Of the processes that a torchrun has started."""
    found = [file.read_text().split() for file in Path(f"/proc/{parent}/task").glob("*/children")]
    return [int(pid) for pids in found for pid in pids]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_sharded_run_trains_the_same_model(runs, tmp_path):
    run = {"output": str(tmp_path / "run"), "fsdp": True, "torchcompile": True, "grad_checkpointing": True}
    assert launch([{**run, "steps": 12}], tmp_path).wait(timeout=800) == 0
    assert totals(tmp_path / "run") == pytest.approx(totals(runs / "ddp"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_of_one_or_of_all_processes_change_nothing(runs, tmp_path):
    """SIGKILL at random moments, some of them during a checkpoint; every time the run goes on."""
    rng = random.Random(0)
    config = {"steps": 120, "save_every": 3, "output": str(tmp_path / "killed")}
    run = Path(config["output"])
    kills = 0
    while kills < 10:
        process = launch([{**config, "resume": "latest"}], tmp_path)
        before = len(read_log(run))
        target = before + rng.randint(1, 12)
        while len(read_log(run)) < target and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        time.sleep(rng.random() * 0.1)
        saved = [one.step for one in checkpoint.find(run)]
        workers = worker_pids(process.pid)
        assert len(workers) == 2
        victims = [process.pid, *workers] if kills % 2 else [rng.choice(workers)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=120)
        kills += 1
        assert [one.step for one in checkpoint.find(run)][-1:] >= saved[-1:]  # nothing good was lost
    assert kills == 10
    assert launch([{**config, "resume": "latest"}], tmp_path).wait(timeout=300) == 0
    whole = {**config, "output": str(tmp_path / "whole")}
    assert launch([whole], tmp_path).wait(timeout=300) == 0
    assert_same_weights(tmp_path / "whole", run)
    keys = ("step", "total", "gradient_norm")
    logs = [[[e[k] for k in keys] for e in read_log(path)] for path in (tmp_path / "whole", run)]
    assert logs[0] == logs[1]
