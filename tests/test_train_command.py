"""The command line of training: what it makes of a run and flags, what it says, and its exit codes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from test_runs import different

import segclip_fast.train as command
from segclip_fast.training.agreement import everywhere
from segclip_fast.training.runs import available, load_run


@pytest.fixture
def trained(monkeypatch):
    """Configs that the command line hands to a `train` which does nothing."""
    import segclip_fast.training

    module = type(sys)("segclip_fast.training.loop")
    module.seen, module.fate = [], None

    def train(config):
        module.seen.append(config)
        if module.fate is not None:
            raise module.fate

    module.train = train
    monkeypatch.setitem(sys.modules, "segclip_fast.training.loop", module)
    monkeypatch.setattr(segclip_fast.training, "loop", module, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return module


def test_flags_change_the_run(trained, capsys):
    assert (
        command.main(["scenes", "--optim.lower_lr", "1e-4", "--data.superpixels.sigma=0.3", "--quiet"]) == 0
    )
    changes = {"optim.lower_lr", "data.superpixels.sigma", "quiet"}
    assert different(load_run("scenes"), trained.seen[0]) == changes
    assert (trained.seen[0].optim.lower_lr, trained.seen[0].data.superpixels.sigma) == (1e-4, 0.3)
    assert capsys.readouterr().out == "trained model: runs/scenes/model\n"


@pytest.mark.parametrize(
    ("flags", "setting", "value"),
    [
        (["--train-data", "a.tar::b.tar"], "data.train_data", "a.tar::b.tar"),
        (["--train_data=a=b.tar"], "data.train_data", "a=b.tar"),
        (["--train-num-samples", "9"], "data.train_num_samples", 9),
        (["--dataset-type=csv"], "data.dataset_type", "csv"),
        (["--csv-img-key", "image"], "data.csv_img_key", "image"),
        (["--csv_caption_key", "text"], "data.csv_caption_key", "text"),
        (["--csv-separator", ";"], "data.csv_separator", ";"),
        (["--workers", "3"], "data.workers", 3),
        (["--lr", "1e-3"], "optim.lr", 1e-3),
        (["--wd=0.2"], "optim.weight_decay", 0.2),
        (["--eps", "1e-8"], "optim.eps", 1e-8),
        (["--grad_clip_norm", "2"], "optim.clip", 2.0),
        (["--accum-freq", "4"], "accum_freq", 4),
        (["--resume"], "resume", "latest"),
        (["--resume", "--seed", "42"], "resume", "latest"),
        (["--resume", "some/folder"], "resume", "some/folder"),
        (["--resume=some/folder"], "resume", "some/folder"),
    ],
)
def test_names_of_open_clip(trained, flags, setting, value):
    assert command.main(["paper", *flags]) == 0
    assert different(load_run("paper"), trained.seen[0]) == {setting}
    found = trained.seen[0]
    for part in setting.split("."):
        found = getattr(found, part)
    assert found == value


def test_upsampling_factors_go_with_several_sources(trained):
    flags = ["--train-data-upsampling-factors", "1::0.5", "--train-data=a.tar::b.tar"]
    assert command.main(["paper", *flags]) == 0
    assert trained.seen[0].data.factors() == (1, 0.5)


def test_steps_and_epochs_on_the_command_line(trained):
    assert command.main(["paper", "--steps", "7"]) == 0
    assert command.main(["scenes", "--epochs=1.5"]) == 0
    assert command.main(["scenes", "--steps", "0", "--epochs", "2"]) == 0
    assert [(run.steps, run.epochs) for run in trained.seen] == [(7, 0), (0, 1.5), (0, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papr"], "run: expected a YAML file (.yaml) or one of the prepared runs paper, scenes, stamps, "),
        (["none.yaml"], "run: expected an existing YAML file, got 'none.yaml'"),
        (["--lr", "1"], "RUN: expected a prepared run or a YAML file first, got '--lr'"),
        (["scenes", "--speed", "3"], "Unrecognized options: --speed, 3 (--help lists the settings)"),
        (["scenes", "stray"], "Unrecognized options: stray"),
        (["scenes", "--lr", "x"], "--optim.lr: could not convert string to float: 'x'"),
        (["scenes", "--batch-size", "0"], "batch_size: expected a positive number, got 0"),
        (["scenes", "--train-data", "a" * 200], "data.train_data: expected none with dataset_type 'scenes'"),
        (["scenes", "--precision", "fp16"], "invalid choice 'fp16' for argument '--precision'"),
        (["scenes", "--steps", "3", "--epochs", "2"], "steps: expected 0 with epochs, got 3"),
    ],
)
def test_what_cannot_be_used_is_one_line(trained, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "40")
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1
    assert arguments[-1] in said.err or len(arguments[-1]) < 200  # not folded
    assert said.out == ""
    assert not trained.seen


@pytest.mark.parametrize(
    "error", [ValueError, FileExistsError, FloatingPointError, ImportError, NotImplementedError]
)
def test_errors_of_the_run_are_said_once(trained, capsys, monkeypatch, error):
    text = "disk: expected space, got none"
    for rank in (None, "0", "1"):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        first = rank != "1"
        trained.fate = everywhere(error(text))
        assert command.main(["scenes"]) == 2
        assert capsys.readouterr().err == (f"error: {text}\n" if first else "")
        trained.fate = error(text)  # of one process alone
        assert command.main(["scenes"]) == 2
        assert capsys.readouterr().err == f"error{'' if first else ' (process 1)'}: {text}\n"
    assert command.main(["papr"]) == 2
    assert capsys.readouterr().err == ""


def test_only_the_first_process_says_that_it_is_done(trained, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert command.main(["scenes"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("left", "code"), [(0, 0), (None, 0), (3, 3), ("why", 1)])
def test_leaving_within_the_run(trained, capsys, left, code):
    trained.fate = SystemExit(left)  # code 0 after SIGTERM
    assert command.main(["scenes"]) == code
    assert capsys.readouterr().out == ""


def test_without_arguments_the_runs_are_listed(trained, capsys):
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: python -m segclip_fast.train RUN [settings]\n")
    assert all(f"  {name} " in said for name in available())


@pytest.mark.parametrize("arguments", [["--help"], ["paper", "-h"], ["scenes", "--resume", "--help"]])
def test_help_shows_runs_short_names_and_settings(trained, capsys, arguments):
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    for part in ("  ablations/no_superpixel ", "--grad-clip-norm ", "--data.superpixels.scale", "--resume"):
        assert part in said
    assert not trained.seen


def test_printed_config_is_a_run(tmp_path):
    words = [
        sys.executable,
        "-m",
        "segclip_fast.train",
        "ablations/centers_4",
        "--print-config",
        "--wd",
        "0.1",
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    expected = load_run("ablations/centers_4")
    expected = dataclasses.replace(expected, optim=dataclasses.replace(expected.optim, weight_decay=0.1))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.yaml").write_text(done.stdout)
    assert load_run(tmp_path / "run.yaml") == expected
