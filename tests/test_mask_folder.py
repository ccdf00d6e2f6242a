"""A folder of photos on the command line: masks, labels.json, COCO masks, skips, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from photo_folders import MASKS, NAMES, call, files, give_colour_models, truncated, write
from PIL import Image
from test_windows import ColourModel

from segclip_fast import __version__
from segclip_fast import segment as cli
from segclip_fast.evaluation.coco_rle import decode
from segclip_fast.evaluation.models import fingerprint


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The models given out."""
    return give_colour_models(monkeypatch)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The photos' folder; the outputs lie beside it."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "photos", *NAMES)


# --- what is written ---------------------------------------------------------------------------------------


def test_masks_mirror_the_photos(tmp_path, root, capsys):
    assert call("--background") == 0
    assert sorted(files(tmp_path / "masks")) == sorted([*MASKS, "labels.json"])
    captured = capsys.readouterr()
    assert captured.out == "written: masks (6 photos, 0 kept, 0 skipped)\n"
    assert captured.err == ""  # no bar where there is no terminal
    palettes = set()
    for name, mask in zip(NAMES, MASKS, strict=True):
        picture = Image.open(tmp_path / "masks" / mask)
        assert picture.mode == "P"
        assert picture.size == Image.open(root / name).size
        palettes.add(tuple(picture.getpalette()[:12]))
    (palette,) = palettes
    labels = json.loads((tmp_path / "masks/labels.json").read_text())
    assert labels["names"] == ["background", "red", "blue", "green"]
    assert list(palette) == np.ravel(labels["colours"]).tolist()
    assert np.asarray(Image.open(tmp_path / "masks/0.png"))[20, [16, 48, 80]].tolist() == [1, 0, 2]


def test_a_folder_is_the_photos_one_by_one(tmp_path, root):
    assert call("--background", "--overlay", "--snap") == 0
    for name, mask in zip(NAMES, MASKS, strict=True):
        assert call("--background", "--snap", "--overwrite", photos=root / name, output="one.png") == 0
        for ending in (".png", ".overlay.png"):
            alone = Image.open((tmp_path / "one.png").with_suffix(ending))
            inside = Image.open((tmp_path / "masks" / mask).with_suffix(ending))
            assert inside.tobytes() == alone.tobytes()
            assert inside.getpalette() == alone.getpalette()
    assert len(files(tmp_path / "masks")) == 2 * len(NAMES) + 1


def test_labels_json_tells_how_the_masks_were_made(tmp_path):
    options = ["--background", "--template", "a {}", "--template", "the {}", "--snap", "--short-side", "48"]
    assert call(*options, "--stride", "16", "--protocol", "paper", "--batch-size", "2") == 0
    found = json.loads((tmp_path / "masks/labels.json").read_text())
    assert list(found) == ["names", "colours", "background", "settings", "complete", "files", "skipped"]
    assert found["background"] == 0
    assert found["complete"] is True
    assert found["skipped"] == []
    weights = found["settings"].pop("weights")
    assert weights == fingerprint("weights", ColourModel())["sha256"]
    assert found["settings"] == {
        "version": __version__,
        "model": "weights",
        "photos": "photos",
        "labels": ["red", "blue", "green"],
        "background": True,
        "threshold": 0.75,  # the default of this protocol
        "templates": ["a {}", "the {}"],
        "snap": True,
        "pamr": False,
        "protocol": "paper",
        "short_side": 48,
        "stride": 16,
        "precision": "fp32",
        "overlay": False,
        "rle": None,
    }
    assert [(entry["path"], entry["mask"]) for entry in found["files"]] == list(
        zip(NAMES, MASKS, strict=True)
    )
    for entry in found["files"]:
        labels = np.asarray(Image.open(tmp_path / "masks" / entry["mask"]))
        assert entry["size"] == [*labels.shape]
        shares = np.bincount(labels.ravel(), minlength=4) / labels.size
        present = {name: share for name, share in zip(found["names"], shares, strict=True) if share}
        assert entry["coverage"] == pytest.approx(present, abs=1e-6)


def test_no_background(tmp_path):
    assert call() == 0
    found = json.loads((tmp_path / "masks/labels.json").read_text())
    assert found["background"] is None
    assert found["settings"]["background"] is False
    assert found["settings"]["threshold"] is None


