"""The command line `python -m segclip_fast.segment` for one photo: files, table, one line for every mistake.

Folders of photos are in test_mask_folder.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_windows import COLOURS, GREY, ColourModel, painted

from segclip_fast import segment as cli


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(painted(COLOURS["red"], GREY, COLOURS["blue"])).save(path)
    return path


@pytest.fixture
def loaded(monkeypatch):
    """The (checkpoint, device) pairs asked for; the model is one that sees colours."""
    calls = []

    def load(checkpoint, device):
        calls.append((checkpoint, device))
        return ColourModel().eval()

    monkeypatch.setattr(cli, "load_model", load)
    return calls


def call(photo, output, *options, labels="red, blue"):
    return cli.main(
        [str(photo), "--labels", labels, "--checkpoint", "weights", "--output", str(output), *options]
    )


def test_writes_three_pictures_and_a_table(photo, loaded, tmp_path, capsys):
    assert call(photo, tmp_path / "out.png", "--background", "--device", "cpu") == 0
    assert loaded == [("weights", "cpu")]
    labels = np.asarray(Image.open(tmp_path / "out.png"))
    assert labels[32, [16, 48, 80]].tolist() == [1, 0, 2]
    assert Image.open(tmp_path / "out.overlay.png").height > 64
    assert Image.open(tmp_path / "out.regions.png").size == (96, 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["label", "coverage"]
    assert {line.split()[0] for line in lines[1:4]} == {"background", "red", "blue"}
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert lines[4].startswith("written: ")


def test_options_reach_the_segmenter(photo, loaded, tmp_path, monkeypatch):
    seen = {}
    real = cli_segment()

    def spy(model, image, labels, **options):
        seen.update(options, labels=labels)
        return real(model, image, labels, background=["thing"])

    monkeypatch.setattr("segclip_fast.evaluation.segmentation.segment", spy)
    options = ["--background-names", "white, thing", "--snap", "--template", "a {}", "--template", "the {}"]
    options += ["--short-side", "48", "--stride", "16", "--protocol", "paper"]
    assert call(photo, tmp_path / "out.png", *options) == 0
    assert seen == {
        "labels": ("red", "blue"),
        "background": ("white", "thing"),
        "threshold": None,
        "templates": ["a {}", "the {}"],
        "snap": True,
        "short_side": 48,
        "stride": 16,
        "protocol": "paper",
    }


def test_pamr_precision_and_batch_size_reach_the_segmenter(photo, loaded, tmp_path, monkeypatch):
    seen = {}
    real = cli_segment()

    def spy(model, image, labels, **options):
        seen.update(options)
        return real(model, image, labels)

    monkeypatch.setattr("segclip_fast.evaluation.segmentation.segment", spy)
    assert call(photo, tmp_path / "out.png", "--pamr", "--precision", "bf16", "--batch-size", "3") == 0
    assert {name: seen[name] for name in ("pamr", "precision", "batch_size")} == {
        "pamr": True,
        "precision": "bf16",
        "batch_size": 3,
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_from_a_file(photo, loaded, tmp_path, capsys, encoding):
    (tmp_path / "labels.txt").write_text("red\n\n  blue, or navy  \r\ngrün\n", encoding=encoding)
    arguments = [str(photo), "--labels-file", str(tmp_path / "labels.txt"), "--model", "weights"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out.png")]) == 0
    assert loaded == [("weights", "auto")]
    found = [line.split("  ")[0].rstrip() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert sorted(found) == ["blue, or navy", "grün", "red"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--labels-file: expected an existing text file, got "),
        (b"", "--labels-file: expected at least one non-empty string"),
        (b"\n \n", "--labels-file: expected at least one non-empty string"),
        (b"red\nRED\n", "--labels-file: expected distinct labels, got 'red' and 'RED'"),
        (b"gr\xfcn\n", "--labels-file: expected UTF-8 text, got "),
    ],
    ids=str,
)
def test_bad_labels_file(photo, loaded, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "labels.txt").write_bytes(content)
    arguments = [str(photo), "--labels-file", str(tmp_path / "labels.txt"), "--model", "weights"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"segment: error: {message}")
    assert error.count("\n") == 1
    assert loaded == []


@pytest.mark.parametrize("arguments", [[], ["--labels", "red", "--labels-file", "labels.txt"]], ids=str)
def test_labels_are_given_once(photo, loaded, tmp_path, capsys, arguments):
    output = ["--model", "weights", "--output", str(tmp_path / "out.png")]
    assert cli.main([str(photo), *arguments, *output]) == 2
    assert "--labels-file" in capsys.readouterr().err
    assert loaded == []


@pytest.mark.parametrize("options", [["--resume"], ["--overlay"], ["--rle", "coco.json"]], ids=str)
def test_options_for_folders_only(photo, loaded, tmp_path, capsys, options):
    assert call(photo, tmp_path / "out.png", *options) == 2
    assert f"{options[0]}: expected with a folder of photos only, got " in capsys.readouterr().err
    assert loaded == []


def test_written_whole_or_not_at_all(photo, loaded, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.png").write_text("precious")

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert call(photo, tmp_path / "out.png", "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out.png").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def cli_segment():
    from segclip_fast.evaluation.segmentation import segment

    return segment


@pytest.mark.parametrize("taken", ["out.png", "out.overlay.png", "out.regions.png"])
def test_existing_output_is_kept(photo, loaded, tmp_path, capsys, taken):
    (tmp_path / taken).write_text("precious")
    assert call(photo, tmp_path / "out.png") == 2
    assert (tmp_path / taken).read_text() == "precious"
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert loaded == []  # refused before the model was read
    assert call(photo, tmp_path / "out.png", "--overwrite") == 0
    assert Image.open(tmp_path / taken).size[0] >= 96


def test_the_photo_is_never_overwritten(photo, loaded, capsys):
    before = photo.read_bytes()
    assert call(photo, photo, "--overwrite") == 2
    assert "expected another file than the photo" in capsys.readouterr().err
    assert photo.read_bytes() == before


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("", [], "--labels: expected at least one non-empty string"),
        ("cat,,sofa", [], "--labels: expected non-empty strings, got '' at position 1"),
        ("cat, Cat", [], "--labels: expected distinct labels"),
        ("red", ["--background-names", ""], "--background-names: expected at least one"),
        (
            "red",
            ["--background", "--background-names", "x"],
            "--background-names: expected without --background",
        ),
        ("red", ["--threshold", "0.5"], "threshold: expected None unless background=True"),
        ("red", ["--threshold", "high"], "argument --threshold: invalid float value"),
        ("red", ["--template", "photo"], "templates: expected strings with {}"),
        ("red", ["--stride", "99"], "stride: expected 1 to 32"),
        ("red", ["--protocol", "ours"], "argument --protocol: invalid choice"),
        ("red", ["--precision", "int8"], "argument --precision: invalid choice"),
        ("red", ["--batch-size", "0"], "batch_size: expected a positive number"),
        ("red", ["--surprise"], "unrecognized arguments: --surprise"),
    ],
    ids=str,
)
def test_one_line_for_a_mistake(photo, loaded, tmp_path, capsys, labels, options, message):
    assert call(photo, tmp_path / "out.png", *options, labels=labels) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("segment: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.jpg", "ending in .png"),
        ("nowhere/out.png", "expected an existing folder"),
        ("", "ending in .png"),
    ],
)
def test_bad_output(photo, loaded, tmp_path, capsys, output, message):
    assert call(photo, tmp_path / output) == 2
    assert message in capsys.readouterr().err
    assert loaded == []


def test_bad_photo(loaded, tmp_path, capsys):
    assert call(tmp_path / "missing.jpg", tmp_path / "out.png") == 2
    assert "missing.jpg" in capsys.readouterr().err
    (tmp_path / "text.jpg").write_text("not a picture")
    assert call(tmp_path / "text.jpg", tmp_path / "out.png") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert loaded == []


def test_bad_checkpoint_and_device(photo, tmp_path, capsys):
    assert call(photo, tmp_path / "out.png") == 2  # no folder "weights" here
    error = capsys.readouterr().err
    assert error.startswith("segment: error: ")
    assert "weights" in error
    for device in ("cuda:99", "toaster"):
        assert call(photo, tmp_path / "out.png", "--device", device) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


def test_saved_model_end_to_end(photo, tmp_path, capsys):
    import torch

    from segclip_fast import SegCLIP
    from segclip_fast.config import preset

    torch.manual_seed(0)
    model = SegCLIP(preset("scenes_tiny"))
    model.save_pretrained(tmp_path / "model")
    words = ", ".join(model.config.text.vocabulary[:3])
    arguments = [str(photo), "--labels", words, "--checkpoint", str(tmp_path / "model")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out.png"), "--device", "cpu"]) == 0
    assert np.asarray(Image.open(tmp_path / "out.png")).shape == (64, 96)
    assert "coverage" in capsys.readouterr().out
