"""Checkpoints: whole or not at all, verified, kept, refused when damaged; a full disk; SIGTERM."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from small import small_model
from test_training import assert_same_weights, quick

from segclip_fast import SegCLIP
from segclip_fast.config import OptimConfig
from segclip_fast.training import checkpoint, manifest
from segclip_fast.training.evaluating import Evaluating
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train
from segclip_fast.training.optim import build_optimizer
from segclip_fast.training.stopping import Stopping


class StopError(Exception):
    pass


def steps(run: Path) -> list[int]:
    return [saved.step for saved in checkpoint.find(run)]


def stop_after(step):
    def stop(current, _):
        if current == step:
            raise StopError

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps with checkpoints of 8 and 12."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(quick(run))
    return run


@pytest.fixture
def trained():
    """A model and its optimizer after one step."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig())
    sum((p * p).sum() for p in model.parameters()).backward()
    optimizer.step()
    return model, optimizer


# --- contents


def test_all_is_restored(tmp_path, trained):
    model, optimizer = trained
    config = quick(tmp_path)
    for group in optimizer.param_groups:
        group["lr"] *= 1 / 3
    random.gauss(0, 1)  # leaves a second value behind
    np.random.standard_normal()  # noqa: NPY002
    path = checkpoint.save(tmp_path, 7, model, optimizer, config)
    expected = [random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()]  # noqa: NPY002
    expected.append(torch.rand(3).tolist())

    other = small_model()
    fresh = build_optimizer(other, OptimConfig())
    assert checkpoint.resume(tmp_path, other, fresh).step == 7
    drawn = [random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()]  # noqa: NPY002
    assert [*drawn, torch.rand(3).tolist()] == expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    a, b = optimizer.state_dict(), fresh.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, values in a["state"].items():
        assert values.keys() == b["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            assert torch.equal(value, b["state"][index][name]), (index, name)
    entry = json.loads((path / manifest.STATE).read_text())
    assert entry["position"] == 7 * config.batch_size
    assert entry["config"]["optim"]["lr"] == config.optim.lr
    assert entry["library"]
    assert SegCLIP.from_pretrained(path).config == model.config


def test_the_manifest_covers_every_file_and_none_is_a_pickle(whole):
    for saved in checkpoint.find(whole):
        names = {path.name for path in saved.path.iterdir()}
        assert names == {*manifest.FILES, manifest.MANIFEST}
        assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
        checkpoint.verify(saved.path)


def test_other_parameters_are_refused(tmp_path, trained):
    checkpoint.save(tmp_path, 7, *trained, quick(tmp_path))
    other = small_model(reconstruction__decoder_layers=2)
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint of this run in .*step-000007"):
        checkpoint.resume(tmp_path, other, build_optimizer(other, OptimConfig()))
    assert steps(tmp_path) == [7]


# --- damage


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def alter(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


DAMAGE = [(cut, "is cut"), (alter, "is altered"), (remove, "is missing")]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
@pytest.mark.parametrize("name", manifest.FILES)
def test_damage_is_found_and_the_file_named(tmp_path, trained, name, damage, message):
    path = checkpoint.save(tmp_path, 1, *trained, quick(tmp_path))
    damage(path / name)
    with pytest.raises(ValueError, match=f"{path / name} {message}"):
        checkpoint.verify(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"../../x": {}}}', '{"files": null}'])
def test_a_damaged_manifest_is_refused(tmp_path, trained, text):
    path = checkpoint.save(tmp_path, 1, *trained, quick(tmp_path))
    (path / manifest.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        checkpoint.verify(path)


def test_a_run_continues_from_the_newest_intact_checkpoint(tmp_path, whole, caplog):
    run = tmp_path / "run"
    train(quick(run, keep=3))
    cut(run / "checkpoints" / "step-000012" / "model.safetensors")
    (run / "checkpoints" / "step-000008" / manifest.MANIFEST).unlink()
    seen = []
    with caplog.at_level(logging.WARNING):
        train(quick(run, keep=3, resume="latest"), on_step=lambda step, _: seen.append(step))
    assert seen == list(range(5, 13))
    assert_same_weights(whole, run)
    lines = [record.getMessage() for record in caplog.records if "checkpoint" in record.name]
    assert len(lines) == 3
    assert "step-000012 is refused" in lines[0]
    assert "model.safetensors is cut" in lines[0]
    assert "step-000008 is refused" in lines[1]
    assert "manifest.json is missing" in lines[1]
    assert "continuing from step-000004" in lines[2]
    assert steps(run) == [4, 8, 12]
    assert (run / "checkpoints" / "damaged-step-000012").is_dir()


def test_nothing_intact_is_an_error_and_changes_nothing(tmp_path):
    run = tmp_path / "run"
    train(quick(run))
    for saved in checkpoint.find(run):
        alter(saved.path / "model.safetensors")
    before = sorted(run.rglob("*"))
    message = r"resume: expected an intact checkpoint .* 2 refused.*step-000012/model\.safetensors is altered"
    with pytest.raises(ValueError, match=message):
        train(quick(run, resume="latest"))
    assert sorted(run.rglob("*")) == before


def test_the_earlier_format_is_refused_clearly(tmp_path, trained):
    path = checkpoint.save(tmp_path, 1, *trained, quick(tmp_path))
    for name in (manifest.MANIFEST, manifest.TENSORS, manifest.STATE):
        (path / name).unlink()
    (path / "training.pt").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"manifest\.json is missing \(it is of an earlier version; --init"):
        checkpoint.resume(tmp_path, *trained)


# --- writing


def test_killed_while_writing(tmp_path, monkeypatch, whole):
    """The previous checkpoint stays intact and is what the next start takes."""

    class KilledError(BaseException):
        pass

    real = manifest.measure

    def killed(path):
        if "step-000008" in str(path):
            path.write_bytes(b"half")
            raise KilledError
        return real(path)

    monkeypatch.setattr(manifest, "measure", killed)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
    with pytest.raises(KilledError):
        train(quick(tmp_path / "run"))
    monkeypatch.undo()
    assert steps(tmp_path / "run") == [4]
    assert list((tmp_path / "run" / "checkpoints").glob(".step-000008.tmp"))
    train(quick(tmp_path / "run", resume="latest"))
    assert_same_weights(whole, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error, whole):
    import safetensors.torch

    real = safetensors.torch.save_file

    def full(values, path):
        if "step-000008" in str(path) and "training" in Path(path).name:
            Path(path).write_bytes(b"half")
            raise error
        real(values, path)

    run = tmp_path / "run"
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="full disk; step-000004 is intact: free some space") as caught:
        train(quick(run, keep=1))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004"]
    checkpoint.verify(checkpoint.find(run)[0].path)
    monkeypatch.undo()
    train(quick(run, keep=1, resume="latest"))
    assert_same_weights(whole, run)


