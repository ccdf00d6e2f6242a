"""The folder source: pictures, captions and label maps read as promised, and errors that name the file."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import assert_same_weights, quick

from segclip_fast.config import DataConfig, SuperpixelConfig
from segclip_fast.data.folder import FolderSource
from segclip_fast.data.images import load_segments
from segclip_fast.data.pipeline import PairDataset, make_source
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
    config = quick(tmp_path / "run", data=DataConfig(source="folder", root=str(tmp_path)))
    datasets = [PairDataset(FolderSource(tmp_path), config.data, config.model, seed) for seed in (1, 1, 2)]
    drawn = [[dataset[position].caption for position in range(30)] for dataset in datasets]
    assert set(drawn[0]) == {"a zebra", "a lava", "a grass"}
    assert drawn[0] == drawn[1] != drawn[2]
    assert [datasets[1][position].caption for position in (29, 7)] == [drawn[0][29], drawn[0][7]]
    sample = datasets[0][7]
    assert torch.equal(sample.tokens, datasets[0].tokenize([sample.caption], datasets[0].tokens)[0])


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
    picture = write(tmp_path, "a.png", "\n \n", grid(size=24))
    with pytest.raises(ValueError, match=r"captions: expected at least one non-empty line.*a\.txt"):
        FolderSource(tmp_path)[0]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"captions: expected UTF-8 text, got .*a\.txt"):
        FolderSource(tmp_path)[0]
    (tmp_path / "a.txt").write_text("a zebra")
    with pytest.raises(
        ValueError, match=r"segments: expected \(48, 48\), .*a\.png, got \(24, 24\) in .*a\.segments\.png"
    ):
        FolderSource(tmp_path, segments=True)[0]
    source = FolderSource(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions: expected an existing text file, got .*a\.txt"):
        source[0]
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"picture: expected .*a\.png"):
        source[0]


def folder_run(tmp_path, **changes):
    root = tmp_path / "pictures"
    for number in range(6):
        write(
            root, f"{number}.png", "a zebra\na photo of a lava" if number % 2 else "a grass", grid(), number
        )
    stored = SuperpixelConfig(kind="stored")
    data = DataConfig(source="folder", root=str(root), superpixels=stored)
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
    train(dataclasses.replace(parts, resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_stored_masks_reach_the_batch(tmp_path):
    config = folder_run(tmp_path)
    data = dataclasses.replace(config.data, crop_area=(1.0, 1.0))
    dataset = PairDataset(make_source(data, config.model), data, config.model, 0)
    shrunk = grid()[np.arange(32) * 48 // 32][:, np.arange(32) * 48 // 32]
    assert np.array_equal(dataset[0].superpixels, patch_labels(shrunk, 8))


def test_settings_of_a_folder(tmp_path):
    config = folder_run(tmp_path)
    with pytest.raises(ValueError, match="eval_every: expected 0 with data.source 'folder'"):
        dataclasses.replace(config, eval_every=5)
    data = dataclasses.replace(config.data, root="")
    with pytest.raises(ValueError, match="data.root: expected the folder of the pictures, got ''"):
        make_source(data, config.model)
