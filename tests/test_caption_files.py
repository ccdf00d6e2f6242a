"""COCO's captions, Karpathy's splits and tables: every pair in its place, and errors that name the file."""

from __future__ import annotations

import csv
import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from segclip_fast.data.caption_files import CocoCaptions, TableSource
from segclip_fast.data.scenes import make_scene
from segclip_fast.data.shard_index import PackedStrings
from segclip_fast.data.shards import SampleError


def write_pictures(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_scene(number, 24).image).save(folder / name, "PNG")


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def official(tmp_path, **changes):
    """Three pictures, the second of them without captions, whose captions are mixed up in the file."""
    write_pictures(tmp_path / "train2017", ["9.jpg", "4.jpg", "7.jpg"])
    images = [{"id": int(name), "file_name": f"{name}.jpg"} for name in "947"]
    texts = [(7, "seven"), (9, "nine\n"), (7, " "), (9, "also nine ")]
    captions = [{"image_id": image, "id": 5, "caption": text} for image, text in texts]
    content = {"info": {}, "images": images, "annotations": captions} | changes
    return tmp_path / "train2017", write_json(tmp_path / "captions.json", content)


def test_official_captions_are_samples_each(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "segclip_fast"):
        source = CocoCaptions(*official(tmp_path))
    assert "1 of 3 pictures of" in caplog.text
    assert len(source) == 4
    assert [source[index].caption for index in range(3)] == ["nine", "also nine", "seven"]
    assert [path.rpartition("/")[2] for path in source.pictures] == ["9.jpg", "9.jpg", "7.jpg", "7.jpg"]
    assert all(source[index].captions == () for index in range(3))
    assert np.array_equal(source[1].image, make_scene(0, 24).image)
    assert np.array_equal(source[2].image, make_scene(2, 24).image)
    with pytest.raises(SampleError, match=r"7\.jpg: caption: expected text, got none"):
        source[-1]
    with pytest.raises(IndexError, match="index: expected 0 to 3, got 4"):
        source[4]


def test_official_captions_by_picture(tmp_path):
    source = CocoCaptions(*official(tmp_path), one_per_image=True)
    found = [(source[index].caption, source[index].captions) for index in range(len(source))]
    assert found == [("nine", ("nine", "also nine")), ("seven", ())]
    assert np.array_equal(source[1].image, make_scene(2, 24).image)


def karpathy(tmp_path, folders=("train2014", "val2014")):
    names = [f"{folder}/{split}.jpg" for folder, split in zip(folders, ("train", "restval"), strict=True)]
    write_pictures(tmp_path / "coco", [*names, f"{folders[1]}/test.jpg"])
    images = [
        {
            "filepath": "train2014" if split == "train" else "val2014",
            "filename": f"{split}.jpg",
            "split": split,
            "sentences": [{"raw": f"{split} {number}", "tokens": []} for number in range(2)],
        }
        for split in ("test", "restval", "train")
    ]
    return tmp_path / "coco", write_json(tmp_path / "dataset.json", {"images": images, "dataset": "coco"})


@pytest.mark.parametrize("folders", [("train2014", "val2014"), (".", ".")], ids=["2014", "flat"])
def test_karpathy_splits(tmp_path, folders):
    images, file = karpathy(tmp_path, folders)
    captions = {
        options: [sample.caption for sample in CocoCaptions(images, file, **dict(options))]
        for options in [(), (("split", "test"),), (("restval", True),)]
    }
    assert list(captions.values()) == [
        ["train 0", "train 1"],
        ["test 0", "test 1"],
        ["restval 0", "restval 1", "train 0", "train 1"],
    ]
    sample = CocoCaptions(images, file, restval=True, one_per_image=True)[0]
    assert sample.captions == ("restval 0", "restval 1")
    assert np.array_equal(sample.image, make_scene(1, 24).image)


