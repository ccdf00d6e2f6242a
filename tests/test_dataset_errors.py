"""What a segmentation data set can be wrong in, and the error that names the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dataset_files import LAYOUTS, build, photo, reopen, save, values_of

from segclip_fast.evaluation.datasets import DATASETS, SegmentationSet, open_dataset
from segclip_fast.evaluation.label_maps import label_table, read_labels


def test_unknown_name_and_root(tmp_path):
    with pytest.raises(ValueError, match="name: expected one of voc, .*, folder, got 'imagenet'"):
        open_dataset("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="root: expected the folder of voc, got '.*nowhere'"):
        open_dataset("voc", tmp_path / "nowhere")


@pytest.mark.parametrize("name", DATASETS)
def test_nothing_unpacked(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"root: expected .*, the first one missing is '") as caught:
        open_dataset(name, tmp_path)
    pictures, masks, texts, _ = LAYOUTS[name]
    for path in (pictures[0], masks[0], *texts):
        assert path.split("/")[0] in str(caught.value)
    hints = {"coco_object": "prepare coco-object", "cityscapes": "csCreateTrainIdLabelImgs"}
    assert hints.get(name, "") in str(caught.value)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_half_unpacked(tmp_path, name, kind, which):
    build(tmp_path, name)
    path = LAYOUTS[name][kind][which]
    (tmp_path / path).unlink()
    if name == "folder":
        path = path.replace("JPG", "jpg").replace("images/deep/b.png", "images/deep/b.jpg")
    with pytest.raises(FileNotFoundError, match=rf"root: expected .* the first one missing is '{path}'"):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("voc", 1449),
        ("voc20", 1449),
        ("context", 5105),
        ("context59", 5105),
        ("coco_object", 5000),
        ("coco_stuff", 5000),
        ("ade20k", 2000),
        ("cityscapes", 500),
    ],
)
def test_a_part_is_no_data_set(tmp_path, name, images):
    with pytest.raises(
        ValueError, match=rf"root: expected the {images} images of {name}, got 2 .*partial=True"
    ):
        open_dataset(name, build(tmp_path, name))


def test_folder_needs_no_number_of_images(tmp_path):
    assert len(open_dataset("folder", build(tmp_path, "folder"))) == 2


@pytest.mark.parametrize("name", ["voc", "coco_stuff", "cityscapes", "folder"])
def test_mask_of_another_size(tmp_path, name):
    data = reopen(build(tmp_path, name), name)
    save(tmp_path / LAYOUTS[name][1][0], values_of(name)[:, :5])
    picture, mask = (LAYOUTS[name][kind][0] for kind in (0, 1))
    wanted = rf"mask: expected \(6, 9\), the \(height, width\) of {picture}, got \(6, 5\) in .*{mask}"
    with pytest.raises(ValueError, match=wanted):
        data[0]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_broken_files(tmp_path, kind, damage):
    data = reopen(build(tmp_path, "cityscapes"), "cityscapes")
    path = tmp_path / LAYOUTS["cityscapes"][kind][1]
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) - 30], "text": b"404 not found", "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{('image', 'mask')[kind]}: expected .*{path.name}"):
        data[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        data[1]


def gray_png(path: Path, bits: int) -> None:
    """A 4x1 grey PNG with fewer than 8 bits, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    row = b"\x00" + bytes(4 * bits // 8)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_masks_that_are_no_labels(tmp_path):
    table, path = label_table(3), tmp_path / "mask.png"
    save(path, np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"8-bit grey or palette, got colours in .*mask\.png"):
        read_labels(path, table)
    for bits in (2, 4):
        gray_png(path, bits)
        with pytest.raises(ValueError, match=rf"got grey with {bits} bits in .*mask\.png"):
            read_labels(path, table)
    save(tmp_path / "mask.jpg", np.zeros((4, 4), dtype=np.uint8)).rename(path)
    with pytest.raises(ValueError, match=r"expected a PNG file.*mask\.png', JPEG"):
        read_labels(path, table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "got a blank line in line 1"),
        (b"2007_000033\n\n2007_000034", "got a blank line in line 2"),
        (b"2007_000033\n2007_000034\n2007_000033\n", "got '2007_000033' twice in line 3"),
        (b"2007_\xff", "expected UTF-8 text"),
    ],
)
def test_broken_listing(tmp_path, text, message):
    (build(tmp_path, "voc") / "ImageSets/Segmentation/val.txt").write_bytes(text)
    with pytest.raises(ValueError, match=rf"list of images: .*{message}|{message}.*val\.txt"):
        reopen(tmp_path, "voc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("background\n", "at least one class besides the background and at most 255 lines, got 1"),
        ("a\n\nb", "a blank line in line 2"),
        ("cat\nCat", "expected distinct labels, got 'cat' and 'Cat'"),
        ("", "a blank line in line 1"),
    ],
)
def test_broken_class_list(tmp_path, text, message):
    (build(tmp_path, "folder") / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"labels\.txt: .*{message}.*labels\.txt'"):
        reopen(tmp_path, "folder")


def test_two_pictures_for_one_mask(tmp_path):
    save(build(tmp_path, "folder") / "images/a.webp", photo(3))
    with pytest.raises(ValueError, match=r"one picture for a mask, got 'a\.JPG' and 'a\.webp'"):
        reopen(tmp_path, "folder")


def test_prompts_must_fit_the_classes(tmp_path):
    with pytest.raises(ValueError, match="prompts: expected 1 of them, got 2"):
        SegmentationSet("x", tmp_path, [], ["background", "a"], ["a", "b"], True, label_table(2))
