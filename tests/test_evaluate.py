"""The evaluate command: every layout end to end, any batch and number of processes, its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchrun
from dataset_files import LAYOUTS, build, photo, reopen, save
from PIL import Image
from small import small_config

from segclip_fast import SegCLIP
from segclip_fast.config import TextConfig
from segclip_fast.evaluate import main
from segclip_fast.evaluation.datasets import DATASETS
from segclip_fast.evaluation.prompts import TEMPLATE_SETS, template_set
from segclip_fast.evaluation.segmentation import segment_batch
from segclip_fast.evaluation.vocabularies import default_threshold

BACKGROUND = {"voc", "context", "coco_object", "folder"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    text = TextConfig(vocab_size=49408, context_length=77, width=16, layers=1, heads=2)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    SegCLIP(small_config(text=text)).save_pretrained(folder)
    return folder


def run(name, root, checkpoint, output, *more):
    words = ["--dataset", name, "--data-root", str(root), "--checkpoint", str(checkpoint), "--device", "cpu"]
    return main([*words, "--output", str(output), "--workers", "0", *map(str, more)])


def result_of(*arguments):
    assert run(*arguments) == 0
    return json.loads(arguments[3].read_text())


def larger(root, name, count=5):
    """The fixture with `count` images of different sizes, and truth that every class of a small set has."""
    build(root, name)
    for seed in range(count):
        size = (20 + 9 * seed, 70 - 11 * seed)
        save(root / f"JPEGImages/x{seed}.jpg", photo(seed, size))
        truth = np.random.default_rng(seed).integers(0, 21, size).astype(np.uint8)
        truth[:2] = 255
        save(root / f"SegmentationClass/x{seed}.png", truth)
    listing = root / "ImageSets/Segmentation/val.txt"
    listing.write_text(listing.read_text() + "".join(f"x{seed}\n" for seed in range(count)))
    return root


def mmseg_metric(predictions, truths, classes):
    """IoU per class by mmseg's histograms, in floating point: areas of intersection, prediction and label."""
    hit, guessed, actual = (np.zeros(classes) for _ in range(3))
    bins = np.arange(classes + 1) - 0.5
    for prediction, truth in zip(predictions, truths, strict=True):
        prediction, truth = prediction[truth != 255], truth[truth != 255]
        hit += np.histogram(prediction[prediction == truth], bins)[0]
        guessed += np.histogram(prediction, bins)[0]
        actual += np.histogram(truth, bins)[0]
    with np.errstate(invalid="ignore"):
        return hit / (guessed + actual - hit)


@pytest.mark.parametrize("name", DATASETS)
def test_every_layout_end_to_end(tmp_path, name, checkpoint):
    root = build(tmp_path / "data", name)
    found = result_of(name, root, checkpoint, tmp_path / "out.json", "--partial")
    data = reopen(root, name)
    samples = [data[i] for i in range(len(data))]
    options = {}
    if name in BACKGROUND:
        options = {"background": True, "threshold": default_threshold(name, "official")}
    model = SegCLIP.from_pretrained(checkpoint)
    results = segment_batch(model, [s.image for s in samples], list(data.prompts), **options)
    iou = mmseg_metric([r.labels for r in results], [s.mask for s in samples], len(data.class_names))
    stored = [found["result"]["iou"][n] for n in data.class_names]
    np.testing.assert_allclose(np.array(stored, dtype=float), iou, atol=1e-6)
    assert found["result"]["miou"] == pytest.approx(np.nanmean(iou), abs=1e-6)
    assert found["result"]["images"] == 2
    assert set(found["result"]["images_miou"]) == {entry.identifier for entry in data.entries}
    assert (found["dataset"], found["protocol"], found["refinement"]) == (name, "official", "none")
    assert found["part_of_the_data_set"]
    assert found["options"]["threshold"] == options.get("threshold")


@pytest.mark.parametrize(
    ("name", "official", "paper"),
    [("voc", 0.8, 0.75), ("context", 0.25, 0.25), ("coco_object", 0.65, 0.65), ("folder", 0.8, 0.75)],
)
def test_thresholds(name, official, paper):
    assert default_threshold(name, "official") == official
    assert default_threshold(name, "paper") == paper


def test_any_batch_and_workers_give_the_same(tmp_path, checkpoint):
    root = larger(tmp_path / "data", "voc")
    plain = result_of("voc", root, checkpoint, tmp_path / "a.json", "--partial", "--batch-size", 1)
    for number, more in enumerate((["--batch-size", 3], ["--batch-size", 64], ["--workers", 2])):
        other = result_of("voc", root, checkpoint, tmp_path / f"b{number}.json", "--partial", *more)
        for key in ("miou", "iou", "images_miou", "pixel_accuracy", "mean_accuracy", "images"):
            assert other["result"][key] == plain["result"][key], (key, more)


