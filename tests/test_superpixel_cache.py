"""Label maps kept on disk: the same integers as without, made once, and anew where a file is unusable."""

from __future__ import annotations

import dataclasses
import errno
import logging

import numpy as np
import pytest
from PIL import Image
from small import small_config
from torch.utils.data import DataLoader, Dataset

from segclip_fast.config import DataConfig, SuperpixelConfig
from segclip_fast.data import superpixel_cache
from segclip_fast.data.pipeline import PairDataset
from segclip_fast.data.pseudo_labels import Felzenszwalb, Slic, make_segmenter
from segclip_fast.data.sample import RawSample
from segclip_fast.data.scenes import make_scene
from segclip_fast.data.superpixel_cache import CachedSegmenter

FIRST = SuperpixelConfig(scale=20, sigma=0.9, min_size=8, order="segment_first")
GRAPH = Felzenszwalb(20, 0.9, 8)


def scene(seed: int, size: int = 48) -> RawSample:
    return RawSample(make_scene(seed, size).image, f"scene {seed}")


class Counted:
    """A segmenter that counts its calls."""

    def __init__(self, segmenter=None):
        self.segmenter, self.calls = segmenter or GRAPH, 0

    def __call__(self, picture):
        self.calls += 1
        return self.segmenter(picture)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch):
    monkeypatch.setattr(superpixel_cache, "_warned", set())


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "segclip_fast")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kind", ["felzenszwalb", "slic"])
def test_the_same_integers_as_without(tmp_path, kind, warnings):
    config = dataclasses.replace(FIRST, kind=kind)
    plain = make_segmenter(config)
    kept = make_segmenter(dataclasses.replace(config, cache=str(tmp_path / "new/folder")))
    assert isinstance(plain, (Felzenszwalb, Slic))
    assert isinstance(kept, CachedSegmenter)
    for _ in range(2):
        for seed in range(6):
            found = kept(scene(seed))
            assert found.dtype == np.int64
            assert np.array_equal(found, plain(scene(seed)))
    assert len(files(tmp_path)) == 6
    assert all(path.suffix == ".png" and len(path.parent.name) == 2 for path in files(tmp_path))
    assert not warnings()


def test_a_picture_is_segmented_once_whatever_its_name(tmp_path):
    counted = Counted()
    kept = CachedSegmenter(counted, tmp_path, "k")
    first = kept(scene(1))
    again = dataclasses.replace(scene(1), caption="another", image=scene(1).image[:, ::-1][:, ::-1])
    assert np.array_equal(CachedSegmenter(counted, tmp_path, "k")(again), first)
    assert counted.calls == 1
    kept(scene(2))
    CachedSegmenter(counted, tmp_path, "other settings")(scene(1))
    for shape in ((8, 18, 3), (18, 8, 3), (12, 12, 3)):
        assert kept(RawSample(np.zeros(shape, np.uint8), "")).shape == shape[:2]
    assert counted.calls == len(files(tmp_path)) == 6


def test_every_setting_has_its_own_maps(tmp_path):
    settings = [
        FIRST,
        dataclasses.replace(FIRST, scale=30),
        dataclasses.replace(FIRST, sigma=0.5),
        dataclasses.replace(FIRST, min_size=9),
        dataclasses.replace(FIRST, precision="float32"),
        *(dataclasses.replace(FIRST, kind="slic", segments=count) for count in (9, 25)),
        dataclasses.replace(FIRST, kind="slic", segments=9, compactness=3.0),
    ]
    for number, config in enumerate(settings):
        kept = make_segmenter(dataclasses.replace(config, cache=str(tmp_path)))
        assert np.array_equal(kept(scene(0)), make_segmenter(config)(scene(0)))
        assert len(files(tmp_path)) == number + 1