def test_coco_masks(tmp_path):
    assert call("--background", "--rle", "masks/coco.json") == 0
    entries = json.loads((tmp_path / "masks/coco.json").read_text())
    keys = ["image", "size", "category_id", "category", "score", "segmentation", "area", "bbox"]
    names = json.loads((tmp_path / "masks/labels.json").read_text())["names"]
    rebuilt = {name: np.full(Image.open(tmp_path / "photos" / name).size[::-1], -1) for name in NAMES}
    for entry in entries:
        assert list(entry) == keys
        assert entry["size"] == entry["segmentation"]["size"] == [*rebuilt[entry["image"]].shape]
        assert entry["category"] == names[entry["category_id"]]
        mask = decode(entry["segmentation"])
        assert entry["area"] == mask.sum() > 0
        assert 0 < entry["score"] <= 1
        rebuilt[entry["image"]][mask] = entry["category_id"]
    for name, mask in zip(NAMES, MASKS, strict=True):
        np.testing.assert_array_equal(rebuilt[name], np.asarray(Image.open(tmp_path / "masks" / mask)))


# --- photos that cannot be read ----------------------------------------------------------------------------


def test_a_broken_photo_is_skipped(tmp_path, root, capsys):
    assert call("--rle", "coco.json") == 0
    clean, coco = files(tmp_path / "masks"), json.loads((tmp_path / "coco.json").read_text())
    truncated(root / "sub/cut.jpg")
    capsys.readouterr()
    assert call("--rle", "coco.json", "--overwrite") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("segment: skipped photos/sub/cut.jpg: photo: expected a complete image")
    assert captured.err.count("\n") == 1
    assert captured.out == "written: masks (6 photos, 0 kept, 1 skipped)\n"
    found = files(tmp_path / "masks")
    before, after = json.loads(clean.pop("labels.json")), json.loads(found.pop("labels.json"))
    assert found == clean
    assert json.loads((tmp_path / "coco.json").read_text()) == coco
    (skipped,) = after.pop("skipped")
    assert skipped["path"] == "sub/cut.jpg"
    assert "complete image" in skipped["error"]
    before.pop("skipped")
    assert after == before


