"""The folder source: pictures, captions and label maps read as promised, and errors that name the file."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import assert_same_weights, quick

from segclip_fast.config import DataConfig, SuperpixelConfig
from segclip_fast.data.folder import FolderSource
from segclip_fast.data.images import load_segments
from segclip_fast.data.opening import make_source
from segclip_fast.data.pipeline import PairDataset
from segclip_fast.data.sample import SampleError
from segclip_fast.data.scenes import make_scene
from segclip_fast.ops import patch_labels
from segclip_fast.training.log import read_log
from segclip_fast.training.loop import train


def write(
    root, name: str, captions: str | None = "a zebra", segments: np.ndarray | None = None, seed=0, size=48
):
    """One picture of a scene, with what is beside it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_scene(seed, size).image).save(path)
    if captions is not None:
        path.with_name(f"{path.stem}.txt").write_text(captions, encoding="utf-8")
    if segments is not None:
        Image.fromarray(segments).save(path.with_name(f"{path.stem}.segments.png"))
    return path


def grid(size=48, cell=12, dtype=np.uint8) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (rows // cell * (size // cell) + columns // cell).astype(dtype)


def test_finds_pictures_and_reads_captions(tmp_path):
    for number, name in enumerate(
        ["b/deep/x.PNG", "a.jpg", "a.b.webp", "z.jpeg", ".hidden.png", ".git/y.png"]
    ):
        write(tmp_path, name, "\ufeffa zebra \n\n  a photo of a lava\n", grid(), number)
    (tmp_path / "notes.txt").write_text("not a caption")
    source = FolderSource(tmp_path)
    assert source.pictures == ["a.b.webp", "a.jpg", "b/deep/x.PNG", "z.jpeg"]
    assert len(source) == 4
    raw = source[2]
    assert np.array_equal(raw.image, make_scene(0, 48).image)
    assert (raw.caption, raw.captions) == ("a zebra", ("a zebra", "a photo of a lava"))
    assert raw.segments is None
    assert raw.mask is None
    assert np.array_equal(FolderSource(tmp_path, segments=True)[-2].segments, grid())
    with pytest.raises(IndexError, match="index: expected 0 to 3, got 4"):
        source[4]


def test_captions_are_drawn_by_position(tmp_path):
    write(tmp_path, "a.png", "a zebra\na lava\na grass")
    config = quick(tmp_path / "run", data=DataConfig(dataset_type="folder", train_data=str(tmp_path)))
    datasets = [PairDataset(FolderSource(tmp_path), config.data, config.model, seed) for seed in (1, 1, 2)]
    drawn = [[dataset[position].facts.caption for position in range(30)] for dataset in datasets]
    assert set(drawn[0]) == {"a zebra", "a lava", "a grass"}
    assert drawn[0] == drawn[1] != drawn[2]
    assert [datasets[1][position].facts.caption for position in (29, 7)] == [drawn[0][29], drawn[0][7]]
    sample = datasets[0][7]
    assert torch.equal(sample.tokens, datasets[0].tokenize([sample.facts.caption], datasets[0].tokens)[0])


@pytest.mark.parametrize(
    "stored",
    [
        Image.fromarray(grid()),
        Image.fromarray(grid() > 4),
        Image.fromarray(grid().astype(np.uint16) * 1001),
        Image.fromarray(np.stack([grid() % 2, grid() // 2 % 2, grid() // 4], axis=-1)),
        Image.fromarray(grid()).convert("P"),
    ],
    ids=lambda picture: picture.mode,
)
def test_label_maps_of_every_kind(tmp_path, stored):
    """What is equal stays equal and what differs stays different."""
    if stored.mode == "P":
        stored.putpalette([0, 0, 0] * 256)  # the colours of a palette say nothing
        stored.putdata(grid().ravel().tolist())
    stored.save(tmp_path / "m.png")
    found = load_segments(tmp_path / "m.png")
    assert found.dtype == np.int32
    expected = (grid() > 4).astype(int) if stored.mode == "1" else grid()
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(found)) == len(np.unique(expected))
    if stored.mode in ("L", "P"):
        assert np.array_equal(found, grid())
    if stored.mode.startswith("I"):
        assert found.max() == 15 * 1001


def test_unusable_label_maps(tmp_path):
    path = tmp_path / "m.png"
    with pytest.raises(FileNotFoundError, match=r"segments: expected an existing .*m\.png"):
        load_segments(path)
    Image.fromarray(grid()).save(path, format="JPEG")
    with pytest.raises(ValueError, match=r"segments: expected a PNG file.*m\.png', JPEG of mode L"):
        load_segments(path)
    Image.fromarray(grid()).convert("RGBA").save(path)
    with pytest.raises(ValueError, match=r"m\.png', PNG of mode RGBA"):
        load_segments(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"segments: expected .*m\.png'"):
        load_segments(path)
    path.write_text("labels")
    with pytest.raises(ValueError, match=r"m\.png', not a known format"):
        load_segments(path)


def test_deep_colours_are_refused(tmp_path):
    """Pillow would cut 16 bits a channel to 8 and so join labels."""
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "m.png"), np.zeros((20, 20, 3), np.uint16))
    with pytest.raises(ValueError, match=r"m\.png', PNG of mode RGB with 16 bits"):
        load_segments(tmp_path / "m.png")


def test_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: expected the folder of the pictures, got .*nowhere"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"root: expected pictures \(.jpg.*none under"):
        FolderSource(tmp_path)
    write(tmp_path, "x/a.png", None)
    with pytest.raises(FileNotFoundError, match=r"expected the file 'a.txt' beside '.*x/a\.png'"):
        FolderSource(tmp_path)
    write(tmp_path, "x/a.png")
    FolderSource(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected the file 'a.segments.png' beside '.*x/a\.png'"):
        FolderSource(tmp_path, segments=True)


def test_broken_files_are_named(tmp_path):
    """A training run may go on without them; the key is always the picture."""
    picture = write(tmp_path, "a.png", "\n \n", grid(size=24))
    text, segments = picture.with_suffix(".txt"), tmp_path / "a.segments.png"

    def refused(source, reason):
        with pytest.raises(SampleError, match=reason) as caught:
            source[0]
        assert caught.value.key == str(picture)
        assert str(caught.value) == f"{picture}: {caught.value.reason}"

    source, with_segments = FolderSource(tmp_path), FolderSource(tmp_path, segments=True)
    refused(source, r"captions: expected at least one non-empty line.*a\.txt")
    text.write_bytes(b"caf\xe9")
    refused(source, r"captions: expected UTF-8 text, got .*a\.txt")
    text.write_text("a zebra")
    refused(with_segments, r"segments: expected \(48, 48\), .*a\.png, got \(24, 24\) in .*a\.segments\.png")
    segments.write_bytes(b"labels")
    refused(with_segments, r"segments: expected an image file, got .*a\.segments\.png")
    segments.unlink()
    refused(with_segments, r"segments: expected an existing image file, got .*a\.segments\.png")
    assert source[0].caption == "a zebra"
    text.unlink()
    refused(source, r"captions: expected an existing text file, got .*a\.txt")
    picture.write_bytes(picture.read_bytes()[:200])
    refused(source, "picture: expected a complete picture")
    picture.write_text("no picture")
    refused(source, "picture: expected one of .*'PNG'.*no picture")
    picture.unlink()
    refused(source, "picture: expected an existing file, got none")


def test_large_pictures_are_left_out(tmp_path):
    write(tmp_path, "a.png")
    assert FolderSource(tmp_path, max_pixels=48 * 48)[0].caption == "a zebra"
    with pytest.raises(SampleError, match=r"a\.png: picture: expected at most 2303 pixels, got 48 x 48"):
        FolderSource(tmp_path, max_pixels=48 * 48 - 1)[0]
    with pytest.raises(ValueError, match="max_pixels: expected a positive number, got 0"):
        FolderSource(tmp_path, max_pixels=0)


@pytest.mark.parametrize("ending", [".png", ".txt", ".segments.png"])
def test_a_failing_disk_is_no_damaged_sample(tmp_path, monkeypatch, ending):
    """It would fail for all of them."""
    write(tmp_path, "a.png", segments=grid())
    source = FolderSource(tmp_path, segments=True)
    opening = io.open

    def failing(file, *arguments, **options):
        if str(file) == str(tmp_path / f"a{ending}"):
            raise OSError(errno.EIO, "Input/output error")
        return opening(file, *arguments, **options)

    monkeypatch.setattr(io, "open", failing)
    monkeypatch.setattr(builtins, "open", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        source[0]
    assert not isinstance(caught.value, ValueError)


def folder_run(tmp_path, **changes):
    root = tmp_path / "pictures"
    for number in range(6):
        write(
            root, f"{number}.png", "a zebra\na photo of a lava" if number % 2 else "a grass", grid(), number
        )
    stored = SuperpixelConfig(kind="stored")
    data = DataConfig(train_data=str(root), superpixels=stored)
    return dataclasses.replace(quick(tmp_path / "run", data=data, device="cpu"), **changes)


def test_training_on_a_folder_with_stored_masks_resumes_exactly(tmp_path):
    """Loader workers change nothing, and there is no evaluation, for want of ground truth."""
    config = folder_run(tmp_path, output=str(tmp_path / "whole"))
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2)))
    assert len(read_log(tmp_path / "whole")) == 12
    assert not read_log(tmp_path / "whole", "evaluation")

    class StopError(Exception):
        pass

    def stop(step, _):
        if step == 6:
            raise StopError

    parts = dataclasses.replace(config, output=str(tmp_path / "parts"))
    with pytest.raises(StopError):
        train(parts, on_step=stop)
    train(dataclasses.replace(parts, resume="latest"))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_stored_masks_reach_the_batch(tmp_path):
    config = folder_run(tmp_path)
    data = dataclasses.replace(config.data, crop_area=(1.0, 1.0))
    dataset = PairDataset(make_source(data, config.model), data, config.model, 0)
    shrunk = grid()[np.arange(32) * 48 // 32][:, np.arange(32) * 48 // 32]
    assert np.array_equal(dataset[0].superpixels, patch_labels(shrunk, 8))


def test_settings_of_a_folder(tmp_path):
    config = folder_run(tmp_path)
    with pytest.raises(ValueError, match="eval_every: expected 0 without eval_dataset and held-out pictures"):
        dataclasses.replace(config, eval_every=5)
    for kind in ("auto", "folder"):
        data = dataclasses.replace(config.data, dataset_type=kind, train_data="")
        with pytest.raises(ValueError, match="data.train_data: expected a folder of pictures.*got ''"):
            make_source(data, config.model)
