"""Tar shards: pairs found and read as promised, damaged samples named, the index kept and renewed."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from segclip_fast.data import shard_index
from segclip_fast.data.scenes import make_scene
from segclip_fast.data.shard_index import expand_braces
from segclip_fast.data.shards import SampleError, ShardSource


def picture(seed=0, size=24, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_scene(seed, size).image).save(file, kind)
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a picture of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def write_shard(path, members, form=tarfile.GNU_FORMAT):
    """Members as (name, bytes or text)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def pairs(count, first=0):
    for number in range(first, first + count):
        yield f"{number:05d}.png", picture(number)
        yield f"{number:05d}.txt", f"caption {number}\n"


def same(first, second) -> bool:
    return first.caption == second.caption and np.array_equal(first.image, second.image)


class Counted(Dataset):
    """A source whose unusable samples become their errors, as a training loop would do it."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            return self.source[index]
        except SampleError as error:
            return error


def test_pairs_of_every_kind(tmp_path):
    grey = io.BytesIO()
    Image.fromarray(make_scene(5, 24).image).convert("L").save(grey, "JPEG")
    write_shard(
        tmp_path / "a.tar",
        [
            ("x/b.JPG", grey.getvalue()),
            ("x/c.webp", picture(2, kind="WEBP")),
            ("v1.2/c.d.e.txt", "no picture: the ending is d.e.txt"),
            ("x/c.json", json.dumps({"caption": "json says"})),
            ("x/b.txt", "\ufeff  a \n zebra\t\n"),
            ("x/b.json", json.dumps({"caption": "not taken"})),
            ("v1.2/d.jpg", picture(3)),  # a PNG after all
            ("v1.2/d.json", json.dumps({"caption": "caf\u00e9 \ud83d", "url": "u"})),
            ("./._e.png", picture(4)),
            ("f.npy", b"123"),
            ("g.png", b"old"),
            ("g.txt", "g"),
            ("g.png", picture(6)),
        ],
    )
    source = ShardSource(tmp_path / "a.tar")
    assert source.shards == [str(tmp_path / "a.tar")]
    assert list(source.keys) == [f"{tmp_path}/a.tar/{key}" for key in ("x/b", "x/c", "v1.2/d", "g")]
    assert [source[number].caption for number in range(4)] == ["a zebra", "json says", "caf\u00e9 ?", "g"]
    assert source[0].image.shape == (24, 24, 3)
    assert np.array_equal(source[2].image, make_scene(3, 24).image)
    assert np.array_equal(source[-1].image, make_scene(6, 24).image)
    assert source.missing == {}
    with pytest.raises(IndexError, match="index: expected 0 to 3, got 4"):
        source[4]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_names(tmp_path, form):
    """They take further headers, in between of which the data must not be looked for."""
    key = "/".join(["k\u00e9y" * 20] * 4)
    write_shard(tmp_path / "a.tar", [(f"{key}.txt", "far"), *pairs(2), (f"{key}.png", picture(9))], form)
    for _ in range(2):  # walked, then from the index file
        source = ShardSource(tmp_path / "a.tar")
        assert list(source.keys) == [f"{tmp_path}/a.tar/{name}" for name in (key, "00000", "00001")]
        assert source[0].caption == "far"
        assert np.array_equal(source[0].image, make_scene(9, 24).image)
        assert same(source[2], ShardSource(tmp_path / "a.tar")[2])


DAMAGED = {
    "cut": (picture(1, 64, "JPEG")[:-300], "x", "picture: expected a complete picture, not decodable"),
    "huge": (claims(100_000, 100_000), "x", "picture: expected at most 64000000 pixels, got more"),
    "large": (claims(9000, 8000), "x", "picture: expected at most 64000000 pixels, got 9000 x 8000"),
    "text": (b"<html>404</html>", "x", "picture: expected one of .*got b'<html>404"),
    "none": (b"", "x", "picture: expected one of"),
    "gif": (picture(1, kind="GIF"), "x", "picture: expected one of .*GIF89a|GIF87a"),
    "empty": (picture(), " \n", "caption: expected text, got none"),
    "void": (picture(), "", "caption: expected text, got none"),
    "latin": (picture(), b"caf\xe9", "caption: expected UTF-8 text"),
}


def damaged_source(tmp_path):
    """Three shards of 60 whole pairs; of two a part is damaged, and two keys are halves."""
    for shard in range(3):
        members = list(pairs(60, 100 * shard))
        if shard < 2:
            for name, (data, text, _) in DAMAGED.items():
                members[20:20] = [(f"{name}.jpg", data), (f"{name}.txt", text)]
            members += [("half.jpg", picture()), ("other.txt", "x")]
        write_shard(tmp_path / f"s-{shard:03d}.tar", members)
    return ShardSource(f"{tmp_path}/s-{{000..002}}.tar", count=3)


def test_damaged_samples_are_named_and_the_others_read(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "segclip_fast"):
        source = damaged_source(tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"4 keys of 2 shards lack caption or picture (2 in {source.shards[0]}): left out"]
    assert source.missing == {source.shards[0]: 2, source.shards[1]: 2}
    assert len(source) == 180 + 2 * len(DAMAGED)
    bad = dict.fromkeys(DAMAGED, 0)
    for index, key in enumerate(source.keys):
        name = key.rpartition("/")[2]
        if name not in DAMAGED:
            sample = source[index]
            assert sample.caption == f"caption {int(name)}"
            assert np.array_equal(sample.image, make_scene(int(name), 24).image)
            continue
        with pytest.raises(SampleError, match=DAMAGED[name][2]) as caught:
            source[index]
        assert caught.value.key == key
        assert str(caught.value) == f"{key}: {caught.value.reason}"
        bad[name] += 1
    assert set(bad.values()) == {2}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_the_same(tmp_path, method):
    """Descriptors are open before the fork, and samples are read in another order than they lie."""
    source = damaged_source(tmp_path)
    direct = [Counted(source)[index] for index in range(len(source))]
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    loader = DataLoader(Counted(source), None, sampler=order, num_workers=2, multiprocessing_context=method)
    for index, found in zip(order, loader, strict=True):
        if isinstance(direct[index], SampleError):
            assert type(found) is SampleError
            assert (found.key, found.reason) == (direct[index].key, direct[index].reason)
        else:
            assert same(found, direct[index])


def test_a_sample_error_leaves_a_worker_as_one(tmp_path):
    write_shard(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", "x")])
    loaded = iter(DataLoader(ShardSource(tmp_path / "a.tar"), None, num_workers=1))
    with pytest.raises(SampleError, match="picture: expected one of"):
        next(loaded)
    assert not list(loaded)  # or its worker is waited for


def test_threads_share_a_source(tmp_path):
    write_shard(tmp_path / "a.tar", pairs(40))
    source = ShardSource(tmp_path / "a.tar")
    with ThreadPoolExecutor(4) as pool:
        for index, sample in enumerate(pool.map(source.__getitem__, range(40))):
            assert sample.caption == f"caption {index}"
            assert np.array_equal(sample.image, make_scene(index, 24).image)


def test_pickled_sources_read_on(tmp_path):
    write_shard(tmp_path / "a.tar", pairs(3))
    source = ShardSource(tmp_path / "a.tar")
    copy = pickle.loads(pickle.dumps(source))
    assert same(copy[1], source[1])
    assert list(copy.keys) == list(source.keys)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("{", "expected a JSON file"),
        ("[" * 100_000, "expected a JSON file"),
        ("[1]", 'expected a string in the JSON field "caption", got a JSON list'),
        ('{"text": "x"}', 'expected a string in the JSON field "caption", got NoneType'),
        ('{"caption": " "}', "expected text, got none"),
    ],
    ids=["cut", "deep", "list", "other", "empty"],
)
def test_unusable_json(tmp_path, caption, reason):
    write_shard(tmp_path / "a.tar", [("a.png", picture()), ("a.json", caption)])
    with pytest.raises(SampleError, match=f"a.tar/a: caption: {reason}"):
        ShardSource(tmp_path / "a.tar")[0]


def test_the_pixel_limit_can_be_set(tmp_path):
    write_shard(tmp_path / "a.tar", pairs(1))
    assert ShardSource(tmp_path / "a.tar", max_pixels=24 * 24)[0].image.shape == (24, 24, 3)
    with pytest.raises(SampleError, match="expected at most 575 pixels, got 24 x 24"):
        ShardSource(tmp_path / "a.tar", max_pixels=575)[0]
    with pytest.raises(ValueError, match="max_pixels: expected a positive number, got 0"):
        ShardSource(tmp_path / "a.tar", max_pixels=0)


@pytest.fixture
def walks(monkeypatch):
    """The shards whose headers were read."""
    seen = []
    walk = shard_index._walk

    def counted(shard, status):
        seen.append(shard.name)
        return walk(shard, status)

    monkeypatch.setattr(shard_index, "_walk", counted)
    return seen


def test_the_index_is_made_once_and_anew_when_stale(tmp_path, walks):
    shard = write_shard(tmp_path / "a.tar", pairs(3))
    first = ShardSource(shard)
    again = ShardSource(tmp_path / "*")  # the index file is no shard
    assert walks == ["a.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]
    assert list(again.keys) == list(first.keys)
    assert all(same(again[index], first[index]) for index in range(3))
    time = shard.stat().st_mtime_ns
    write_shard(shard, [*pairs(3, 10)])  # the same size
    os.utime(shard, ns=(time, time + 1))
    with pytest.raises(ValueError, match=r"shard: expected .*a\.tar' as it was indexed, got a changed file"):
        first[0]
    assert ShardSource(shard)[0].caption == "caption 10"
    write_shard(shard, pairs(40, 20))
    os.utime(shard, ns=(time, time + 1))  # the same time
    assert len(ShardSource(shard)) == 40
    assert walks == ["a.tar"] * 3


def test_a_damaged_index_is_made_anew(tmp_path, walks, caplog):
    shard = write_shard(tmp_path / "a.tar", pairs(2))
    keys, index = list(ShardSource(shard).keys), tmp_path / "a.tar.index"
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    variants = [b"", b"junk", whole[:31], whole[:-1], whole + b"x"]
    for place in rng.choice(len(whole), 40, replace=False):
        variants.append(
            whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1 :]
        )
    for data in variants:
        index.write_bytes(data)
        walks.clear()
        assert list(ShardSource(shard).keys) == keys
        assert walks == ["a.tar"]
        assert index.read_bytes() == whole
    assert f"the index of {shard} is damaged and is made anew" in caplog.text


def test_an_index_of_another_version_is_made_anew(tmp_path, walks, monkeypatch):
    shard = write_shard(tmp_path / "a.tar", pairs(1))
    monkeypatch.setattr(shard_index, "_VERSION", 0)
    ShardSource(shard)
    monkeypatch.undo()
    assert shard_index._stored(tmp_path / "a.tar.index", shard) is None
    assert len(ShardSource(shard)) == 1


def test_index_folder_and_where_nothing_can_be_written(tmp_path, walks):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", pairs(2, 10 * (folder == "y")))
    for _ in range(2):
        source = ShardSource(f"{tmp_path}/{{y,x}}/0.tar", index_folder=tmp_path / "new" / "indexes")
        assert [source[index].caption for index in (0, 2)] == ["caption 10", "caption 0"]
    assert len(walks) == len(list((tmp_path / "new" / "indexes").iterdir())) == 2
    assert not list(tmp_path.rglob("*.tar.index"))
    (tmp_path / "file").write_text("")
    source = ShardSource(tmp_path / "x" / "0.tar", index_folder=tmp_path / "file")
    assert source[1].caption == "caption 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "x", "y"]


def test_an_index_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "a.tar", pairs(2))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    assert len(ShardSource(shard)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_braces():
    assert expand_braces("a-{08..11}.tar") == [f"a-{number}.tar" for number in ("08", "09", "10", "11")]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{000..10}")[-1] == "010"
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{x{1..2},y}") == ["x1", "y", "x2", "y"]
    assert expand_braces("{a}.{}.tar") == ["{a}.{}.tar"]
    assert len(expand_braces("cc3m-{00000..00331}.tar")) == 332
    for unusable in ("{3..1}", "{0..1000000}"):
        with pytest.raises(ValueError, match="patterns: expected a range"):
            expand_braces(unusable)


def test_patterns(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"s{number}.tar", pairs(1, number))
    write_shard(tmp_path / "{1..2}.tar", pairs(1, 7))
    paths = [f"{tmp_path}/s{number}.tar" for number in range(3)]
    assert ShardSource(f"{tmp_path}/s*.tar").shards == paths
    assert ShardSource([paths[2], f"{tmp_path}/s{{0..2}}.tar"]).shards == [paths[2], *paths[:2]]
    assert ShardSource(tmp_path / "{1..2}.tar")[0].caption == "caption 7"
    with pytest.raises(FileNotFoundError, match=r"expected 5 shards by .*got none at .*s3\.tar' and 1 more"):
        ShardSource(f"{tmp_path}/s{{0..4}}.tar")
    with pytest.raises(FileNotFoundError, match=r"expected 1 shards by .*got none at .*t\*\.tar'$"):
        ShardSource([paths[0], f"{tmp_path}/t*.tar"])
    with pytest.raises(ValueError, match="patterns: expected 4 shards, got 3"):
        ShardSource(f"{tmp_path}/s*.tar", count=4)
    with pytest.raises(ValueError, match=r"patterns: expected at least one path, got \[\]"):
        ShardSource([])


def test_what_is_no_shard(tmp_path):
    shard = tmp_path / "a.tar"
    whole = write_shard(shard, pairs(3)).read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(shard, "x.png")
    with pytest.raises(ValueError, match=r"shard: expected a whole, uncompressed tar file, got .*a\.tar\.gz"):
        ShardSource(tmp_path / "a.tar.gz")
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[3].offset
    broken = bytearray(whole)
    broken[header + 100] ^= 1  # a checksum is wrong, and tarfile would take that for the end
    cuts = [whole[:size] for size in (0, 700, header - 1, header, header + 100, header + 512)]
    for data in (*cuts, b"some text" * 200, bytes(broken)):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard: expected a whole.* tar file, got .*a\.tar'"):
            ShardSource(shard)
        assert not (tmp_path / "a.tar.index").exists()
    write_shard(shard, [("a.png", picture()), ("b.txt", "b")])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"patterns: expected pairs .*none in 1 shards"):
            ShardSource(shard)


def test_a_header_that_leads_back_to_itself(tmp_path):
    """A negative size could keep the walk going for ever."""
    entry = tarfile.TarInfo("b.png")
    entry.size = -512
    whole = write_shard(tmp_path / "a.tar", [("a.txt", "a")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1024] + entry.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ValueError, match=r"shard: expected a whole.* tar file, got .*a\.tar'"):
        ShardSource(tmp_path / "a.tar")


def test_a_shard_that_has_gone(tmp_path):
    shard = write_shard(tmp_path / "a.tar", pairs(1))
    source = ShardSource(shard)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        source[0]
