"""The measurement of the refinements: its script in a smoke run, its statistics, the tables made of it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import refinements  # noqa: E402
import report  # noqa: E402
from reporting.refinements import refinement_summary, refinement_tables, verdict  # noqa: E402

from segclip_fast.data.sample import RawSample  # noqa: E402
from segclip_fast.evaluation.boundary import boundary_f_score  # noqa: E402

COLOURS = {"lime": (20, 250, 0), "plum": (120, 0, 160), "lemon": (250, 240, 0), "apple": (250, 0, 0)}
NAMES = [
    *("plain", "snapped", "PAMR", "PAMR, snapped", "short side 96", "short side 96, snapped"),
    *("short side 128", "short side 128, snapped", "prompt ensemble"),
]


# --- the script


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Arguments of a run on five discs for stamps; the run is done."""
    folder = tmp_path_factory.mktemp("refinements")
    y, x = np.mgrid[:40, :40]
    alpha = (np.hypot(y - 19.5, x - 19.5) < 18).astype(np.uint8) * 255
    stamps = folder / "stamps"
    (stamps / refinements.STAMP_FOLDER).mkdir(parents=True)
    for name, colour in COLOURS.items():
        pixels = np.concatenate((np.broadcast_to(np.uint8(colour), (40, 40, 3)), alpha[..., None]), axis=2)
        for file in (name, "lime-2") if name == "lime" else (name,):  # one of a class's two is held out
            Image.fromarray(pixels).save(stamps / refinements.STAMP_FOLDER / f"{file}.png")
            (stamps / refinements.STAMP_FOLDER / f"{file}.txt").write_text(f"A {name}.\n")
    places = {"--stamps": stamps, "--demo": folder / "demo", "--models": folder / "models"}
    places |= {"--output": folder / "refinements.json"}
    arguments = [str(part) for pair in places.items() for part in pair]
    arguments += ["--steps", "2", "--images", "3", "--timed", "2", "--threads", str(torch.get_num_threads())]
    refinements.main(arguments)
    return arguments


def stored(arguments):
    return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text())


def test_smoke_run_measures_everything(smoke):
    run = stored(smoke)
    assert [one["name"] for one in run["sets"]] == ["scenes", "stamps", "stamps, seed 43"]
    assert [one["training_seed"] for one in run["sets"]] == [42, 42, 43]
    for one, classes in zip(run["sets"], (18, 1 + len(COLOURS), 1 + len(COLOURS)), strict=True):
        assert [row["refinement"] for row in one["rows"]] == NAMES
        assert (one["classes"], one["images"], one["steps"], one["window"]) == (classes, 3, 2, 64)
        assert one["training_seconds"] > 0
        for row in one["rows"]:
            assert 0 <= row["miou"] <= 1
            assert 0 <= row["boundary_f"] <= 1
            assert row["gain_low"] <= row["gain_high"]
            assert row["ms"] > 0
    assert run["sets"][1]["side"] == refinements.STAMP_SIDE
    assert {"commit", "versions", "cpu", "cores", "threads", "command"} <= run.keys()
    assert "refinements.py --stamps" in run["command"]
    assert run["timed"]["pictures"] == 2


def test_timings_change_nothing_else(smoke):
    before = stored(smoke)
    path = Path(smoke[smoke.index("--output") + 1])
    odd = copy.deepcopy(before)
    odd["sets"][0]["rows"][0] |= {"ms": -1.0, "miou": 0.123}  # times are replaced, quality is not measured
    path.write_text(json.dumps(odd))
    try:
        refinements.main([*smoke, "--timings"])
        after = stored(smoke)
    finally:
        path.write_text(json.dumps(before))
    assert after["sets"][0]["rows"][0]["ms"] > 0
    assert after["sets"][0]["rows"][0]["miou"] == 0.123
    assert after["timed"]["command"].endswith("--timings")
    for run in (odd, after):
        del run["timed"]
        for one in run["sets"]:
            for row in one["rows"]:
                del row["ms"]
    assert after == odd


def test_finished_runs_are_not_trained_again(smoke):
    demo, models = (Path(smoke[smoke.index(name) + 1]) for name in ("--demo", "--models"))
    logs = [demo / "run/log.jsonl", models / "stamps-42/log.jsonl", models / "stamps-43/log.jsonl"]
    before = [log.read_bytes() for log in logs]
    first = stored(smoke)
    refinements.main(smoke)
    assert [log.read_bytes() for log in logs] == before
    for one, again in zip(first["sets"], stored(smoke)["sets"], strict=True):
        for row, other in zip(one["rows"], again["rows"], strict=True):
            assert row | {"ms": 0} == other | {"ms": 0}


def test_script_refuses(smoke, tmp_path, capsys):
    place = smoke.index("--output")
    without = [*smoke[:place], *smoke[place + 2 :]]
    for arguments, message in (
        ([*smoke, "--steps", "3"], "got other ['steps']"),
        (without, "expected another --output"),
        ([*without, "--output", str(tmp_path / "none.json"), "--timings"], "expected the results of a run"),
        ([*smoke, "--stamps", str(tmp_path)], "expected the stamps folder of the Debian package"),
        ([*smoke, "--models", str(tmp_path / "empty"), "--timings"], str(tmp_path / "empty")),
    ):
        with pytest.raises(SystemExit) as caught:
            refinements.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


# --- statistics


def counts(right, wrong):
    """(P, 2, 2) confusion counts of pictures of which class 0 is everything."""
    found = torch.zeros(len(right), 2, 2, dtype=torch.int64)
    found[:, 0, 0], found[:, 0, 1] = torch.from_numpy(right), torch.from_numpy(wrong)
    return found


