"""Trainer: batches, schedule, log, checkpoints, exact resume after SIGKILL, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import small_config

from segclip_fast import SegCLIP
from segclip_fast.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    SuperpixelConfig,
    TrainConfig,
    scenes_tiny,
)
from segclip_fast.training import checkpoint
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train
from segclip_fast.training.optim import build_optimizer, schedule


def quick(output, **changes) -> TrainConfig:
    """A run of 12 steps on scenes of 32 x 32 pixels."""
    model = scenes_tiny()
    model = dataclasses.replace(
        small_config(), text=dataclasses.replace(model.text, width=16, heads=2, layers=1)
    )
    config = TrainConfig(
        output=str(output),
        model=model,
        loss=LossConfig(mask_false_negatives=True),
        data=DataConfig(
            dataset_type="scenes", train_num_samples=20, superpixels=SuperpixelConfig(scale=20, min_size=8)
        ),
        optim=OptimConfig(lr=1e-3, lower_lr=1e-3),
        steps=12,
        batch_size=4,
        save_every=4,
        eval_images=4,
        quiet=True,
    )
    return dataclasses.replace(config, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_run_writes_what_it_promises(tmp_path):
    model = train(quick(tmp_path / "run", eval_every=6))  # mIoU is 0 both times: the first is the best
    run = tmp_path / "run"
    steps = read_log(run)
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    for entry in steps:
        parts = sum(entry[name] for name in ("contrastive", "reconstruction", "superpixel_kl"))
        assert entry["total"] == pytest.approx(parts, rel=1e-5)
        assert not entry["skipped"]
    assert [entry["step"] for entry in read_log(run, "evaluation")] == [6, 12]
    assert [saved.step for saved in checkpoint.find(run)] == [6, 8, 12]  # the best and the last two
    loaded = SegCLIP.from_pretrained(run / "model")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_resume_is_exact(tmp_path):
    train(quick(tmp_path / "whole"))
    seen = []

    class StopError(Exception):
        pass

    def stop(step, _):
        seen.append(step)
        if step == 7:
            raise StopError

    with pytest.raises(StopError):
        train(quick(tmp_path / "parts"), on_step=stop)
    train(quick(tmp_path / "parts", resume="latest"), on_step=lambda step, _: seen.append(step))
    assert seen == [*range(1, 8), *range(5, 13)]  # continued after the checkpoint of step 4
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    keys = ("step", "total", "gradient_norm")
    logs = [[[e[k] for k in keys] for e in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_workers_do_not_change_the_run(tmp_path):
    config = quick(tmp_path / "a", steps=4)
    train(config)
    train(
        dataclasses.replace(
            config, output=str(tmp_path / "b"), data=dataclasses.replace(config.data, workers=2)
        )
    )
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_killed_run_on_composed_stamps_resumes_bit_for_bit(tmp_path, stamp_root):
    """300 steps on real cut-outs, killed with SIGKILL in the middle, equal the uninterrupted run."""
    command = [
        sys.executable,
        "-m",
        "segclip_fast.train",
        "stamps",
        "--train-data",
        str(stamp_root),
        "--quiet",
    ]
    command += ["--steps", "300", "--save-every", "40", "--eval-images", "8"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, "--output", str(tmp_path / "parts")])
    while len(read_log(tmp_path / "parts")) < 150:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--output", str(tmp_path / "parts"), "--resume"], check=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    losses = np.array([entry["total"] for entry in read_log(tmp_path / "whole")])
    windows = losses.reshape(3, 100).mean(axis=1)  # the loss falls, from each 100 steps to the next
    assert (np.diff(windows) < -0.02).all(), windows


@pytest.mark.slow
def test_compiled_run_trains_the_same_model(tmp_path):
    train(quick(tmp_path / "plain"))
    train(quick(tmp_path / "compiled", torchcompile=True))
    left, right = ([entry["total"] for entry in read_log(tmp_path / name)] for name in ("plain", "compiled"))
    assert left == pytest.approx(right, rel=1e-4)


def test_output_folder_is_never_overwritten_silently(tmp_path):
    run = tmp_path / "run"
    config = quick(run, steps=2)
    train(config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="output: expected an empty folder.*--resume.*--overwrite"):
        train(config)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"resume: expected the settings.*other \['batch_size'\]"):
        train(dataclasses.replace(config, resume="latest", batch_size=5))
    train(dataclasses.replace(config, resume="latest", epochs=0))  # 0 and 0.0 are the same setting
    train(dataclasses.replace(config, overwrite=True))
    assert len(read_log(run)) == 2
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="output: expected a run folder"):
        train(dataclasses.replace(config, output=str(other), overwrite=True))
    assert (other / "thesis.txt").read_text() == "precious"


def test_steps_without_a_finite_loss_are_skipped_then_stop(tmp_path, monkeypatch):
    from segclip_fast.training import loop

    real, bad = loop.losses_and_gradients, set()

    def poisoned(run, batch, step):
        losses = real(run, batch, step)
        return dataclasses.replace(losses, total=losses.total * float("nan")) if step in bad else losses

    monkeypatch.setattr(loop, "losses_and_gradients", poisoned)
    bad.update({3, 4})
    model = train(quick(tmp_path / "a"))
    assert [e["step"] for e in read_log(tmp_path / "a") if e["skipped"]] == [3, 4]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert [e["positions"] for e in read_log(tmp_path / "a") if e["skipped"]] == [[8, 11], [12, 15]]
    bad.update(range(6, 13))
    with pytest.raises(FloatingPointError, match=r"steps 6 to 10, 5 in a row, .*step-000008\. Try a lower"):
        train(quick(tmp_path / "b", max_skipped=5))
    bad.remove(8)  # 6, 7 and then 9, 10, ...: no 5 in a row before step 13
    train(quick(tmp_path / "c", max_skipped=5))


def test_steps_without_a_finite_gradient_are_skipped(tmp_path):
    def poison(step, _):
        for handle in handles:
            handle.remove()
        handles.clear()
        if step == 3:
            handles.append(parameter.register_hook(lambda gradient: gradient * float("inf")))

    handles: list = []
    parameter = None
    from segclip_fast.training import preparing

    real = preparing.build_optimizer

    def build(model, config):
        nonlocal parameter
        parameter = model.vision.grouping.centers
        return real(model, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "build_optimizer", build)
        model = train(quick(tmp_path / "run"), on_step=poison)
    log = read_log(tmp_path / "run")
    assert [e["step"] for e in log if e["skipped"]] == [4]
    assert log[3]["gradient_norm"] is None
    assert np.isfinite(log[3]["total"])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "1"]], ids=("python", "torchrun")
)
def test_command_line(tmp_path, launcher):
    command = [
        sys.executable,
        *launcher,
        "-m",
        "segclip_fast.train",
        "scenes",
        "--output",
        str(tmp_path / "run"),
    ]
    command += ["--steps", "2", "--batch-size", "4", "--train-num-samples", "8", "--eval-images", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"trained model: {tmp_path / 'run'}/model" in done.stdout
    if not launcher:
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert again.returncode == 2
        assert again.stderr.strip().startswith("error: output: expected an empty folder")


def test_unusable_settings(tmp_path):
    with pytest.raises(ValueError, match="data.train_data: expected the folder of the stamps"):
        train(quick(tmp_path / "a", data=DataConfig(dataset_type="stamps")))
    with pytest.raises(ValueError, match="steps: expected a positive number, got 0"):
        quick(tmp_path / "a", steps=0)
    with pytest.raises(ValueError, match="data.crop_area: expected"):
        DataConfig(crop_area=(0.9, 0.5))
    with pytest.raises(ValueError, match="resume: expected not together with overwrite"):
        quick(tmp_path / "a", resume="latest", overwrite=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that is available"):
            train(quick(tmp_path / "a", device="cuda"))


def test_a_missing_package_is_said_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="report_to: expected the packages of 'wandb'"):
        train(quick(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_start_from_a_checkpoint(tmp_path):
    first = quick(tmp_path / "a", steps=2)
    train(first)
    start = str(tmp_path / "a" / "model")
    model = train(dataclasses.replace(first, output=str(tmp_path / "b"), init=start))
    assert not all(torch.equal(v, model.state_dict()[k]) for k, v in weights(tmp_path / "a").items())
    other = dataclasses.replace(first.model, grouping=dataclasses.replace(first.model.grouping, tau=0.5))
    with pytest.raises(ValueError, match=r"init: expected the architecture .*'grouping.tau'"):
        train(dataclasses.replace(first, output=str(tmp_path / "c"), init=start, model=other))


# --- parts


def test_schedule():
    steps, warmup = 100, 0.2
    assert schedule(10, steps, warmup) == pytest.approx(0.5)
    assert schedule(20, steps, warmup) == pytest.approx(1.0)
    assert schedule(60, steps, warmup) == pytest.approx(0.5)
    assert schedule(100, steps, warmup) == pytest.approx(0.0, abs=1e-12)


def test_default_decay_leaves_gains_biases_scale_and_centers_alone():
    model = SegCLIP(small_config())
    groups = build_optimizer(model, OptimConfig()).param_groups
    free = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert {"logit_scale", "vision.grouping.centers", "vision.norm_out.weight", "text.norm.bias"} <= free
    assert {"vision.grouping.key_weight", "vision.third_stage.0.mlp.fc1.weight"} <= decayed
    assert len(free | decayed) == len(list(model.parameters()))


def test_settings_are_written(tmp_path):
    config = quick(tmp_path / "run", steps=1)
    train(config)
    written = json.loads((tmp_path / "run" / "train.json").read_text())
    assert written["model"]["vision"]["patch_size"] == 8
    assert written["optim"]["lr"] == 1e-3
    shutil.rmtree(tmp_path / "run")