def test_nothing_readable(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    truncated(tmp_path / "other/a.jpg")
    assert call(photos="other") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("segment: skipped other/a.jpg")
    assert lines[1] == "segment: error: photo: expected photos that can be read, got 1 that cannot"
    assert not (tmp_path / "masks").exists()


def test_the_model_s_errors_stop_the_run(tmp_path, capsys, monkeypatch):
    class Full(ColourModel):
        def encode_image(self, images):
            if len(self.windows) >= 8:
                raise RuntimeError("CUDA out of memory. Tried to allocate\nmore")
            return super().encode_image(images)

    monkeypatch.setattr(cli, "load_model", lambda spec, device: Full().eval())
    assert call("--batch-size", "1") == 2
    lines = capsys.readouterr().err.splitlines()
    done = sorted(set(files(tmp_path / "masks")) - {"labels.json", ".progress.jsonl"})
    assert 0 < len(done) < 6
    assert lines == [
        f"segment: {len(done)} of 6 photos are done, --resume continues",
        "segment: error: CUDA out of memory. Tried to allocate",
    ]


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", ""], "--labels: expected at least one"),
        (["--labels", ", ".join(f"label {i}" for i in range(257))], "labels: expected at most 256"),
        (
            ["--labels", ", ".join(f"label {i}" for i in range(256)), "--background-names", "x"],
            "labels: expected at most 256, as a PNG can hold, got 257",
        ),
        (["--threshold", "0.5"], "threshold: expected None unless background=True"),
        (["--background", "--threshold", "2"], "threshold: expected a number from 0 to 1, got 2.0"),
        (["--template", "photo"], "templates: expected strings with {}"),
        (["--short-side", "0"], "short_side: expected a positive number"),
        (["--batch-size", "0"], "batch_size: expected a positive number"),
        (["--precision", "int4"], "argument --precision: invalid choice"),
        (["--resume", "--overwrite"], "--resume: expected without --overwrite, got both"),
        (["--rle", "coco.txt"], "--rle: expected another file ending in .json, got 'coco.txt'"),
        (["--rle", "masks/labels.json"], "--rle: expected another file"),
        (["--rle", "nowhere/coco.json"], "--rle: expected an existing folder, got 'nowhere'"),
        (["--output", "nowhere/masks"], "--output: expected an existing folder above"),
        (["--output", "photos"], "--output: expected a folder apart from the photos"),
        (["--output", "photos/masks"], "--output: expected a folder apart from the photos"),
        (["--output", "."], "--output: expected a folder apart from the photos"),
        (["--output", "photos/0.png"], "--output: expected a folder for a folder of photos"),
    ],
    ids=str,
)
def test_unusable_settings(tmp_path, loaded, capsys, options, message):
    before = files(tmp_path)
    assert call(*options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("segment: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert files(tmp_path) == before
    assert not (tmp_path / "masks").exists()
    assert loaded == []  # refused before the model was read


def test_the_segmenter_s_refusals_write_nothing(tmp_path, capsys):
    assert call("--stride", "99") == 2
    assert capsys.readouterr().err.startswith("segment: error: stride: expected 1 to 32")
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("option", [None, "--overwrite", "--resume"])
def test_a_folder_in_the_place_of_a_mask(tmp_path, loaded, capsys, option):
    (tmp_path / "masks/sub/2.png").mkdir(parents=True)
    assert call(*filter(None, [option])) == 2
    assert "--output: expected a file, 'masks/sub/2.png' is a folder" in capsys.readouterr().err
    assert loaded == []


def test_256_labels_fit(tmp_path):
    assert call(labels=", ".join(f"label {i}" for i in range(256))) == 0
    assert len(json.loads((tmp_path / "masks/labels.json").read_text())["names"]) == 256


def test_no_photos(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert call(photos="empty") == 2
    assert "folder: expected photos" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize(
    ("name", "other", "options"),
    [("sub/2.jpg", "sub/2.PNG", []), ("0.overlay.jpg", "0.png", ["--overlay"])],
    ids=["png", "overlay"],
)
def test_two_photos_for_one_mask(tmp_path, root, loaded, capsys, name, other, options):
    write(root, name)
    assert call(*options) == 2
    error = capsys.readouterr().err
    assert repr(name) in error
    assert repr(other) in error
    assert loaded == []
    assert not (tmp_path / "masks").exists()


def test_an_overlay_s_name_is_free_without_overlays(tmp_path, root):
    write(root, "0.overlay.jpg")
    assert call() == 0
    assert (tmp_path / "masks/0.overlay.png").is_file()


def test_existing_results_are_kept(tmp_path, loaded, capsys):
    assert call() == 0
    before = files(tmp_path)
    assert call(labels="blue, red") == 2
    error = capsys.readouterr().err
    assert "'masks/labels.json' exists; --resume continues that run, --overwrite replaces it" in error
    assert files(tmp_path) == before
    assert len(loaded) == 1
    assert call("--overwrite", labels="blue, red") == 0
    assert json.loads((tmp_path / "masks/labels.json").read_text())["names"] == ["blue", "red"]


@pytest.mark.parametrize("taken", ["masks/sub/2.png", "masks/sub/2.overlay.png", "coco.json"])
@pytest.mark.parametrize("option", [None, "--resume"])
def test_foreign_files_are_kept(tmp_path, capsys, taken, option):
    path = tmp_path / taken
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    assert call("--overlay", "--rle", "coco.json", *filter(None, [option])) == 2
    assert f"{taken!r} exists; --overwrite replaces it" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert call("--overlay", "--rle", "coco.json", "--overwrite") == 0
    assert path.read_bytes() != b"precious"


def test_the_page_about_it(tmp_path, root, monkeypatch, capsys):
    """docs/segment.md: its Python example runs, and every option it names exists, and the other way round."""
    page = (Path(__file__).parents[1] / "docs/segment.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr("segclip_fast.SegCLIP", SimpleNamespace(from_pretrained=lambda path: ColourModel()))
    truncated(root / "cut.jpg")
    exec(compile(example, "docs/segment.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[2].startswith("skipped photos/cut.jpg")
    known = {option for action in cli.build_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]+", page))
    assert named == {option for option in known if option.startswith("--")} - {"--help"}