def test_figures_of_counts():
    found = torch.tensor([[[3, 1], [0, 2]], [[4, 0], [6, 0]]])
    assert refinements.pixel_accuracy(found) == 9 / 16


def test_confusions_are_those_of_each_picture(monkeypatch):
    def found(_, images, labels, *, background, snap):
        assert (labels, background, snap) == (["x"], True, True)  # the background is no label
        return [SimpleNamespace(labels=image[..., 0].astype(np.int64)) for image in images]

    monkeypatch.setattr(refinements, "segment_batch", found)
    monkeypatch.setattr(refinements, "BATCH", 2)
    case = refinements.Case("x", None, None, SimpleNamespace(class_names=("background", "x")), ())
    predicted = np.array([[[0, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 0]]], dtype=np.uint8)
    truth = np.array([[[0, 0], [1, 1]], [[0, 1], [1, 1]], [[1, 1], [0, 0]]])
    samples = [
        RawSample(np.repeat(picture[..., None], 3, axis=2), "", mask)
        for picture, mask in zip(predicted, truth, strict=True)
    ]
    counted, boundary = refinements.confusions(case, samples, {"snap": True})
    assert counted.tolist() == [[[2, 0], [0, 2]], [[0, 1], [0, 3]], [[1, 1], [1, 1]]]
    expected = [boundary_f_score(*pair, 2) for pair in zip(predicted, truth, strict=True)]
    assert boundary == expected
    assert expected[0] == 1 > expected[1]


def test_gain_interval():
    rng = np.random.default_rng(1)
    right = rng.integers(30, 60, 50)
    plain, better = counts(right, 100 - right), counts(right + 10, 90 - right)
    assert refinements.gain_interval(plain, plain) == (0.0, 0.0)
    low, high = refinements.gain_interval(better, plain)
    assert [low, high] == pytest.approx([0.05, 0.05])  # every picture gains alike; class 1 has IoU 0 in both
    assert refinements.gain_interval(plain, better) == pytest.approx((-high, -low))
    noisy = counts(np.clip(right + rng.integers(-30, 31, 50), 0, 100), 100 - right)
    low, high = refinements.gain_interval(noisy, plain)
    assert low < 0 < high


# --- tables


def fake_run():
    def row(name, miou, low, high):
        row = {"refinement": name, "miou": miou, "boundary_f": 0.25, "pixel_accuracy": 0.5, "ms": 12.34}
        return row | {"gain_low": low, "gain_high": high}

    rows = [row("plain", 0.5, 0.0, 0.0), row("snapped", 0.61, 0.08, 0.14)]
    one = {"name": "scenes", "images": 7, "side": 64, "window": 64, "classes": 18, "background": False}
    one |= {"repeats": False, "parameters": 760_000, "steps": 10, "batch_size": 64, "training_seconds": 90.0}
    one |= {"training_seed": 42, "rows": rows}
    other = one | {"name": "stamps", "background": True, "rows": [row("plain", 0.5, 0.0, 0.0)]}
    other["rows"] = [*other["rows"], row("snapped", 0.4, -0.15, -0.05), row("extra", 0.4, 0, 0)]
    again = one | {"name": "scenes again", "repeats": True}
    run = {"command": "python x.py", "commit": "abc", "versions": {"torch": "2.10"}}
    run["sets"] = [one, other, again]
    return run | {"timed": {"pictures": 5, "threads": 1, "cpu": "A CPU"}}


def test_tables():
    text = refinement_tables(fake_run())
    assert "| snapped | 0.610 | +0.110, 95% +0.080 to +0.140 | 0.500 | 0.250 | 12.3 |" in text.splitlines()
    assert "| plain | 0.500 |  | 0.500 | 0.250 | 12.3 |" in text
    assert text.count("background by threshold") == 1
    assert "1 thread of A CPU" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {7}
    assert refinement_tables(None).startswith("Not measured yet: `python benchmarks/refinements.py")


def test_summary_has_the_rows_of_all_sets_without_repeats():
    text = refinement_summary(fake_run())
    assert "on the scenes again (+0.110" in text  # in the verdict, not in the table
    assert "| snapped | 0.610 | 0.250 | 12.3 | 0.400 | 0.250 | 12.3 |" in text.splitlines()
    assert "extra" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "|  | scenes: mIoU | boundary F | ms | stamps: mIoU | boundary F | ms |" in text
    assert refinement_summary(None) == ""
    assert text in report.readme_tables({report.REFINEMENTS: fake_run()})


@pytest.mark.parametrize(
    ("low", "high", "effect"),
    [
        (0.01, 0.02, "raises mIoU on the scenes"),
        (-0.2, -0.1, "lowers mIoU on the scenes"),
        (-0.1, 0.1, "does not change mIoU for certain on the scenes"),
    ],
)
def test_verdict_says_it_either_way(low, high, effect):
    run = fake_run()
    run["sets"][0]["rows"][1] |= {"gain_low": low, "gain_high": high}
    text = verdict(run)
    assert text.startswith(f"Snapping {effect}")
    assert "lowers mIoU on the stamps (-0.100, 95% -0.150 to -0.050)." in text


def test_the_page_has_its_markers_and_says_what_is_stored(tmp_path):
    page = (ROOT / "docs/refinement.md").read_text()
    begin, end = report.MARKERS["refinements"]
    assert begin in page
    if not refinements.RESULT.exists():
        pytest.skip("not measured yet")
    run = json.loads(refinements.RESULT.read_text())
    assert page.partition(begin)[2].partition(end)[0].strip() == refinement_tables(run).strip()
    assert [row["refinement"] for row in run["sets"][0]["rows"]] == NAMES
