"""Readers of the standard segmentation data sets: each layout, each class list, each mapping rule."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from dataset_files import LAYOUTS, SIZE, UNUSED, build, photo, reopen, save, values_of
from PIL import Image
from test_windows import ColourModel

from segclip_fast.data.sample import ImageTextSource
from segclip_fast.evaluation import class_names as lists
from segclip_fast.evaluation.datasets import DATASETS
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.evaluation.label_maps import coco_stuff_table
from segclip_fast.evaluation.prompts import check_labels
from segclip_fast.evaluation.vocabularies import VOCABULARIES

# --- layouts and class lists -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_reads_the_standard_layout(tmp_path, name):
    data = reopen(build(tmp_path, name), name)
    source: ImageTextSource = data
    pictures, masks, _, _ = LAYOUTS[name]
    assert (data.name, len(source)) == (name, 2)
    assert [entry.picture for entry in data.entries] == pictures
    assert [entry.mask for entry in data.entries] == masks
    first, last = data[0], data[-1]
    assert first.image.dtype == np.uint8
    assert np.array_equal(first.image, np.asarray(Image.open(tmp_path / pictures[0]).convert("RGB")))
    assert np.array_equal(last.image, np.asarray(Image.open(tmp_path / pictures[1]).convert("RGB")))
    assert first.mask.dtype == np.int64
    assert first.mask.shape == SIZE
    assert first.identifier in pictures[0]
    assert first.identifier != last.identifier
    with pytest.raises(IndexError, match="index: expected 0 to 1, got 2"):
        data[2]
    copy = pickle.loads(pickle.dumps(data))  # loaders send sets to their workers
    assert np.array_equal(copy[0].mask, first.mask)


@pytest.mark.parametrize(
    ("name", "classes", "background"),
    [
        ("voc", 21, True),
        ("voc20", 20, False),
        ("context", 60, True),
        ("context59", 59, False),
        ("coco_object", 81, True),
        ("coco_stuff", 171, False),
        ("ade20k", 150, False),
        ("cityscapes", 19, False),
        ("folder", 3, True),
    ],
)
def test_classes_and_prompts(tmp_path, name, classes, background):
    data = reopen(build(tmp_path, name), name)
    assert (len(data.class_names), data.background) == (classes, background)
    assert (data.class_names[0] == "background") is background
    assert len(data.prompts) == classes - background
    assert check_labels(data.prompts) == data.prompts
    assert check_labels(data.class_names) == data.class_names
    assert not [text for text in (*data.prompts, *data.class_names) if "  " in text]
    if name in VOCABULARIES:
        assert data.prompts == tuple(" ".join(text.split()) for text in VOCABULARIES[name].labels)


def test_names_that_differ_from_the_prompts(tmp_path):
    for name, differ in (
        ("voc20", {"diningtable": "table", "pottedplant": "plant", "tvmonitor": "monitor"}),
        ("context59", {"aeroplane": "airplane", "pottedplant": "plant", "tvmonitor": "monitor"}),
        ("coco_stuff", {}),
    ):
        data = reopen(build(tmp_path / name, name), name)
        pairs = zip(data.class_names, data.prompts, strict=True)
        assert {own: prompt for own, prompt in pairs if own != prompt} == differ


def test_class_lists_have_the_standard_order():
    voc, context = lists.VOC_CLASSES, lists.CONTEXT_CLASSES
    assert list(voc) == sorted(voc)  # PASCAL numbers its classes by the alphabet
    assert list(context) == sorted(context)
    stuff = lists.COCO_STUFF_CLASSES
    assert stuff[:80] == lists.COCO_OBJECT_CLASSES
    assert list(stuff[80:]) == sorted(stuff[80:])
    table = coco_stuff_table()  # anchors of COCO's own numbering (category id minus one)
    anchors = {1: "person", 13: "stop sign", 62: "chair", 90: "toothbrush", 92: "banner", 124: "grass"}
    anchors |= {149: "road", 157: "sky-other", 169: "tree", 182: "wood"}
    assert {id_: stuff[table[id_ - 1]] for id_ in anchors} == anchors
    ade = lists.ADE20K_CLASSES  # anchors of objectInfo150.txt, counted from 1
    anchors = {1: "wall", 8: "bed", 13: "person", 21: "car", 50: "fireplace", 61: "river", 76: "swivel chair"}
    anchors |= {90: "television receiver", 100: "buffet", 110: "swimming pool", 125: "microwave"}
    anchors |= {137: "traffic light", 143: "plate", 144: "monitor", 150: "flag"}
    assert {number: ade[number - 1] for number in anchors} == anchors
    assert lists.CITYSCAPES_CLASSES[::6] == ("road", "traffic light", "rider", "bicycle")


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("voc", "VOC2012"),
        ("voc20", "VOCdevkit/VOC2012"),
        ("context", "VOC2010"),
        ("context59", "VOCdevkit/VOC2010"),
        ("ade20k", "ADEChallengeData2016"),
    ],
)
def test_root_may_be_above(tmp_path, name, home):
    build(tmp_path / home, name)
    assert reopen(tmp_path, name).root == tmp_path / home


def test_order_is_the_listing_or_sorted(tmp_path):
    build(tmp_path / "voc", "voc")
    listing = tmp_path / "voc/ImageSets/Segmentation/val.txt"
    listing.write_text("2007_000034\r\n2007_000033\r\n\r\n")
    assert [e.identifier for e in reopen(tmp_path / "voc", "voc").entries] == ["2007_000034", "2007_000033"]
    listing.write_text("2007_000034\n")
    save(tmp_path / "voc/JPEGImages/2011_000001.jpg", photo(9))  # of the training set, has no mask
    assert [e.identifier for e in reopen(tmp_path / "voc", "voc").entries] == ["2007_000034"]
    names = [e.identifier for e in reopen(build(tmp_path / "city", "cityscapes"), "cityscapes").entries]
    assert names == ["bonn/bonn_000000_000019", "ulm/ulm_000000_000019"]


def test_other_files_beside_are_left_out(tmp_path):
    build(tmp_path, "coco_stuff")
    build(tmp_path, "coco_object")
    save(tmp_path / "annotations/val2017/000000000777_labelTrainIds.png", values_of("ade20k"))
    (tmp_path / "annotations/val2017/.000000000888.png").write_bytes(b"")
    assert len(reopen(tmp_path, "coco_stuff")) == len(reopen(tmp_path, "coco_object")) == 2
    build(tmp_path, "cityscapes")
    save(tmp_path / "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png", values_of("ade20k"))
    assert len(reopen(tmp_path, "cityscapes")) == 2


# --- mapping rules -----------------------------------------------------------------------------------------


def literal(name: str, value: int) -> int | None:
    """The rule of protocol.md for one value, None where the value must not occur."""
    if name in ("voc", "context", "cityscapes"):
        return value if value <= LAYOUTS[name][3] or value == 255 else None
    if name in ("voc20", "context59", "ade20k"):
        if value in (0, 255):
            return 255
        return value - 1 if value <= LAYOUTS[name][3] else None
    if name == "coco_object":
        return value if value <= 80 else None
    if value == 255:
        return 255
    if value > 181 or value in UNUSED:
        return None
    return sum(1 for smaller in range(value) if smaller not in UNUSED)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_every_value_is_mapped_or_refused(tmp_path, name):
    build(tmp_path, name)
    data, path = reopen(tmp_path, name), tmp_path / LAYOUTS[name][1][0]
    allowed = [value for value in range(256) if literal(name, value) is not None]
    save(tmp_path / LAYOUTS[name][0][0], photo(0, (1, len(allowed))))
    save(path, np.array([allowed], dtype=np.uint8))
    assert data[0].mask.tolist() == [[literal(name, value) for value in allowed]]
    labels = {label for label in data[0].mask.ravel().tolist() if label != 255}
    assert labels == set(range(len(data.class_names)))
    for value in set(range(256)) - set(allowed):
        save(path, np.array([[allowed[0], value]], dtype=np.uint8))
        with pytest.raises(ValueError, match=rf"mask: expected labels 0 to .*, got {value} in .*{path.name}"):
            data[0]


def test_folder_labels(tmp_path):
    data = reopen(build(tmp_path, "folder"), "folder")
    assert data.class_names == ("background", "zebra", "lava lamp")
    assert (data.prompts, data.background) == (("zebra", "lava lamp"), True)
    assert np.array_equal(data[0].mask, values_of("folder"))
    assert [entry.identifier for entry in data.entries] == ["a", "deep/b"]
    (tmp_path / "labels.txt").write_text("\ufeffsky\n zebra \nbackground\n\n", encoding="utf-8")
    data = reopen(tmp_path, "folder")
    assert data.class_names == data.prompts == ("sky", "zebra", "background")
    assert data.background is False
    (tmp_path / "labels.txt").write_text("Background\nsky\nzebra")
    assert reopen(tmp_path, "folder").class_names == ("background", "sky", "zebra")
    save(tmp_path / "masks/a.png", values_of("folder").astype(np.uint16))  # 16 bits hold the same labels
    assert np.array_equal(reopen(tmp_path, "folder")[0].mask, values_of("folder"))
    save(tmp_path / "masks/a.png", values_of("folder").astype(np.uint16) + 256)
    with pytest.raises(ValueError, match=r"expected labels 0 to 2, 255, got 256, 257, 258, 511 in .*a\.png"):
        reopen(tmp_path, "folder")[0]


def test_most_classes(tmp_path):
    build(tmp_path, "folder")
    (tmp_path / "labels.txt").write_text("\n".join(f"class {i}" for i in range(255)))
    assert (reopen(tmp_path, "folder").table[:255] == np.arange(255)).all()
    (tmp_path / "labels.txt").write_text("\n".join(f"class {i}" for i in range(256)))
    with pytest.raises(ValueError, match="at most 255 lines, got 256"):
        reopen(tmp_path, "folder")


def test_evaluation_takes_a_set(tmp_path, monkeypatch):
    from segclip_fast.evaluation import harness

    data, seen = reopen(build(tmp_path, "voc"), "voc"), []

    def predict(model, step, vocabulary, options):
        seen.append((vocabulary.names, options.background))
        for item in step:
            truth = item.truth.long()
            yield torch.where(truth == 255, 3, truth)

    monkeypatch.setattr(harness, "_predict", predict)
    result = evaluate_source(ColourModel(), data, labels=data.prompts, background=data.background)
    assert result.miou == 1.0
    assert seen == [(("background", *data.prompts), True)]


def test_names_of_vocabularies_have_single_blanks():
    listed = VOCABULARIES.values()
    assert not [name for vocabulary in listed for name in vocabulary.labels if "  " in name]
