"""Sources opened by the settings: told by their form, mixed, counted, and named for the log."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from small import WORDS, small_config
from test_caption_files import karpathy, official
from test_shards import pairs, write_shard

from segclip_fast.config import DataConfig, SuperpixelConfig
from segclip_fast.data.caption_files import CocoCaptions, TableSource
from segclip_fast.data.folder import FolderSource
from segclip_fast.data.mixture import Mixture, Synthetic
from segclip_fast.data.opening import container, describe, make_held_out, make_source, sample_name
from segclip_fast.data.sample import SampleError
from segclip_fast.data.scenes import SceneSource, make_scene
from segclip_fast.data.shards import ShardSource
from segclip_fast.data.stamps import StampSource
from segclip_fast.data.tokenizer import tokenizer_for

MODEL = small_config()


def opened(train_data, **changes):
    return make_source(DataConfig(train_data=str(train_data), **changes), MODEL)


def own_folder(root, count=3, segments=False):
    root.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(make_scene(number, 24).image).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"own {number}")
        if segments:
            Image.fromarray(np.eye(24, dtype=np.uint8)).save(root / f"{number}.segments.png")
    return root


def table(path, count=2, separator=",", columns=("filepath", "title")):
    pictures = path.with_name(f"{path.stem}_pictures")
    pictures.mkdir()
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(columns)
        for number in range(count):
            Image.fromarray(make_scene(number, 24).image).save(pictures / f"{number}.png")
            rows.writerow((f"{pictures.name}/{number}.png", f"row {number}"))
    return path


def shards(folder, counts=(2, 3)):
    folder.mkdir()
    for number, count in enumerate(counts):
        write_shard(folder / f"{number:05d}.tar", pairs(count, 10 * number))
    return folder


def every_kind(tmp_path):
    """Shards of 5 pairs, a table of 2, a folder of 3, COCO's captions of 4, and their settings."""
    images, annotations = official(tmp_path)
    found = [
        f"{shards(tmp_path / 'cc')}/{{00000..00001}}.tar",
        table(tmp_path / "t.tsv", separator="\t"),
        own_folder(tmp_path / "own"),
        annotations,
    ]
    return [str(each) for each in found], {"images": str(images)}


# --- what is what


def test_forms_are_told_apart(tmp_path):
    entries, options = every_kind(tmp_path)
    kinds = [ShardSource, TableSource, FolderSource, CocoCaptions]
    for entry, kind, size in zip(entries, kinds, (5, 2, 3, 4), strict=True):
        source = opened(entry, **(options if kind is CocoCaptions else {}))
        assert type(source) is kind
        assert len(source) == size
    assert type(opened(tmp_path / "cc/*.tar")) is ShardSource
    assert len(opened(tmp_path / "cc/00001.tar")) == 3
    assert len(opened(f"{tmp_path}/{{cc/00000.tar,cc/00001.tar}}")) == 5
    assert type(opened(table(tmp_path / "u.CSV"))) is TableSource


@pytest.mark.parametrize(
    ("kind", "write", "options"),
    [
        ("webdataset", lambda path: write_shard(path, pairs(2)), {}),
        ("csv", table, {}),
        ("coco", lambda path: official(path.parent)[1].rename(path), {"images": "train2017"}),
    ],
)
def test_a_type_overrules_the_form(tmp_path, kind, write, options):
    path = tmp_path / "data.any"
    write(path)
    options = {name: str(tmp_path / value) for name, value in options.items()}
    with pytest.raises(ValueError, match=r"data.train_data: expected a folder of pictures, .*data\.any'"):
        opened(path)
    assert len(opened(path, dataset_type=kind, **options)) in (2, 4)


def test_a_type_holds_for_every_entry(tmp_path):
    first, second = table(tmp_path / "a.json"), table(tmp_path / "b.csv")
    assert len(opened(f"{first}::{second}", dataset_type="csv")) == 4


def test_settings_reach_the_sources(tmp_path, monkeypatch):
    columns = ("image path", "text")
    file = table(tmp_path / "t.csv", separator=";", columns=columns)
    keys = {"csv_img_key": columns[0], "csv_caption_key": columns[1]}
    assert opened(file, csv_separator=";", **keys)[1].caption == "row 1"
    tabs = table(tmp_path / "u.csv", separator="\t")
    assert len(opened(tabs, csv_separator="\\t")) == 2
    images, annotations = karpathy(tmp_path)
    options = {"images": str(images)}
    assert [len(opened(annotations, **options)), len(opened(annotations, restval=True, **options))] == [2, 4]
    assert opened(annotations, split="test", **options)[0].caption == "test 0"
    assert opened(annotations, one_per_image=True, **options)[0].captions == ("train 0", "train 1")
    folder = shards(tmp_path / "cc")
    opened(folder / "*.tar", index_folder=str(tmp_path / "indexes"))
    assert len(list((tmp_path / "indexes").iterdir())) == 2
    assert not list(folder.glob("*.index"))
    for entry in (file, annotations, folder / "*.tar", own_folder(tmp_path / "own")):
        given = (keys | {"csv_separator": ";"}) if entry == file else {}
        given |= options if entry == annotations else {}
        with pytest.raises(SampleError, match="expected at most 575 pixels, got 24 x 24"):
            opened(entry, max_pixels=575, **given)[0]
    (tmp_path / "t_pictures/1.png").unlink()
    assert len(opened(file, check_files=False, csv_separator=";", **keys)) == 2
    with pytest.raises(FileNotFoundError, match=r"data.train_data: .*t_pictures/1\.png.*check_files False"):
        opened(file, csv_separator=";", **keys)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(opened("~/own")) == 3


