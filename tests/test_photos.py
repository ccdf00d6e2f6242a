"""Many photos: which files count, results in order, broken files, bounded batches, threads that end."""

from __future__ import annotations

import itertools
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
from photo_folders import truncated, write
from PIL import Image
from small import WORDS, small_model
from test_windows import COLOURS, ColourModel, painted

from segclip_fast.evaluation import photos
from segclip_fast.evaluation.photos import THREADS, find_photos, segment_files, segment_folder
from segclip_fast.evaluation.segmentation import segment_batch

LABELS = ["red", "blue", "green"]


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


@pytest.fixture(autouse=True)
def _threads_end():
    assert decoders() == []
    yield
    assert decoders() == []


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "photos", *(f"{i}.png" for i in range(7)))


# --- which files -------------------------------------------------------------------------------------------


def test_finds_photos_at_any_depth(tmp_path):
    root = write(tmp_path, "b.png", "a.JPG", "x/y/c.webp", "x/d.Bmp", "x/e.tif", "f.tiff", "g.jpeg")
    write(tmp_path, ".hidden.png", ".git/a.png", "x/.y/a.png")
    for name in ("notes.txt", "x/b.png.txt", "png", "x/z.gif"):
        (root / name).write_text("")
    expected = ["a.JPG", "b.png", "f.tiff", "g.jpeg", "x/d.Bmp", "x/e.tif", "x/y/c.webp"]
    assert find_photos(root) == expected
    assert find_photos(str(root)) == expected


def test_no_photos(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"folder: expected photos \(.jpg, .*, got none below"):
        find_photos(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder: expected a folder of photos, got '.*missing'"):
        find_photos(tmp_path / "missing")


def test_unreadable_folder_is_not_passed_over(folder, monkeypatch):
    (folder / "sub").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="sub"):
        find_photos(folder)


# --- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "prefetch", "workers"), [(1, 1, 1), (3, 1, 4), (2, 5, 2), (50, 2, 2)])
def test_results_in_order(folder, batch_size, prefetch, workers):
    model = ColourModel()
    options = {"batch_size": batch_size, "prefetch": prefetch, "workers": workers, "background": True}
    found = list(segment_folder(model, folder, LABELS, **options))
    assert [photo.path for photo in found] == [folder / f"{i}.png" for i in range(7)]
    for photo in found:
        (alone,) = segment_batch(model, [photo.path], LABELS, background=True)
        assert photo.error is None
        assert photo.result.names == ("background", *LABELS)
        np.testing.assert_array_equal(photo.result.labels, alone.labels)
        np.testing.assert_array_equal(photo.result.image, alone.image)


def test_a_real_model(folder):
    model = small_model().eval()
    found = list(segment_folder(model, folder, list(WORDS[3:6])))
    assert [photo.result.labels.shape for photo in found] == [(40 + 8 * i, 96) for i in range(7)]


def test_broken_photos_do_not_stop_the_others(folder):
    clean = {photo.path: photo.result for photo in segment_folder(ColourModel(), folder, LABELS)}
    truncated(folder / "3a.jpg")
    (folder / "1a.png").write_text("no picture")
    (folder / "0a.tif").write_bytes(b"")
    (folder / "2a.png").mkdir()  # a folder, which is no photo
    os.mkfifo(folder / "5a.jpg")  # reading it would wait for ever
    (folder / "6a.jpg").symlink_to("nowhere")
    found = list(segment_folder(ColourModel(), folder, LABELS, batch_size=3))
    broken = {photo.path.name: photo.error for photo in found if photo.result is None}
    assert sorted(broken) == ["0a.tif", "1a.png", "3a.jpg", "5a.jpg", "6a.jpg"]
    assert "expected a complete image" in broken["3a.jpg"]
    assert all("\n" not in error for error in broken.values())
    good = [photo for photo in found if photo.error is None]
    assert [photo.path for photo in good] == list(clean)
    for photo in good:
        np.testing.assert_array_equal(photo.result.labels, clean[photo.path].labels)
        np.testing.assert_array_equal(photo.result.scores, clean[photo.path].scores)


