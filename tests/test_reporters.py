"""Reporters: events and pictures arrive, resumed runs show each step once, failures never end a run."""

from __future__ import annotations

import io
import logging
import sys
import types

import numpy as np
import pytest
from dataset_files import photo
from PIL import Image

from segclip_fast.training.reporters import Guarded, TensorBoard, WandB, make_reporters


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that takes notes."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**options):
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    module.Image = lambda picture: ("image", picture)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def points(run, name):
    return [(event.step, round(event.value, 5)) for event in events(run).Scalars(name)]


def test_none_is_asked_for(tmp_path):
    assert make_reporters("", tmp_path, {}, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    (reporter,) = make_reporters("tensorboard", tmp_path, {}, 0)
    for step in (1, 2):
        reporter.scalars(step, {"train/total": 0.5 * step, "skipped": step == 2, "norm": None, "at": [1, 2]})
    reporter.scalars(2, {"miou": np.float32(0.25)})
    picture = photo(0, (20, 30))
    reporter.picture(2, "samples", picture)
    reporter.close()
    assert points(tmp_path, "train/total") == [(1, 0.5), (2, 1.0)]
    assert points(tmp_path, "skipped") == [(1, 0.0), (2, 1.0)]
    assert points(tmp_path, "miou") == [(2, 0.25)]
    found = events(tmp_path)
    assert sorted(found.Tags()["scalars"]) == ["miou", "skipped", "train/total"]
    (image,) = found.Images("samples")
    assert image.step == 2
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)


def test_resumed_run_shows_every_step_once_in_tensorboard(tmp_path):
    for start, value in ((0, 1.0), (3, 2.0)):
        (reporter,) = make_reporters("tensorboard", tmp_path, {}, start)
        for step in range(start + 1, start + 6):
            reporter.scalars(step, {"total": value})
        reporter.close()
    expected = [(step, 1.0) for step in (1, 2, 3)] + [(step, 2.0) for step in (4, 5, 6, 7, 8)]
    assert points(tmp_path, "total") == expected


def test_wandb_gets_numbers_and_pictures(tmp_path, wandb):
    run = tmp_path / "mine"
    run.mkdir()
    config = {"steps": 5, "data": {"seed": 1}}
    (reporter,) = make_reporters("wandb", run, config, 0)
    picture = photo(0)
    reporter.scalars(1, {"total": 0.5, "skipped": False, "norm": None})
    reporter.picture(1, "samples", picture)
    reporter.close()
    (made,) = wandb.runs
    identifier = (run / "wandb_id.txt").read_text().strip()
    assert len(identifier) == 8
    assert made.options == {
        "project": "segclip_fast",
        "dir": str(run),
        "name": "mine",
        "config": config,
        "id": identifier,
        "resume": "allow",
    }
    assert made.logged == [(1, {"total": 0.5, "skipped": 0.0}), (1, {"samples": ("image", picture)})]
    assert made.finished


def test_wandb_run_is_continued_by_a_resumed_one_only(tmp_path, wandb):
    for start in (0, 3, 0):  # the last one begins anew
        for reporter in make_reporters("wandb", tmp_path, {}, start):
            reporter.close()
    first, second, third = (made.options["id"] for made in wandb.runs)
    assert first == second != third


def test_all_is_both(tmp_path, wandb):
    reporters = make_reporters("all", tmp_path, {}, 0)
    assert [type(reporter.reporter) for reporter in reporters] == [TensorBoard, WandB]
    for reporter in reporters:
        reporter.scalars(1, {"total": 0.5})
        reporter.close()
    assert points(tmp_path, "total") == [(1, 0.5)]
    assert wandb.runs[0].logged == [(1, {"total": 0.5})]


@pytest.mark.parametrize(
    ("report_to", "missing"),
    [
        ("tensorboard", ["tensorboard"]),
        ("wandb", ["wandb"]),
        ("all", ["wandb"]),
        ("all", ["tensorboard"]),
        ("all", ["tensorboard", "wandb"]),
    ],
)
def test_missing_packages_are_named_before_anything_starts(tmp_path, wandb, monkeypatch, report_to, missing):
    for package in missing:
        monkeypatch.setitem(
            sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None
        )
    with pytest.raises(ImportError, match=rf"report_to: .*: pip install {' '.join(missing)} \("):
        make_reporters(report_to, tmp_path, {}, 0)
    assert list(tmp_path.iterdir()) == []
    assert wandb.runs == []


def test_unknown_choice(tmp_path):
    with pytest.raises(ValueError, match="report_to: expected one of '', 'tensorboard', .*got 'mlflow'"):
        make_reporters("mlflow", tmp_path, {}, 0)


def test_service_that_does_not_start_is_an_error_before_training(tmp_path, wandb, monkeypatch):
    def init(**options):
        raise KeyError("no login")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RuntimeError, match="report_to: wandb did not start: 'no login'"):
        make_reporters("all", tmp_path, {}, 0)


@pytest.mark.parametrize("method", ["scalars", "picture", "close"])
def test_failure_is_told_once_and_ends_reporting_only(caplog, method):
    calls = []

    class Failing:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append(name)
                if name == method:
                    raise OSError("disk full")

            return call

    reporter = Guarded("tensorboard", Failing())
    with caplog.at_level(logging.WARNING, logger="segclip_fast"):
        for step in (1, 2):
            reporter.scalars(step, {"total": 1.0})
            reporter.picture(step, "samples", photo(0))
        reporter.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        "report_to: tensorboard failed, the run goes on without it (OSError: disk full)"
    )
    expected = {"scalars": 1, "picture": 2, "close": 5}[method]
    assert len(calls) == expected
    assert reporter.failed


def test_stopping_a_run_is_no_failure():
    class Interrupted:
        def scalars(self, step, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded("wandb", Interrupted()).scalars(1, {})