def test_nothing_older_goes_before_the_new_one_reads_back(tmp_path, monkeypatch, trained):
    config = quick(tmp_path, keep=1)
    checkpoint.save(tmp_path, 1, *trained, config)
    real = Path.rename

    def rename(self, target):
        alter(self / "model.safetensors")  # the disk returns other bytes than were written
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        OSError, match=r"expected to read what was written, got: .*model\.safetensors is altered"
    ):
        checkpoint.save(tmp_path, 2, *trained, config)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 2]
    assert checkpoint.resume(tmp_path, *trained).step == 1
    checkpoint.save(tmp_path, 2, *trained, config)  # and its place is free again
    assert steps(tmp_path) == [2]


# --- which ones stay


def test_the_last_and_the_best_are_kept(tmp_path, monkeypatch):
    quality = iter([0.2, 0.5, 0.3, float("nan"), 0.5, 0.4])
    entry = {"pixel_accuracy": 0.0, "images": 4}
    monkeypatch.setattr(Evaluating, "evaluate", lambda *_: {"miou": next(quality), **entry})
    run = tmp_path / "run"
    train(quick(run, eval_every=2, save_every=3, keep=2))
    assert steps(run) == [4, 9, 12]
    found = checkpoint.best(run)
    assert found is not None
    assert (found.saved.step, found.miou) == (4, 0.5)
    (run / "checkpoints" / "best.json").write_text("{")
    assert checkpoint.best(run) is None


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(tmp_path):
    train(quick(tmp_path / "whole", eval_every=4))

    def stop(step, _):
        if step == 8:
            signal.raise_signal(signal.SIGTERM)

    config = quick(tmp_path / "parts", eval_every=4)
    with pytest.raises(SystemExit):
        train(config, on_step=stop)
    assert [e["step"] for e in read_log(tmp_path / "parts", "evaluation")] == [4]
    train(dataclasses.replace(config, resume="latest"))
    logs = [read_log(tmp_path / name, "evaluation") for name in ("whole", "parts")]
    assert logs[0] == logs[1]


# --- SIGTERM


def test_sigterm_saves_the_current_step(tmp_path, whole, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def stop(step, _):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        train(quick(tmp_path / "run"), on_step=stop)
    assert caught.value.code == 0
    assert steps(tmp_path / "run") == [4, 6]
    assert "stopped by SIGTERM: step 6 of 12 is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    train(quick(tmp_path / "run", resume="latest"))
    assert_same_weights(whole, tmp_path / "run")


def test_the_handler_is_put_back_after_an_error_too(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(StopError):
            train(quick(tmp_path / "run"), on_step=stop_after(2))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_come_in_between_steps_only():
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert not stopping.requested
        assert stopping.asked()
        assert stopping.requested


def test_other_threads_install_nothing():
    found = []

    def body():
        with Stopping() as stopping:
            found.extend([signal.getsignal(signal.SIGTERM), stopping.asked()])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM), False]


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_command_line_stops_and_resumes_bit_for_bit(tmp_path, group):
    """Also when SIGTERM goes to the loader's workers too, as schedulers send it."""
    command = [sys.executable, "-m", "segclip_fast.train", "scenes", "--quiet", "--steps", "40"]
    command += ["--batch-size", "4", "--train-num-samples", "8", "--eval-images", "2", "--save-every", "100"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True)
    run = tmp_path / "parts"
    first = [*command, "--output", str(run), "--data.workers", "2" if group else "0"]
    process = subprocess.Popen(first, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(read_log(run)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    if group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    done = len(read_log(run))
    assert 3 <= done < 40
    assert f"stopped by SIGTERM: step {done} of 40 is saved" in errors
    assert steps(run) == [done]
    subprocess.run([*first, "--resume"], check=True)
    assert_same_weights(tmp_path / "whole", run)
    keys = ("step", "total", "gradient_norm")
    logs = [[[e[k] for k in keys] for e in read_log(path)] for path in (tmp_path / "whole", run)]
    assert logs[0] == logs[1]