def test_a_damaged_file_is_made_anew(tmp_path, warnings):
    """Whichever byte is wrong; many of them leave a PNG that Pillow reads without complaint."""
    counted = Counted()
    kept = CachedSegmenter(counted, tmp_path, "k")
    expected = kept(scene(3, 32))
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    seen = 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x24]) + whole[place + 1 :])
        assert np.array_equal(kept(scene(3, 32)), expected), place
        if counted.calls > 1:
            assert file.read_bytes() == whole
        seen += counted.calls > 1
        counted.calls = 1
    assert seen > len(whole) // 2
    for data in (b"", b"labels", whole[:-20], whole[: len(whole) // 2]):
        file.write_bytes(data)
        assert np.array_equal(kept(scene(3, 32)), expected)
    assert len(warnings()) == 1
    assert f"expected a label map kept earlier, got {str(file)!r}, made anew" in warnings()[0]


def test_a_foreign_file_is_made_anew(tmp_path):
    kept = CachedSegmenter(Counted(), tmp_path, "k")
    expected = kept(scene(0))
    (file,) = files(tmp_path)
    kept(scene(1))
    (other,) = set(files(tmp_path)) - {file}
    pictures = [np.zeros((48, 48), np.uint16), np.zeros((48, 48), np.uint8), scene(0).image]
    for foreign in pictures:
        Image.fromarray(foreign).save(file)
        assert np.array_equal(kept(scene(0)), expected)
    file.write_bytes(other.read_bytes())  # whole, and of another picture
    assert np.array_equal(kept(scene(0)), expected)
    assert file.read_bytes() != other.read_bytes()


def test_a_full_disk_is_said_once(tmp_path, monkeypatch, warnings):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    counted = Counted()
    kept = CachedSegmenter(counted, tmp_path, "k")
    first = kept(scene(0))
    with monkeypatch.context() as patch:
        patch.setattr(superpixel_cache, "write_whole", full)
        for _ in range(2):
            assert np.array_equal(kept(scene(1)), GRAPH(scene(1)))
        assert np.array_equal(kept(scene(0)), first)  # what is there still serves
    assert counted.calls == 3
    assert len(warnings()) == 1
    assert "No space left on device" in warnings()[0]
    kept(scene(1))
    kept(scene(1))
    assert counted.calls == 4


def test_a_folder_that_cannot_be_made(tmp_path, warnings):
    (tmp_path / "file").write_text("no folder")
    kept = CachedSegmenter(Counted(), tmp_path / "file", "k")
    for _ in range(2):
        assert np.array_equal(kept(scene(0)), GRAPH(scene(0)))
    assert len(warnings()) == 1
    assert "superpixels are computed again each time" in warnings()[0]


@pytest.mark.parametrize(("low", "high", "stays"), [(0, 65535, True), (0, 65536, False), (-1, 5, False)])
def test_labels_beyond_16_bits_are_not_kept(tmp_path, low, high, stays, warnings):
    labels = np.full((10, 12), low)
    labels[4:, 3:] = high
    counted = Counted(lambda _: labels)
    kept = CachedSegmenter(counted, tmp_path, "k")
    for _ in range(3):
        assert np.array_equal(kept(RawSample(np.zeros((10, 12, 3), np.uint8), "")), labels)
    assert counted.calls == (1 if stays else 3)
    assert len(warnings()) == (not stays)


class Maps(Dataset):
    """Every picture several times, so that processes meet at the same file."""

    def __init__(self, segmenter):
        self.segmenter = segmenter

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.segmenter(scene(index // 16, 64))


def test_processes_share_a_folder(tmp_path):
    kept = CachedSegmenter(GRAPH, tmp_path, "k")
    found = list(DataLoader(Maps(kept), None, num_workers=2))
    for index, labels in enumerate(found):
        assert np.array_equal(labels, GRAPH(scene(index // 16, 64)))
    assert len(files(tmp_path)) == 4  # no temporary ones either


def test_training_samples_are_the_same(tmp_path):
    """Crops differ from epoch to epoch, and the picture's label map is cut for each."""
    pictures = [scene(0, 64), scene(1, 64)]
    datasets = []
    for cache in ("", str(tmp_path)):
        data = DataConfig(dataset_type="scenes", superpixels=dataclasses.replace(FIRST, cache=cache))
        datasets.append(PairDataset(pictures, data, small_config(), 3))  # type: ignore[arg-type]
    raws = [dataclasses.replace(scene(position % 2, 64), caption="a cat") for position in range(8)]
    plain, kept = (
        [dataset.prepare(raw, position).superpixels.tolist() for position, raw in enumerate(raws)]
        for dataset in datasets
    )
    assert plain == kept
    assert plain[0] != plain[2]
    assert len(files(tmp_path)) == 2
