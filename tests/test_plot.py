"""Curves of runs: what is drawn, several runs, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from segclip_fast.training import plot


def write_run(run, steps=40, factor=1.0, evaluations=(20, 40)):
    run.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        values = {
            "total": factor * 3 / step,
            "contrastive": factor / step,
            "superpixel_kl": factor * 2 / step,
            "skipped": False,
            "gradient_norm": factor * (1 + step % 3),
            "lr": 1e-3 * step,
            "lower_lr": 1e-6 * step,
            "images_per_second": 100.0,
        }
        if step == 7:
            values = {"skipped": True, "gradient_norm": None, "lr": 1.0, "images_per_second": 1.0}
        lines.append({"event": "step", "step": step, **values})
        if step in evaluations:
            lines.append({"event": "evaluation", "step": step, "miou": factor * step / 100, "images": 4})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    return run


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn while the test runs."""
    from matplotlib import figure

    made = []
    real = figure.Figure.__init__

    def init(self, *arguments, **options):
        made.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "__init__", init)
    return made


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def test_every_value_has_its_panel(tmp_path, figures):
    run, output = write_run(tmp_path / "a"), tmp_path / "curves.png"
    assert plot.main([str(run), "--output", str(output)]) == 0
    assert np.asarray(Image.open(output).convert("RGB")).std() > 5
    found = panels(figures[0])
    assert list(found) == [
        "total loss",
        "contrastive",
        "superpixel kl",
        "gradient norm before clipping",
        "learning rates",
        "images per second",
        "zero-shot mIoU",
    ]  # reconstruction was off in this run
    raw, smooth = found["total loss"].get_lines()
    steps = [step for step in range(1, 41) if step != 7]  # the skipped one
    assert raw.get_xdata().tolist() == steps
    np.testing.assert_allclose(raw.get_ydata(), [3 / step for step in steps])
    assert smooth.get_xdata().tolist() == steps[8:]  # running mean of 39 // 4 = 9 values, at its end
    assert smooth.get_ydata()[0] == pytest.approx(sum(3 / step for step in steps[:9]) / 9)
    assert found["gradient norm before clipping"].get_yscale() == "log"
    assert len(found["learning rates"].get_lines()) == 2
    (quality,) = found["zero-shot mIoU"].get_lines()
    assert quality.get_xdata().tolist() == [20, 40]
    np.testing.assert_allclose(quality.get_ydata(), [0.2, 0.4])


def test_runs_are_overlaid(tmp_path, figures):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", factor=2.0, evaluations=())]
    assert plot.main([*map(str, runs), "--output", str(tmp_path / "curves.png")]) == 0
    axis = panels(figures[0])["total loss"]
    assert len(axis.get_lines()) == 4
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    colours = {line.get_color() for line in axis.get_lines()}
    assert len(colours) == 2


def test_equal_names_are_told_apart(tmp_path, figures):
    runs = [write_run(tmp_path / side / "run", steps=3) for side in "ab"]
    plot.draw(runs, tmp_path / "curves.png")
    legend = panels(figures[0])["total loss"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [str(run) for run in runs]


def test_chosen_panels_and_short_runs(tmp_path, figures):
    run = write_run(tmp_path / "a", steps=1)
    plot.draw([run], tmp_path / "curves.png", plot.loss_panels())
    assert list(panels(figures[0])) == ["contrastive", "superpixel kl"]


def test_values_that_are_not_finite_are_left_out(tmp_path, figures):
    run = write_run(tmp_path / "a", steps=3)
    with (run / "log.jsonl").open("w") as file:
        for step, value in enumerate((1.0, math.nan, 2.0, math.inf), 1):
            file.write(json.dumps({"event": "step", "step": step, "total": value}) + "\n")
    plot.draw([run], tmp_path / "curves.png")
    assert panels(figures[0])["total loss"].get_lines()[0].get_xdata().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "run: expected a run folder, found none at"),
        ("folder", "run: expected a run folder with log.jsonl, found none in"),
        ("empty", "run: expected at least one finished step in"),
        ("skipped", "panels: expected values that the log has"),
        ("output", "output: expected a .png file, got log.jsonl"),
        ("place", "output: expected a file in an existing folder"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, kind, message):
    run, output = tmp_path / "run", str(tmp_path / "curves.png")
    if kind != "nothing":
        run.mkdir()
    if kind in ("empty", "skipped"):
        line = {"event": "step", "step": 1, "skipped": True}
        (run / "log.jsonl").write_text("" if kind == "empty" else json.dumps(line) + "\n")
    if kind == "output":
        output = "log.jsonl"
    if kind == "place":
        output = str(tmp_path / "missing" / "curves.png")
    assert plot.main([str(run), "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"plot: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_no_run_is_a_usage_error(capsys):
    assert plot.main([]) == 2
    assert "the following arguments are required: RUN" in capsys.readouterr().err