def test_karpathy_without_folders(tmp_path):
    """Flickr30k's file has no filepath."""
    images, file = karpathy(tmp_path, (".", "."))
    content = json.loads(file.read_text())
    for image in content["images"]:
        del image["filepath"]
    assert CocoCaptions(images, write_json(file, content))[1].caption == "train 1"


def test_unusable_annotations(tmp_path):
    images, file = official(tmp_path)
    with pytest.raises(FileNotFoundError, match="images: expected the folder of the pictures, got .*nowhere"):
        CocoCaptions(tmp_path / "nowhere", file)
    with pytest.raises(FileNotFoundError, match=r"annotations: expected an existing file, got .*none\.json"):
        CocoCaptions(images, tmp_path / "none.json")
    with pytest.raises(ValueError, match="split: expected None with official annotations.*'train'"):
        CocoCaptions(images, file, split="train")
    with pytest.raises(ValueError, match="restval: expected False with official annotations"):
        CocoCaptions(images, file, restval=True)
    file.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"annotations: expected a JSON file, got .*captions\.json"):
        CocoCaptions(images, file)
    file.write_bytes(b'{"images": "\xe9"}')
    with pytest.raises(ValueError, match=r"annotations: expected UTF-8 text, got .*captions\.json"):
        CocoCaptions(images, file)
    for content, got in (({"categories": [], "x": 1}, r"\['categories', 'x'\]"), ([], "list")):
        with pytest.raises(ValueError, match=f"annotations: expected captions in COCO's .*got {got}"):
            CocoCaptions(images, write_json(file, content))
    for changes, problem in (
        ({"annotations": [{"image_id": 9, "bbox": []}]}, "KeyError: 'caption'"),
        ({"annotations": [{"image_id": 9, "caption": None}]}, "a caption of type NoneType"),
        ({"images": [3]}, "TypeError"),
    ):
        with pytest.raises(ValueError, match=rf"annotations: .*captions\.json' with other.*{problem}"):
            CocoCaptions(*official(tmp_path, **changes))
    with pytest.raises(ValueError, match="annotations: expected an image_id among the images, got 5"):
        CocoCaptions(*official(tmp_path, annotations=[{"image_id": 5, "caption": "x"}]))
    with pytest.raises(ValueError, match=r"annotations: expected captions, got .*captions\.json"):
        CocoCaptions(*official(tmp_path, annotations=[]))
    images, file = karpathy(tmp_path)
    with pytest.raises(ValueError, match=r"split: expected one of \['restval', 'test', 'train'\], got 'val'"):
        CocoCaptions(images, file, split="val")
    with pytest.raises(ValueError, match="restval: expected False with a split other than train"):
        CocoCaptions(images, file, split="test", restval=True)