def test_scenes():
    scenes = make_source(DataConfig(dataset_type="scenes", seed=3), MODEL)
    assert isinstance(scenes, SceneSource)
    assert (len(scenes), scenes.seed, scenes.size, scenes.split) == (8192, 3, 32, "train")


def test_stamps(stamp_root):
    config = DataConfig(dataset_type="stamps", train_data=str(stamp_root), train_num_samples=7)
    stamps = make_source(config, MODEL)
    assert isinstance(stamps, StampSource)
    assert (len(stamps), stamps.size, stamps.split) == (7, 32, "train")
    held_out = make_held_out(config, MODEL, 5)
    assert isinstance(held_out, StampSource)
    assert (len(held_out), held_out.split) == (5, "val")
    assert describe(stamps) == "7 pairs: 7 scenes of stamps"


def test_held_out_pictures(tmp_path):
    held_out = make_held_out(DataConfig(dataset_type="scenes", train_num_samples=20), MODEL, 5)
    assert isinstance(held_out, SceneSource)
    assert (len(held_out), held_out.split) == (5, "val")
    assert make_held_out(DataConfig(train_data=str(tmp_path / "nowhere")), MODEL, 5) is None
    assert make_held_out(DataConfig(dataset_type="synthetic"), MODEL, 5) is None
    config = DataConfig(train_data=str(own_folder(tmp_path / "own")))
    with pytest.raises(ValueError, match="split: expected train with dataset_type 'auto', got 'val'"):
        make_source(config, MODEL, "val")


def test_synthetic_pairs_fit_the_model():
    source = make_source(DataConfig(dataset_type="synthetic", train_num_samples=50), MODEL)
    assert isinstance(source, Synthetic)
    assert len(source) == 50
    assert source[0].image.shape == (32, 32, 3)
    captions = {source[index].caption for index in range(50)}
    assert len(captions) == len(WORDS)
    assert tokenizer_for(MODEL.text)(sorted(captions)).shape == (8, 12)
    other = make_source(DataConfig(dataset_type="synthetic"), small_config(text__vocabulary=()))
    assert len(other) == 8192
    assert len({other[index].caption for index in range(50)}) > 40


# --- several


def test_all_pairs_of_all_sources_are_shown_once(tmp_path):
    entries, options = every_kind(tmp_path)
    source = opened("::".join(entries), **options)
    assert isinstance(source, Mixture)
    assert len(source) == 14
    names = Counter(sample_name(source, index) for index in range(14))
    cc, own = f"{tmp_path}/cc", f"{tmp_path}/own"
    expected = Counter(f"{cc}/00000.tar/{number:05d}" for number in range(2))
    expected += Counter(f"{cc}/00001.tar/{number:05d}" for number in range(10, 13))
    expected += Counter(f"{tmp_path}/t_pictures/{number}.png" for number in range(2))
    expected += Counter(f"{own}/{number}.png" for number in range(3))
    expected += Counter({f"{tmp_path}/train2017/9.jpg": 2, f"{tmp_path}/train2017/7.jpg": 2})
    assert names == expected
    found = Counter(container(name) for name in names.elements())
    assert found == {
        f"{cc}/00000.tar": 2,
        f"{cc}/00001.tar": 3,
        f"{tmp_path}/t_pictures": 2,
        own: 3,
        f"{tmp_path}/train2017": 4,
    }
    assert describe(source) == (
        "14 pairs: 5 in 2 shards, 2 rows of t.tsv, 3 pictures in own, 4 captions of captions.json"
    )


def test_factors(tmp_path):
    entries = f"{own_folder(tmp_path / 'a', 10)}::{own_folder(tmp_path / 'b', 4)}"
    source = opened(entries, train_data_upsampling_factors="0.5::2")
    assert isinstance(source, Mixture)
    assert source.counts == [5, 8]
    folders = [container(sample_name(source, index)).rpartition("/")[2] for index in range(13)]
    assert Counter(folders) == {"a": 5, "b": 8}
    assert describe(source) == "13 pairs per epoch: 10 pictures in a x 0.5, 4 pictures in b x 2"
    assert opened(entries, train_data_upsampling_factors="0.5::2", train_num_samples=6).counts == [2, 4]
    single = opened(tmp_path / "a", train_data_upsampling_factors="1.5")
    assert isinstance(single, Mixture)
    assert len(single) == 15
    with pytest.raises(ValueError, match="upsampling_factors: expected factors that .* got '0.01'"):
        opened(tmp_path / "a", train_data_upsampling_factors="0.01")