@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_gives_what_one_process_gives(tmp_path, checkpoint, processes):
    root = larger(tmp_path / "data", "voc")  # 7 images: the shares differ
    plain = result_of("voc", root, checkpoint, tmp_path / "one.json", "--partial")
    command = ["-m", "segclip_fast.evaluate", "--dataset", "voc", "--data-root", str(root), "--partial"]
    command += ["--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0"]
    done = torchrun.run(*command, "--output", tmp_path / "many.json", processes=processes)
    assert done.returncode == 0, done.stderr
    many = json.loads((tmp_path / "many.json").read_text())
    assert many["processes"] == processes
    for key in ("miou", "iou", "images_miou", "pixel_accuracy", "mean_accuracy", "images"):
        assert many["result"][key] == plain["result"][key], key


def test_refinements_are_named_and_change_the_result(tmp_path, checkpoint):
    root = larger(tmp_path / "data", "voc")
    plain = result_of("voc", root, checkpoint, tmp_path / "plain.json", "--partial")
    words = ["--snap", "--pamr", "--short-side", 48, "--stride", 16, "--templates", "simple7"]
    for number, (more, named) in enumerate(
        [
            (words[:1], "snap"),
            (words[1:2], "pamr"),
            (words[2:6], "short side 48 + stride 16"),
            (words, "pamr + snap + short side 48 + stride 16 + 7 templates"),
        ]
    ):
        found = result_of("voc", root, checkpoint, tmp_path / f"{number}.json", "--partial", *more)
        assert found["refinement"] == named
        assert found["result"]["images_miou"] != plain["result"]["images_miou"]


def test_own_prompts(tmp_path, checkpoint):
    root = build(tmp_path / "data", "voc")
    own = tmp_path / "own.yaml"
    own.write_text(
        "templates: ['a {}', '{}']\nprompts:\n  aeroplane: plane\n  tvmonitor: [screen, television]\n"
        "background: [wall, sky]\n"
    )
    found = result_of("voc", root, checkpoint, tmp_path / "own.json", "--partial", "--vocabulary", own)
    assert found["options"]["templates"] == ["a {}", "{}"]
    assert found["options"]["background"] == ["wall", "sky"]
    assert found["options"]["threshold"] is None
    assert (found["prompts"]["aeroplane"], found["prompts"]["tvmonitor"]) == ("plane", "screen")
    assert found["prompts"]["diningtable"] == "table"  # the release's own
    assert found["synonyms"] == {"screen": ["screen", "television"]}
    names = result_of("voc", root, checkpoint, tmp_path / "n.json", "--partial", "--background-names", "wall")
    assert names["options"]["background"] == ["wall"]


def test_template_sets():
    assert [len(template_set(name)) for name in TEMPLATE_SETS] == [1, 7, 80]
    assert all("{}" in text for name in TEMPLATE_SETS for text in template_set(name))
    with pytest.raises(ValueError, match="templates: expected one of release"):
        template_set("all")


def test_pictures_of_the_best_and_the_worst(tmp_path, checkpoint):
    root = larger(tmp_path / "data", "voc")
    pictures = tmp_path / "pictures"
    more = ["--partial", "--pictures", pictures, "--pictures-count", 2]
    found = result_of("voc", root, checkpoint, tmp_path / "out.json", *more)
    ranked = sorted(found["result"]["images_miou"].items(), key=lambda item: item[1])
    written = sorted(path.name for path in pictures.iterdir())
    assert written[0] == f"best_01_{ranked[-1][0]}.png"
    assert written[2] == f"worst_01_{ranked[0][0]}.png"
    assert len(written) == 4
    with Image.open(pictures / written[0]) as picture:
        assert picture.width > 3 * 20


def test_pictures_show_what_was_counted(tmp_path, checkpoint, monkeypatch):
    """With synonyms too, which change the features of a label."""
    from segclip_fast.evaluation import report

    root, own, drawn = larger(tmp_path / "data", "voc"), tmp_path / "own.yaml", {}
    texts = {
        name: [f"x{i}", f"quite another {7 * i}"] for i, name in enumerate(reopen(root, "voc").class_names)
    }
    own.write_text(json.dumps({"prompts": {name: text for name, text in texts.items() if text[0] != "x0"}}))
    draw = report._draw

    def spy(image, mask, result, names, path):
        counted = mask != 255
        hit = [(result.labels == c) & (mask == c) for c in range(21)]
        seen = [((result.labels == c) | (mask == c)) & counted for c in range(21)]
        drawn[path.stem[8:] if path.stem.startswith("best") else path.stem[9:]] = np.mean(
            [h[counted].sum() / s.sum() for h, s in zip(hit, seen, strict=True) if s.any()]
        )
        draw(image, mask, result, names, path)

    monkeypatch.setattr(report, "_draw", spy)
    more = ["--partial", "--vocabulary", own, "--pictures", tmp_path / "pictures"]
    found = result_of("voc", root, checkpoint, tmp_path / "out.json", *more)
    assert len(drawn) == 7
    for name, value in drawn.items():
        assert found["result"]["images_miou"][name] == pytest.approx(value, abs=1e-6)


