"""Runs over folders of photos that end early: killed anywhere they resume, and only with equal settings."""

from __future__ import annotations

import json
import shutil

import pytest
from photo_folders import NAMES, call, files, give_colour_models, write
from test_windows import ColourModel

from segclip_fast import __version__
from segclip_fast import segment as cli
from segclip_fast.evaluation import mask_folder


class Killed(BaseException):
    """The end of a process, as far as a test can have it: nothing handles it."""


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The models given out."""
    return give_colour_models(monkeypatch)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The photos' folder; the outputs lie beside it."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "photos", *NAMES)


def kill(monkeypatch, name: str, after: int, before: bool) -> None:
    """Let a function of mask_folder work `after` times, then end the run before or after the next."""
    real, calls = getattr(mask_folder, name), []

    def dying(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after and before:
            raise Killed
        real(*arguments, **options)
        if len(calls) > after:
            raise Killed

    monkeypatch.setattr(mask_folder, name, dying)


# What ends the run, and how many photos are done by then: pictures go mask, overlay; texts go labels.json
# (the start), coco.json, labels.json.
KILLS = {
    "before the first mask": ("save_png", 0, True, 0),
    "within the first photo": ("save_png", 0, False, 0),
    "before a photo": ("save_png", 4, True, 2),
    "between mask and overlay": ("save_png", 4, False, 2),
    "before a line": ("save_png", 5, False, 2),
    "before labels.json": ("_write_text", 0, True, 0),
    "after labels.json": ("_write_text", 0, False, 0),
    "before the COCO file": ("_write_text", 1, True, 6),
    "after the COCO file": ("_write_text", 1, False, 6),
    "before the lines are removed": ("_write_text", 2, False, 6),
}


@pytest.mark.parametrize("torn", [False, True], ids=["", "torn"])
@pytest.mark.parametrize("case", KILLS, ids=str)
def test_a_killed_run_resumes(tmp_path, monkeypatch, capsys, case, torn):
    options = ["--overlay", "--rle", "masks/coco.json", "--batch-size", "2", "--background"]
    assert call(*options) == 0
    expected = files(tmp_path / "masks")
    shutil.rmtree(tmp_path / "masks")
    name, after, before, done = KILLS[case]
    with monkeypatch.context() as patch:
        kill(patch, name, after, before)
        with pytest.raises(Killed):
            call(*options)
    started = (tmp_path / "masks/labels.json").exists()
    assert started == (case != "before labels.json")
    progress = tmp_path / "masks/.progress.jsonl"
    if torn and progress.exists():
        with progress.open("a") as lines:
            lines.write('{"path": "sub/2.P')
        (tmp_path / "masks/sub").mkdir(exist_ok=True)
        (tmp_path / "masks/sub/.2.png.123.tmp").write_text("half")
    capsys.readouterr()
    if started:
        assert call(*options) == 2  # not without saying so
        assert "--resume continues that run" in capsys.readouterr().err
    assert call(*options, "--resume") == 0
    assert f"({6 - done} photos, {done} kept, 0 skipped)" in capsys.readouterr().out
    assert files(tmp_path / "masks") == expected


def test_killed_twice(tmp_path, monkeypatch, capsys):
    assert call("--rle", "coco.json") == 0
    expected = files(tmp_path / "masks") | {"coco.json": (tmp_path / "coco.json").read_bytes()}
    assert call("--overwrite", "--rle", "coco.json", labels="blue, red") == 0  # something else to replace
    for option in ("--overwrite", "--resume"):
        with monkeypatch.context() as patch:
            kill(patch, "save_png", 2, False)
            with pytest.raises(Killed):
                call("--rle", "coco.json", option)
    capsys.readouterr()
    assert call("--rle", "coco.json", "--resume") == 0
    assert "(2 photos, 4 kept, 0 skipped)" in capsys.readouterr().out
    assert files(tmp_path / "masks") | {"coco.json": (tmp_path / "coco.json").read_bytes()} == expected


def test_lines_of_a_run_that_was_replaced_do_not_count(tmp_path, monkeypatch, capsys):
    for labels, after in (("blue, red", 3), ("red, blue, green", 0)):
        with monkeypatch.context() as patch:
            kill(patch, "save_png", after, True)
            with pytest.raises(Killed):
                call("--overwrite", labels=labels)
    capsys.readouterr()
    assert call("--resume") == 0
    assert "(6 photos, 0 kept, 0 skipped)" in capsys.readouterr().out


def test_resuming_takes_new_photos_and_those_whose_files_have_gone(tmp_path, root, loaded, capsys):
    options = ["--overlay", "--rle", "coco.json"]
    assert call(*options) == 0
    kept = (tmp_path / "masks/1.png").stat().st_mtime_ns
    write(root, "sub/new.png")
    (tmp_path / "masks/0.png").unlink()
    (tmp_path / "masks/z.overlay.png").unlink()
    (root / "sub/2.PNG").unlink()
    capsys.readouterr()
    assert call(*options, "--resume") == 0
    assert "(3 photos, 3 kept, 0 skipped)" in capsys.readouterr().out
    assert (tmp_path / "masks/1.png").stat().st_mtime_ns == kept
    now = ["0.png", "1.jpg", "sub/deep/3.webp", "sub/deep/4.png", "sub/new.png", "z.tif"]
    found = json.loads((tmp_path / "masks/labels.json").read_text())
    assert [entry["path"] for entry in found["files"]] == now
    entries = json.loads((tmp_path / "coco.json").read_text())
    assert list(dict.fromkeys(entry["image"] for entry in entries)) == now
    resumed = files(tmp_path / "masks")
    shutil.rmtree(tmp_path / "masks")
    assert call(*options, "--overwrite") == 0
    resumed.pop("sub/2.png"), resumed.pop("sub/2.overlay.png")  # made of a photo that has gone
    assert files(tmp_path / "masks") == resumed
    assert json.loads((tmp_path / "coco.json").read_text()) == entries


def test_resuming_a_finished_run_changes_nothing(tmp_path, loaded, capsys):
    assert call("--rle", "coco.json") == 0
    before = files(tmp_path)
    assert call("--rle", "coco.json", "--resume") == 0
    assert "(0 photos, 6 kept, 0 skipped)" in capsys.readouterr().out
    assert files(tmp_path) == before
    assert len(loaded) == 1


def test_resuming_without_the_coco_file_makes_it_again(tmp_path, capsys):
    assert call("--rle", "coco.json") == 0
    before = files(tmp_path)
    (tmp_path / "coco.json").unlink()
    assert call("--rle", "coco.json", "--resume") == 0
    assert "(6 photos, 0 kept, 0 skipped)" in capsys.readouterr().out
    assert files(tmp_path) == before


def test_a_photo_that_broke_since_is_no_result(tmp_path, root):
    assert call() == 0
    (tmp_path / "masks/0.png").unlink()
    (root / "0.png").write_text("no picture")
    assert call("--resume") == 1
    found = json.loads((tmp_path / "masks/labels.json").read_text())
    assert [entry["path"] for entry in found["files"]] == NAMES[1:]
    assert [entry["path"] for entry in found["skipped"]] == ["0.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "blue, red, green"], 'labels = ["red", "blue", "green"], got ["blue", "red", "green"]'),
        (["--threshold", "0.5"], "threshold = 0.8, got 0.5"),
        (["--snap"], "snap = false, got true"),
        (["--pamr"], "pamr = false, got true"),
        (["--template", "a {}"], 'templates = ["a photo of a {}."], got ["a {}"]'),
        (["--short-side", "48"], "short_side = null, got 48"),
        (["--stride", "16"], "stride = null, got 16"),
        (["--protocol", "paper"], 'protocol = "official", got "paper"'),
        (["--precision", "bf16"], 'precision = "fp32", got "bf16"'),
        (["--model", "others"], 'model = "weights", got "others"'),
        (["--overlay"], "overlay = false, got true"),
        (["--rle", "coco.json"], 'rle = null, got "coco.json"'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_settings_are_not_resumed(tmp_path, loaded, capsys, options, message):
    assert call("--background") == 0
    before = files(tmp_path)
    assert call("--background", *options, "--resume") == 2
    error = capsys.readouterr().err
    assert f"--resume: expected the settings of the earlier run, {message} (--overwrite" in error
    assert files(tmp_path) == before
    assert len(loaded) == 1


def test_other_weights_of_the_same_name_are_not_resumed(tmp_path, root, monkeypatch, capsys):
    assert call() == 0
    write(root, "new.png")
    before = files(tmp_path)
    other = ColourModel().eval()
    other.logit_scale.data -= 1
    monkeypatch.setattr(cli, "load_model", lambda spec, device: other)
    assert call("--resume") == 2
    assert "--resume: expected the settings of the earlier run, weights = " in capsys.readouterr().err
    assert files(tmp_path) == before


def test_settings_that_shape_nothing_may_differ(tmp_path, capsys):
    assert call() == 0
    assert call("--resume", "--batch-size", "3", "--device", "cpu") == 0
    assert "6 kept" in capsys.readouterr().out


def test_another_version_is_not_resumed(tmp_path, capsys):
    assert call() == 0
    path = tmp_path / "masks/labels.json"
    path.write_text(path.read_text().replace(f'"version": "{__version__}"', '"version": "0.0.1"'))
    assert call("--resume") == 2
    assert f'version = "0.0.1", got "{__version__}"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"settings": 1, "files": []}', '{"settings": {}, "files": [1]}'], ids=str
)
def test_a_broken_labels_json(tmp_path, capsys, text):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/labels.json").write_text(text)
    assert call("--resume") == 2
    error = capsys.readouterr().err
    assert "--resume: expected the labels.json of an earlier run, got a broken 'masks/labels.json'" in error
    assert error.count("\n") == 1


def test_a_broken_coco_file(tmp_path, capsys):
    assert call("--rle", "coco.json") == 0
    (tmp_path / "coco.json").write_text("[{}]")
    assert call("--rle", "coco.json", "--resume") == 2
    assert (
        "--rle: expected the COCO file of the run to resume, got a broken 'coco.json'"
        in capsys.readouterr().err
    )