def test_a_batch_of_broken_photos_needs_no_model(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no picture")
    model = ColourModel()
    assert [photo.result for photo in segment_folder(model, tmp_path, LABELS)] == [None] * 3
    assert model.windows == []


def test_options_reach_the_segmenter(folder, monkeypatch):
    seen = []

    def spy(model, images, labels, **options):
        seen.append((len(images), labels, options))
        return segment_batch(model, images, labels)

    monkeypatch.setattr(photos, "segment_batch", spy)
    list(segment_folder(ColourModel(), folder, LABELS, snap=True, stride=16))
    list(segment_folder(ColourModel(), folder, LABELS, batch_size=4, window_batch=5))
    assert seen == [
        (7, tuple(LABELS), {"snap": True, "stride": 16}),
        (4, tuple(LABELS), {"batch_size": 5}),
        (3, tuple(LABELS), {"batch_size": 5}),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, "labels: expected at least one"),
        ({"labels": "red"}, "labels: expected a list"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"prefetch": 0}, "prefetch: expected"),
        ({"workers": 1.5}, "workers: expected .*, got 1.5"),
        ({"paths": "photo.png"}, "paths: expected several paths, got one: 'photo.png'"),
    ],
    ids=str,
)
def test_mistakes_are_reported_at_once(change, message):
    arguments = {"paths": ["a.png"], "labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        segment_files(ColourModel(), **arguments)


def test_missing_folder_is_reported_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of photos"):
        segment_folder(ColourModel(), tmp_path / "missing", LABELS)


def test_no_paths():
    assert list(segment_files(ColourModel(), [], LABELS)) == []


# --- memory ------------------------------------------------------------------------------------------------


def batch_sizes(monkeypatch, folder, **options) -> list[int]:
    model, sizes = ColourModel(), []

    def spy(model, images, labels, **options):
        sizes.append([image.shape[0] for image in images])
        return segment_batch(model, images, labels, **options)

    monkeypatch.setattr(photos, "segment_batch", spy)
    list(segment_folder(model, folder, LABELS, **options))
    return sizes


def test_batches_are_bounded_by_pixels(folder, monkeypatch):
    heights = [40, 48, 56, 64, 72, 80, 88]  # of photos 96 wide
    assert batch_sizes(monkeypatch, folder) == [heights]
    assert batch_sizes(monkeypatch, folder, batch_size=5) == [heights[:5], heights[5:]]
    monkeypatch.setattr(photos, "BATCH_PIXELS", 96 * 144)
    assert batch_sizes(monkeypatch, folder) == [[40, 48, 56], [64, 72], [80], [88]]
    monkeypatch.setattr(photos, "BATCH_PIXELS", 10)  # every photo is too large, and still done
    assert batch_sizes(monkeypatch, folder) == [[height] for height in heights]


def test_only_so_many_are_decoded_ahead(folder, monkeypatch):
    decoded = []
    load = photos.load_image
    monkeypatch.setattr(
        photos, "load_image", lambda path, name: decoded.append(path) or load(path, name=name)
    )
    paths = (folder / f"{i % 7}.png" for i in itertools.count())  # without end
    results = segment_files(ColourModel(), paths, LABELS, batch_size=2, prefetch=3, workers=2)
    for _ in range(5):
        next(results)  # of the third batch
    time.sleep(0.2)
    results.close()
    assert 6 <= len(decoded) <= 2 * (3 + 3)


def test_long_photo(tmp_path):
    """20000 x 200: 4 megapixels, cut into windows; no temporary of the size of all labels or windows."""
    row = painted(*[COLOURS["red"], COLOURS["blue"]] * 10, size=1000, height=1)
    Image.fromarray(np.repeat(row, 200, axis=0)).save(tmp_path / "long.png")
    tracemalloc.start()
    try:
        (photo,) = segment_folder(ColourModel(), tmp_path, LABELS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert photo.result.labels.shape == (200, 20000)
    assert photo.result.labels[100, 500::1000].tolist() == [0, 1] * 10
    assert peak < 200 * 2**20  # 12 MB of pixels, held twice; 80 MB of results
    (photo,) = segment_folder(small_model().eval(), tmp_path, list(WORDS[3:6]))
    assert photo.result.labels.shape == (200, 20000)


# --- threads -----------------------------------------------------------------------------------------------


def test_decodes_while_the_model_works(folder, monkeypatch):
    ahead = threading.Event()
    load = photos.load_image

    def note(path, name):
        if path.name == "4.png":
            ahead.set()
        return load(path, name=name)

    class Waiting(ColourModel):
        def encode_image(self, images):
            assert ahead.wait(30), "the third batch is not decoded before the first is segmented"
            return super().encode_image(images)

    monkeypatch.setattr(photos, "load_image", note)
    assert len(list(segment_folder(Waiting(), folder, LABELS, batch_size=2, prefetch=2))) == 7


def test_closing_early_ends_the_threads(folder):
    results = segment_folder(ColourModel(), folder, LABELS, batch_size=1)
    next(results)
    assert decoders()
    results.close()
    assert decoders() == []


def test_a_failing_consumer_ends_the_threads(folder):
    def consume():
        for photo in segment_folder(ColourModel(), folder, LABELS, batch_size=1):
            assert decoders()
            raise KeyError(photo.path.name)

    try:
        consume()
    except KeyError as error:
        assert error.args == ("0.png",)  # noqa: PT017  the traceback must go before the threads are counted
    assert decoders() == []


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError()], ids=repr)
def test_the_model_s_errors_are_not_the_photo_s(folder, error):
    class Failing(ColourModel):
        def encode_image(self, images):
            if len(self.windows) == 2:
                raise error
            return super().encode_image(images)

    results = segment_folder(Failing(), folder, LABELS, batch_size=1)
    assert next(results).error is None
    with pytest.raises(type(error)):
        list(results)
    assert decoders() == []


def test_no_memory_to_decode_is_not_the_photo_s_error(folder, monkeypatch):
    def fail(path, name):
        raise MemoryError

    monkeypatch.setattr(photos, "load_image", fail)
    with pytest.raises(MemoryError):
        list(segment_folder(ColourModel(), folder, LABELS))


def test_surprising_decoder_errors_are_the_photo_s(folder, monkeypatch):
    def fail(path, name):
        raise RuntimeError("bad tag\nof a damaged file")

    monkeypatch.setattr(photos, "load_image", fail)
    errors = [photo.error for photo in segment_folder(ColourModel(), folder, LABELS)]
    assert errors == ["bad tag"] * 7