def test_missing_pictures_are_named(tmp_path):
    images, file = official(tmp_path)
    (images / "7.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"images: expected the picture .*7\.jpg.*\(sample 2; check"):
        CocoCaptions(images, file)
    source = CocoCaptions(images, file, check=False)
    assert source[1].caption == "also nine"
    with pytest.raises(SampleError, match="picture: expected an existing file, got none") as caught:
        source[2]
    assert caught.value.key == str(images / "7.jpg")
    (images / "7.jpg").mkdir()
    with pytest.raises(SampleError, match="picture: expected an existing file"):
        source[2]
    (images / "9.jpg").write_bytes((images / "9.jpg").read_bytes()[:200])
    with pytest.raises(SampleError, match=r"9\.jpg: picture: expected a complete picture"):
        source[0]


def test_too_many_pixels(tmp_path):
    source = CocoCaptions(*official(tmp_path), max_pixels=575)
    with pytest.raises(SampleError, match="picture: expected at most 575 pixels, got 24 x 24"):
        source[0]


ROWS = [
    ("a.png", "plain"),
    ("sub/b.png", 'commas, a\ttab and "quotes"'),
    ("c.png", "two\nlines"),
    ("d.png", "caf\u00e9 5\u2033"),
]


def write_table(tmp_path, separator=",", header=("id", "filepath", "title"), encoding="utf-8", end="\r\n"):
    write_pictures(tmp_path, [name for name, _ in ROWS])
    path = tmp_path / "table.txt"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=end)
        writer.writerow(header)
        writer.writerows((number, name, text) for number, (name, text) in enumerate(ROWS))
    return path


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables(tmp_path, separator, encoding):
    header = ("filepath.old", "filepath", "title")
    path = write_table(tmp_path, separator, header, encoding, "\n" if separator == ";" else "\r\n")
    source = TableSource(path, separator=separator if separator == ";" else None)
    captions = [source[index].caption for index in range(len(source))]
    assert captions == ["plain", 'commas, a tab and "quotes"', "two lines", "caf\u00e9 5\u2033"]
    assert list(source.pictures) == [str(tmp_path / name) for name, _ in ROWS]
    assert np.array_equal(source[1].image, make_scene(1, 24).image)
    assert source.class_names == ()


def test_columns_and_absolute_paths(tmp_path):
    write_pictures(tmp_path, ["a.png", "b.png"])
    path = tmp_path / "x" / "t.csv"
    path.parent.mkdir()
    path.write_text(f"text,image\n\nfirst,{tmp_path}/a.png\n\nsecond,../b.png\n")
    source = TableSource(path, "image", "text")
    assert [sample.caption for sample in source] == ["first", "second"]
    assert np.array_equal(source[1].image, make_scene(1, 24).image)
    with pytest.raises(ValueError, match=r"columns \['filepath', 'title'\] in .*got \['text', 'image'\]"):
        TableSource(path)


def test_unusable_tables(tmp_path):
    path = write_table(tmp_path)
    whole = path.read_text()
    with pytest.raises(FileNotFoundError, match=r"path: expected an existing file, got .*none\.csv"):
        TableSource(tmp_path / "none.csv")
    with pytest.raises(
        ValueError, match="separator: expected one character, no quote or line break, got ',,'"
    ):
        TableSource(path, separator=",,")
    with pytest.raises(ValueError, match=r"columns \['filepath', 'title'\] .*got \['id,filepath,title'\]"):
        TableSource(path, separator="\t")
    for text, problem in (
        ("", r"columns .*got \[\]"),
        ("filepath,title\n", "path: expected at least one row below the names"),
        (whole + "5,a.png\n", r"path: expected 3 fields, got 2 in line 7 of .*table\.txt"),
        (whole + "5,a.png,one, two\n", "path: expected 3 fields, got 4 in line 7"),
        (whole + '5,a.png,"open\n', r"path: expected rows with closed quotes, got .*table\.txt', line 7"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            TableSource(path)
    path.write_bytes(b"filepath,title\na.png,caf\xe9\n")
    with pytest.raises(ValueError, match=r"path: expected UTF-8 text, got .*table\.txt"):
        TableSource(path)
    path.write_text("filepath,title\na.png,x\n,y\n")
    with pytest.raises(FileNotFoundError, match=r"path: expected the picture .*\(sample 1; check=False"):
        TableSource(path)
    with pytest.raises(SampleError, match="picture: expected an existing file"):
        TableSource(path, check=False)[1]


def test_pickles_and_loader_workers(tmp_path):
    source = TableSource(write_table(tmp_path))
    copies = pickle.loads(pickle.dumps(source))
    for index, sample in enumerate(DataLoader(copies, None, num_workers=2)):
        assert sample.caption == source[index].caption
        assert np.array_equal(sample.image, source[index].image)


def test_packed_strings():
    words = ["", "caf\u00e9", "\ud83d", "x" * 300, ""]
    packed = PackedStrings.of(iter(words))
    assert list(packed) == words
    assert packed[-2] == words[-2]
    assert list(PackedStrings.of([])) == []
    with pytest.raises(IndexError):
        packed[5]