def test_limit_and_checkpoint_hash(tmp_path, checkpoint):
    import hashlib

    root = larger(tmp_path / "data", "voc")
    found = result_of("voc", root, checkpoint, tmp_path / "out.json", "--partial", "--limit", 3)
    assert found["result"]["images"] == 3
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert found["checkpoint"] == {"sha256": digest, "of": "model.safetensors"}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]


def broken_truth(root):
    save(root / "SegmentationClass/2007_000034.png", np.zeros((5, 9), np.uint8))


def alien_label(root):
    save(root / "SegmentationClass/2007_000034.png", np.full((6, 9), 77, np.uint8))


def cut_photo(root):
    path = root / "JPEGImages/2007_000034.jpg"
    path.write_bytes(path.read_bytes()[:120])


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (None, [], "root: expected the 1449 images of voc, got 2"),
        (lambda root: (root / "JPEGImages/2007_000034.jpg").unlink(), [], "JPEGImages/2007_000034.jpg"),
        (
            broken_truth,
            ["--partial"],
            "mask: expected (6, 9), the (height, width) of JPEGImages/2007_000034.jpg",
        ),
        (alien_label, ["--partial"], "mask: expected labels 0 to 20, 255, got 77"),
        (cut_photo, ["--partial"], "2007_000034.jpg"),
        (None, ["--partial", "--limit", "0"], "source: expected at least one sample"),
        (
            None,
            ["--partial", "--batch-size", "0"],
            "batch_size: expected a positive number of windows, got 0",
        ),
        (None, ["--partial", "--stride", "99"], "stride: expected 1 to 32"),
        (None, ["--partial", "--threshold", "2"], "threshold: expected a number from 0 to 1, got 2.0"),
        (None, ["--partial", "--vocabulary", "no.yaml"], "vocabulary: expected an existing YAML file"),
        (None, ["--partial", "--model", "nowhere"], "nowhere"),
        (None, ["--partial", "--threshold", "x"], "--threshold"),
        (None, ["--partial", "--output", "no/where.json"], "--output: expected an existing folder, got 'no'"),
    ],
    ids=str,
)
def test_refusals_are_one_line(tmp_path, checkpoint, capsys, spoil, more, message):
    root = build(tmp_path / "data", "voc")
    if spoil is not None:
        spoil(root)
    assert run("voc", root, checkpoint, tmp_path / "out.json", *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("evaluate: error: ")
    assert not (tmp_path / "out.json").exists()


def test_a_broken_image_is_told_from_a_worker_too(tmp_path, checkpoint, capsys):
    root = build(tmp_path / "data", "voc")
    alien_label(root)
    assert run("voc", root, checkpoint, tmp_path / "out.json", "--partial", "--workers", 1) == 2
    assert "error: mask: expected labels 0 to 20, 255, got 77" in capsys.readouterr().err.splitlines()[-1]


def test_a_result_is_not_overwritten(tmp_path, checkpoint, capsys):
    root, output = build(tmp_path / "data", "voc"), tmp_path / "out.json"
    output.write_text("mine")
    assert run("voc", root, checkpoint, output, "--partial") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert run("voc", root, checkpoint, output, "--partial", "--overwrite") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: [a]", "expected `prompts` as class: text, got list"),
        ("prompts: {zeppelin: balloon}", "expected classes of the data set in `prompts`, got 'zeppelin'"),
        ("prompts: {cat: dog}", "prompts: expected distinct labels"),
        ("templates: ['a photo']", "templates: expected strings with {}"),
        ("templates: best", "templates: expected one of release"),
        ("colours: red", "vocabulary: expected some of templates, prompts, background"),
        ("- a", "vocabulary: expected some of templates"),
        ("a: [", "vocabulary: expected YAML"),
        ("background: []", "background: expected at least one"),
    ],
)
def test_vocabulary_refusals(tmp_path, checkpoint, capsys, text, message):
    root, own = build(tmp_path / "data", "voc"), tmp_path / "own.yaml"
    own.write_text(text)
    assert run("voc", root, checkpoint, tmp_path / "out.json", "--partial", "--vocabulary", own) == 2
    assert message in capsys.readouterr().err


def test_background_names_need_a_background_class(tmp_path, checkpoint, capsys):
    root = build(tmp_path / "data", "ade20k")
    more = ["--partial", "--background-names", "wall"]
    assert run("ade20k", root, checkpoint, tmp_path / "out.json", *more) == 2
    assert "ade20k has no background class" in capsys.readouterr().err


def test_layouts_cover_the_data_sets():
    assert set(LAYOUTS) == set(DATASETS)
