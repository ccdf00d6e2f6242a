"""Sources that cannot be opened: every error names the setting, and what it found."""

from __future__ import annotations

import json

import pytest
from small import small_config
from test_caption_files import karpathy
from test_opening import MODEL, opened, own_folder, shards, table

from segclip_fast.config import DataConfig, SuperpixelConfig
from segclip_fast.data.opening import make_source


@pytest.fixture
def root(tmp_path):
    """A folder, a table, and things that are no data."""
    own_folder(tmp_path / "own")
    table(tmp_path / "t.csv")
    (tmp_path / "bare").mkdir()
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    return tmp_path


def refused(root, error, train_data, settings, message):
    placed = {"train_data": train_data, **settings}
    placed = {
        name: value.replace("ROOT", str(root)) if isinstance(value, str) else value
        for name, value in placed.items()
    }
    with pytest.raises(error, match=message) as caught:
        make_source(DataConfig(**placed), MODEL)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("train_data", "settings", "message"),
    [
        ("ROOT/nowhere", {}, "data.train_data: expected a folder .*nowhere', which does not exist"),
        ("ROOT/nowhere", {"dataset_type": "stamps"}, "data.train_data: expected .*nowhere"),
        ("ROOT/nowhere", {"dataset_type": "folder"}, "data.train_data: expected the folder .*nowhere"),
        ("ROOT/{0..2}.tar", {}, r"data.train_data: expected 3 shards .*/0\.tar'"),
        ("ROOT/none.csv", {}, r"data.train_data: expected an existing file, got '.*none\.csv'"),
        ("ROOT/none.json", {"images": "ROOT"}, r"data.train_data: .* got '.*none\.json'"),
        (
            "ROOT/x.json",
            {"images": "ROOT/nowhere"},
            r"data.images: expected the folder of the pictures, got '.*nowhere' \(in '.*x\.json'\)",
        ),
        ("ROOT/bare", {}, "data.train_data: expected pictures .*bare"),
        ("ROOT/own::ROOT/bare", {}, "data.train_data: expected pictures .*bare"),
    ],
)
def test_what_does_not_exist(root, train_data, settings, message):
    refused(root, FileNotFoundError, train_data, settings, message)


@pytest.mark.parametrize(
    ("train_data", "settings", "message"),
    [
        ("", {}, r"data.train_data: expected a folder of pictures, .*{00000\.\.00331}\.tar.*, got ''"),
        ("::", {"dataset_type": "webdataset"}, "data.train_data: expected .*, got '::'"),
        ("", {"dataset_type": "stamps"}, "data.train_data: expected the folder of the stamps, got ''"),
        ("ROOT/x.tar.gz", {}, r"data.train_data: .* got .*x\.tar\.gz'; dataset_type says what it is"),
        ("s3://bucket/x", {}, "data.train_data: .* got 's3://bucket/x'"),
        ("ROOT/{3..2}.tar", {}, r"data.train_data: .* got '{3..2}' \(in '.*"),
        ("ROOT/x.json", {}, r"data.images: expected the folder .*x\.json', got ''"),
        ("ROOT/x.json", {"images": "ROOT"}, r"data.train_data: expected captions in .*x\.json"),
        ("ROOT/own", {"split": "val"}, "data.split: expected its default without COCO"),
        ("ROOT/own", {"restval": True}, "data.restval: expected its default without COCO"),
        ("ROOT/t.csv", {"one_per_image": True}, "data.one_per_image: expected its default without COCO"),
        (
            "ROOT/own::ROOT/t.csv",
            {"superpixels": SuperpixelConfig(kind="stored")},
            r"data.superpixels.kind: expected felzenszwalb or slic with '.*t\.csv', where no .* got 'stored'",
        ),
        (
            "ROOT",
            {"dataset_type": "stamps", "train_data_upsampling_factors": "2"},
            "data.train_data_upsampling_factors: expected none with dataset_type 'stamps', got '2'",
        ),
        ("ROOT/t.csv", {"csv_img_key": "url"}, r"data.train_data: expected columns \['url'\].*t\.csv"),
        ("ROOT/t.csv", {"csv_separator": "ab"}, r"data.csv_separator: expected one .*\(in '.*t\.csv'\)"),
        ("ROOT/t.csv", {"dataset_type": "webdataset"}, r"data.train_data: shard: expected .*t\.csv"),
    ],
)
def test_what_cannot_be_used(root, train_data, settings, message):
    refused(root, ValueError, train_data, settings, message)


def test_image_sizes_of_generated_pairs():
    with pytest.raises(ValueError, match="model.vision.image_size: expected .* pixels, got 8"):
        make_source(DataConfig(dataset_type="scenes"), small_config(vision__image_size=8))


def test_splits_are_named(tmp_path):
    images, annotations = karpathy(tmp_path)
    options = {"images": str(images)}
    with pytest.raises(
        ValueError, match=r"data.split: expected one of \['restval', .*, got 'dev' \(in '.*json'"
    ):
        opened(annotations, split="dev", **options)
    annotations.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="data.split: expected one of"):
        opened(annotations, **options)


@pytest.mark.parametrize("kind", ["auto", "folder", "webdataset"])
def test_a_folder_of_shards_is_not_a_folder_of_pictures(tmp_path, kind):
    folder = shards(tmp_path / "cc")
    (folder / "00000_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data.train_data: expected '.*/cc/\*\.tar' for the shards in it"):
        opened(folder, dataset_type=kind)
    if kind != "webdataset":
        own_folder(folder / "own")
        assert len(opened(folder, dataset_type=kind)) == 3
