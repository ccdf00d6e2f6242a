"""Evaluation while a run trains: the numbers of the evaluate command, settings refused before training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from dataset_files import build, photo, save
from small import small_config

from segclip_fast import SegCLIP
from segclip_fast.config import DataConfig, TextConfig, TrainConfig, scenes_tiny
from segclip_fast.data.materials import BY_NAME
from segclip_fast.data.scenes import SceneSource
from segclip_fast.evaluate import main
from segclip_fast.evaluation.harness import evaluate_source
from segclip_fast.training.pictures import columns
from segclip_fast.training.zero_shot import make_zero_shot

SCENES = small_config(text=dataclasses.replace(scenes_tiny().text, width=16, heads=2, layers=1))
PHOTOS = small_config(text=TextConfig(vocab_size=49408, context_length=77, width=16, layers=1, heads=2))


def config(**changes) -> TrainConfig:
    return TrainConfig(**({"data": DataConfig(dataset_type="scenes", seed=3), "eval_images": 20} | changes))


def model_of(model_config) -> SegCLIP:
    torch.manual_seed(3)
    return SegCLIP(model_config)


def voc(root):
    """Six images, three of them with every class somewhere."""
    build(root, "voc")
    for seed in range(4):
        size = (40 + 9 * seed, 70 - 11 * seed)
        save(root / f"JPEGImages/x{seed}.jpg", photo(seed, size))
        truth = np.random.default_rng(seed).integers(0, 21, size).astype(np.uint8)
        save(root / f"SegmentationClass/x{seed}.png", truth)
    listing = root / "ImageSets/Segmentation/val.txt"
    listing.write_text("".join(f"x{seed}\n" for seed in range(4)) + listing.read_text())
    return root


@pytest.mark.parametrize("training", [True, False])
def test_held_out_scenes(training):
    model = model_of(SCENES).train(training)
    zero_shot = make_zero_shot(config(), SCENES)
    found = zero_shot.run(model)
    assert all(module.training == training for module in model.modules())
    held_out = SceneSource(20, seed=3, size=32, split="val")
    expected = evaluate_source(model.eval(), held_out, batch_size=32)
    assert found == {"miou": expected.miou, "pixel_accuracy": expected.pixel_accuracy, "images": 20}
    assert found["pixel_accuracy"] > 0
    assert zero_shot.class_names == tuple(BY_NAME)
    assert zero_shot.threshold is None
    samples = zero_shot.samples(2)
    assert [sample.caption for sample in samples] == [held_out[0].caption, held_out[1].caption]
    assert np.array_equal(samples[1].image, held_out[1].image)
    assert len(zero_shot.samples(100)) == 20


@pytest.mark.parametrize("limit", [3, 100])
def test_data_set_gives_what_the_evaluate_command_gives(tmp_path, limit):
    root, model = voc(tmp_path / "voc"), model_of(PHOTOS)
    model.save_pretrained(tmp_path / "model")
    arguments = ["--dataset", "voc", "--data-root", root, "--partial", "--checkpoint", tmp_path / "model"]
    arguments += ["--limit", limit, "--output", tmp_path / "voc.json", "--workers", 0, "--device", "cpu"]
    assert main([str(argument) for argument in arguments]) == 0
    expected = json.loads((tmp_path / "voc.json").read_text())["result"]

    chosen = config(eval_dataset="voc", eval_root=str(root), eval_images=limit)
    zero_shot = make_zero_shot(chosen, PHOTOS)
    found = zero_shot.run(model)
    assert found["images"] == expected["images"] == min(limit, 6)
    for name in ("miou", "pixel_accuracy"):
        assert round(found[name], 6) == expected[name]
    assert found["pixel_accuracy"] > 0
    assert zero_shot.threshold == 0.8
    assert zero_shot.class_names[:2] == ("background", "aeroplane")
    assert len(zero_shot.class_names) == 21


@pytest.mark.parametrize(
    ("name", "threshold", "classes"),
    [("context", 0.25, 60), ("coco_object", 0.65, 81), ("ade20k", None, 150), ("folder", 0.8, 3)],
)
def test_every_data_set_has_its_prompts_and_threshold(tmp_path, name, threshold, classes):
    chosen = config(eval_dataset=name, eval_root=str(build(tmp_path, name)))
    zero_shot = make_zero_shot(chosen, PHOTOS)
    assert zero_shot.threshold == threshold
    assert len(zero_shot.class_names) == classes
    assert (zero_shot.class_names[0] == "background") == (threshold is not None)
    assert zero_shot.run(model_of(PHOTOS))["images"] == 2


def test_samples_and_names_fit_the_pictures(tmp_path):
    for chosen, model_config in (
        (config(eval_dataset="voc", eval_root=str(voc(tmp_path))), PHOTOS),
        (config(), SCENES),
    ):
        zero_shot = make_zero_shot(chosen, model_config)
        names, threshold = zero_shot.class_names, zero_shot.threshold
        shown = columns(model_of(model_config), zero_shot.samples(2), names, threshold=threshold)
        assert [column.title for column in shown][-2:] == ["segmentation", "truth"]


def test_nothing_to_evaluate_on():
    data = DataConfig(dataset_type="folder", train_data="pictures")
    assert make_zero_shot(config(data=data), SCENES) is None


def test_data_set_comes_before_held_out_pictures(tmp_path):
    chosen = config(eval_dataset="folder", eval_root=str(build(tmp_path, "folder")))
    assert make_zero_shot(chosen, PHOTOS).class_names == ("background", "zebra", "lava lamp")


def test_unusable_settings_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: expected one of voc, .*, got 'imagenet'"):
        make_zero_shot(config(eval_dataset="imagenet", eval_root="/"), PHOTOS)
    with pytest.raises(FileNotFoundError, match="eval_root: expected the folder of voc, got"):
        make_zero_shot(config(eval_dataset="voc", eval_root=str(tmp_path / "none")), PHOTOS)
    with pytest.raises(FileNotFoundError, match="eval_root: expected the files of voc"):
        make_zero_shot(config(eval_dataset="voc", eval_root=str(tmp_path)), PHOTOS)
    root = str(voc(tmp_path / "voc"))
    with pytest.raises(ValueError, match="eval_dataset: texts: expected words of the model's vocabulary"):
        make_zero_shot(config(eval_dataset="voc", eval_root=root), small_config())
    with pytest.raises(ValueError, match="data.dataset_type: texts: expected words of the model"):
        make_zero_shot(config(), small_config())
    save(tmp_path / "voc/SegmentationClass/x0.png", np.full((40, 70), 99, np.uint8))
    with pytest.raises(ValueError, match="99"):
        make_zero_shot(config(eval_dataset="voc", eval_root=root), PHOTOS)