def test_epochs_go_on_through_the_rest(tmp_path):
    config = DataConfig(train_data=str(own_folder(tmp_path / "a", 6)), train_num_samples=2, seed=5)
    source = make_source(config, MODEL)
    assert isinstance(source, Mixture)
    assert source.seed == 5
    epochs = [[sample_name(source.at_epoch(epoch), index) for index in (0, 1)] for epoch in range(3)]
    assert len({name for epoch in epochs for name in epoch}) == 6
    assert describe(source) == "2 pairs per epoch: 6 pictures in a x 0.333"
    assert type(opened(tmp_path / "a", train_num_samples=6)) is FolderSource


def test_more_samples_than_there_are(tmp_path):
    folder, own = shards(tmp_path / "cc"), own_folder(tmp_path / "own")
    entries = f"{folder}/*.tar::{own}"
    message = (
        r"data.train_num_samples: expected at most 8, the pairs found \(5 in 2 shards, 3 pictures in own\)"
    )
    with pytest.raises(ValueError, match=message + ", got 9; leave it 0 to count them, or look for missing"):
        opened(entries, train_num_samples=9)
    assert len(opened(entries, train_num_samples=8)) == 8
    factors = {"train_data_upsampling_factors": "1::4"}
    with pytest.raises(ValueError, match=r"at most 17, .*in own, times 1::4\), got 18"):
        opened(entries, train_num_samples=18, **factors)
    assert len(opened(entries, train_num_samples=17, **factors)) == 17


# --- where a sample comes from


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("/data/cc3m/00000.tar/000001234", "/data/cc3m/00000.tar"),
        ("/data/00000.tar/images/deep/12", "/data/00000.tar"),
        ("/data/coco/train2014/x.jpg", "/data/coco/train2014"),
        ("/data/x.tarred/y.jpg", "/data/x.tarred"),
        ("/x.jpg", "/"),
        ("SceneSource[12]", ""),
        ("", ""),
    ],
)
def test_containers(key, expected):
    assert container(key) == expected


def test_names_are_the_keys_of_errors(tmp_path):
    """So that damaged samples are counted where the good ones are."""
    entries, options = every_kind(tmp_path)
    (tmp_path / "own/1.png").write_bytes(b"broken")
    (tmp_path / "t_pictures/0.png").write_bytes(b"broken")
    (tmp_path / "train2017/9.jpg").unlink()
    write_shard(
        tmp_path / "cc/00001.tar", [*pairs(1), ("x/y.png", b"broken"), ("x/y.txt", "a"), *pairs(1, 9)]
    )
    source = opened("::".join(entries), check_files=False, **options)
    damaged = {}
    for index in range(len(source)):
        try:
            source[index]
        except SampleError as error:
            damaged[sample_name(source, index)] = error.key
    assert all(name == key for name, key in damaged.items())
    damaged = [name.removeprefix(f"{tmp_path}/") for name in damaged]
    expected = ["own/1.png", "t_pictures/0.png", "cc/00001.tar/x/y", "train2017/9.jpg"]
    assert sorted([*expected, "train2017/7.jpg"]) == sorted(damaged)  # the last has an empty caption
    assert sample_name(SceneSource(3), 2) == "SceneSource[2]"
    with pytest.raises(IndexError, match="index: expected 0 to 13, got 14"):
        sample_name(source, 14)


def test_descriptions(tmp_path):
    write_shard(tmp_path / "a.tar", pairs(1))
    assert describe(opened(tmp_path / "a.tar")) == "1 pair: 1 in 1 shard"
    images, annotations = karpathy(tmp_path)
    source = opened(annotations, images=str(images), one_per_image=True, restval=True)
    assert describe(source) == "2 pairs: 2 pictures of dataset.json"
    assert describe(make_source(DataConfig(dataset_type="scenes"), MODEL)) == "8,192 pairs: 8,192 scenes"
    assert describe(Synthetic(2_967_012, 8)) == "2,967,012 pairs: 2,967,012 of Synthetic"


def test_stored_segments_are_read(tmp_path):
    stored = SuperpixelConfig(kind="stored")
    entries = [own_folder(tmp_path / name, segments=True) for name in "ab"]
    source = opened("::".join(map(str, entries)), superpixels=stored)
    assert all(np.array_equal(source[index].segments, np.eye(24)) for index in range(6))
    own_folder(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"data.train_data: .*0\.segments\.png' beside .*/c/0\.png"):
        opened(tmp_path / "c", superpixels=stored)


def test_public_names():
    from segclip_fast import data

    for name in data.__all__:
        assert getattr(data, name) is not None
    assert data.make_source is make_source
    assert data.SampleError is SampleError
