"""COCO-Object's label maps made from those of COCO-Stuff."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dataset_files import UNUSED, photo, reopen, save
from PIL import Image

from segclip_fast.evaluation.label_maps import coco_object_table
from segclip_fast.evaluation.prepare import main, prepare_coco_object


def pixel_maps(folder: Path) -> dict[str, np.ndarray]:
    """Three COCO-Stuff pixel maps that hold all ids between them, and files that are none."""
    ids = np.array([*range(182), 255], dtype=np.uint8)
    rng = np.random.default_rng(5)
    maps = {f"{i:012d}": rng.permutation(np.tile(ids, 2)).reshape(6, 61) for i in (139, 285, 632)}
    for name, values in maps.items():
        save(folder / f"{name}.png", values)
    save(folder / "000000000999_labelTrainIds.png", np.full((2, 2), 200, dtype=np.uint8))
    return maps


def test_prepare_agrees_with_a_literal_loop(tmp_path):
    maps = pixel_maps(tmp_path / "stuff")
    assert prepare_coco_object(tmp_path / "stuff", tmp_path / "new/deep") == (3, 0)
    written = sorted(path.name for path in (tmp_path / "new/deep").iterdir())
    assert written == [f"{name}_instanceTrainIds.png" for name in sorted(maps)]
    for name, values in maps.items():
        with Image.open(tmp_path / f"new/deep/{name}_instanceTrainIds.png") as picture:
            assert (picture.format, picture.mode) == ("PNG", "L")
            got = np.asarray(picture)
        expected = np.zeros_like(values)
        for y in range(values.shape[0]):
            for x in range(values.shape[1]):
                id_ = int(values[y, x])
                if id_ < 90 and id_ not in UNUSED:
                    expected[y, x] = 1 + sum(1 for smaller in range(id_) if smaller not in UNUSED)
        assert np.array_equal(got, expected)
        assert set(np.unique(got)) == set(range(81))


def test_prepared_maps_can_be_read(tmp_path):
    maps = pixel_maps(tmp_path / "annotations/val2017")
    for name in maps:
        save(tmp_path / f"images/val2017/{name}.jpg", photo(1, (6, 61)))
    folder = str(tmp_path / "annotations/val2017")  # the results may lie beside the maps
    assert main(["coco-object", "--stuffthing", folder, "--output", folder]) == 0
    objects, stuff = reopen(tmp_path, "coco_object"), reopen(tmp_path, "coco_stuff")
    assert (len(objects), len(stuff)) == (3, 3)
    values = maps["000000000139"]
    assert np.array_equal(objects[0].mask, coco_object_table()[values])
    assert objects[0].mask.max() == 80  # no pixel is ignored
    with pytest.raises(ValueError, match=r"0 to 10, 12 to 24, .*, 255, got 11, 25, 28, 29, 44, \.\.\. in"):
        stuff[0]


def test_prepare_resumes_and_keeps(tmp_path, capsys):
    pixel_maps(tmp_path / "stuff")
    out = tmp_path / "out"
    save(out / "000000000285_instanceTrainIds.png", np.full((1, 1), 7, dtype=np.uint8))
    arguments = ["coco-object", "--stuffthing", str(tmp_path / "stuff"), "--output", str(out)]
    assert main(arguments) == 0
    assert "2 maps written, 1 kept" in capsys.readouterr().out
    assert np.asarray(Image.open(out / "000000000285_instanceTrainIds.png")).tolist() == [[7]]
    assert main(arguments) == 0
    assert "0 maps written, 3 kept" in capsys.readouterr().out
    assert main([*arguments, "--overwrite"]) == 0
    assert "3 maps written, 0 kept" in capsys.readouterr().out
    assert np.asarray(Image.open(out / "000000000285_instanceTrainIds.png")).shape == (6, 61)


def test_prepare_writes_whole_files_or_none(tmp_path, monkeypatch, capsys):
    pixel_maps(tmp_path / "stuff")
    real, calls = Image.Image.save, []

    def failing(self, target, **options):
        calls.append(target)
        real(self, target, **options)
        if len(calls) == 2:
            Path(target).write_bytes(Path(target).read_bytes()[:20])
            raise OSError("No space left on device")

    out = tmp_path / "out"
    arguments = ["coco-object", "--stuffthing", str(tmp_path / "stuff"), "--output", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", failing)
        assert main(arguments) == 2
    assert "prepare: error: No space left on device" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["000000000139_instanceTrainIds.png"]
    assert main(arguments) == 0
    assert len(list(out.iterdir())) == 3


def test_prepare_refuses(tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert main(arguments) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    stuff, out = tmp_path / "stuff", str(tmp_path / "out")
    assert "--stuffthing: expected a folder" in error(
        "coco-object", "--stuffthing", str(stuff), "--output", out
    )
    pixel_maps(stuff / "val2017")
    text = error("coco-object", "--stuffthing", str(stuff), "--output", out)
    assert f"did you mean '{stuff / 'val2017'}'" in text
    save(stuff / "val2017/000000000001.png", np.full((2, 2), 182, dtype=np.uint8))
    text = error("coco-object", "--stuffthing", str(stuff / "val2017"), "--output", out)
    assert "pixel map: expected labels 0 to 181, 255, got 182" in text
    assert "000000000001.png" in text
    (tmp_path / "file").write_text("")
    save(stuff / "val2017/000000000001.png", np.full((2, 2), 181, dtype=np.uint8))
    text = error("coco-object", "--stuffthing", str(stuff / "val2017"), "--output", str(tmp_path / "file"))
    assert "file" in text
    assert "--help lists the options" in error("coco-object")
    assert "--help lists the options" in error("coco-stuff")


def test_prepare_runs_as_a_module(tmp_path):
    pixel_maps(tmp_path / "stuff")
    command = [sys.executable, "-m", "segclip_fast.evaluation.prepare", "coco-object"]
    options = ["--stuffthing", str(tmp_path / "stuff"), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout == f"coco-object: 3 maps written, 0 kept, in {tmp_path / 'out'}\n"
    assert done.stderr == ""
