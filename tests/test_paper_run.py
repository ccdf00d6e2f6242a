"""The paper's run starts: `train paper` on CLIP-shaped weights and a few pictures, three steps to the end."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from golden import golden, requires_golden
from PIL import Image
from safetensors.torch import load_file
from test_caption_files import write_json
from test_shards import picture, write_shard

from segclip_fast import SegCLIP
from segclip_fast.config import preset
from segclip_fast.data.scenes import make_scene
from segclip_fast.interop.authors import authors_name
from segclip_fast.interop.clip import SCALARS, clip_name
from segclip_fast.training.log import read_log
from segclip_fast.training.optim import learns_slowly

pytestmark = pytest.mark.slow  # 30 s, and 3.5 GB of disk that are given back

STEPS = 3
LR, LOWER_LR, WEIGHT_DECAY, WARMUP = 4e-3, 4e-6, 0.05, 0.15  # of the paper
LOSSES = ("contrastive", "reconstruction", "superpixel_kl")
# What the release freezes when it starts from CLIP, in CLIP's names.
FROZEN = {
    "visual.conv1.weight",
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.ln_pre.weight",
    "visual.ln_pre.bias",
    "positional_embedding",
    "token_embedding.weight",
}


def write_weights(file: Path) -> dict[str, torch.Tensor]:
    """A state dict of OpenAI's ViT-B/16 with random values."""
    open_clip = pytest.importorskip("open_clip", reason="needs the package open_clip_torch")
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random
    try:
        state = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).state_dict()
    finally:
        logging.disable(logging.NOTSET)
    torch.save(state, file)
    return {name: value for name, value in state.items() if name not in SCALARS}


def write_pairs(folder: Path) -> tuple[str, Path]:
    """Eight pairs in a shard and four in Karpathy's train split: `train_data`, and COCO's pictures."""
    members: list[tuple[str, bytes | str]] = []
    for number in range(8):
        members += [(f"{number:09d}.jpg", picture(number, 240, "JPEG"))]
        members += [(f"{number:09d}.txt", f"a photo of scene {number}")]
    write_shard(folder / "00000.tar", members)
    pictures = folder / "coco"
    (pictures / "train2014").mkdir(parents=True)
    images = []
    for number in range(2):
        scene = make_scene(100 + number, 256).image[: 200 + 30 * number]
        Image.fromarray(scene).save(pictures / "train2014" / f"{number}.jpg")
        images.append(_image("train", f"{number}.jpg", [f"caption {each} of {number}" for each in range(2)]))
    images += [_image(split, "absent.jpg", ["not trained on"]) for split in ("restval", "val", "test")]
    annotations = write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": images})
    return f"{folder}/{{00000..00000}}.tar::{annotations}", pictures


def _image(split: str, name: str, captions: list[str]) -> dict:
    sentences = [{"raw": caption} for caption in captions]
    return {"filepath": "train2014", "filename": name, "split": split, "sentences": sentences}


@dataclass(frozen=True)
class Done:
    """A finished run: its folder, CLIP's weights that it began with, and the model that it left."""

    folder: Path
    clip: dict[str, torch.Tensor]
    model: dict[str, torch.Tensor]

    def moved(self) -> dict[str, float]:
        """The largest change of a value in each tensor of the towers, by our names."""
        cut = preset("vit_b16").vision.group_after
        found = {}
        for name, value in self.model.items():
            before = self.clip.get(clip_name(name, cut))
            if before is not None:
                found[name] = (value - before).abs().max().item()
        return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    try:
        clip = write_weights(folder / "clip.pt")
        train_data, pictures = write_pairs(folder)
        command = [sys.executable, "-m", "segclip_fast.train", "paper", "--quiet", "--device", "cpu"]
        command += ["--train-data", train_data, "--data.images", str(pictures)]
        command += ["--init", f"clip:ViT-B-16-quickgelu:{folder / 'clip.pt'}"]
        command += ["--batch-size", "2", "--steps", str(STEPS), "--workers", "1"]
        command += ["--output", str(folder / "run")]
        environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=500, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == f"trained model: {folder / 'run'}/model\n"
        yield Done(folder / "run", clip, load_file(folder / "run" / "model" / "model.safetensors"))
    finally:
        shutil.rmtree(folder)


def factor(step: int) -> float:
    """The share of the peak rate at a step, written out."""
    share = step / STEPS
    return share / WARMUP if share < WARMUP else (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP))) / 2


def test_three_steps_with_finite_losses(done):
    (start,) = read_log(done.folder, "start")
    assert start["pairs"] == "12 pairs: 8 in 1 shard, 4 captions of dataset_coco.json"
    log = read_log(done.folder)
    assert [entry["step"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert not entry["skipped"]
        assert all(math.isfinite(entry[name]) and entry[name] > 0 for name in (*LOSSES, "gradient_norm"))
        assert entry["total"] == pytest.approx(sum(entry[name] for name in LOSSES), rel=1e-5)
    assert not read_log(done.folder, "damaged")


def test_the_rates_are_the_schedules(done):
    for entry in read_log(done.folder):
        assert entry["lr"] == pytest.approx(LR * factor(entry["step"]), abs=1e-15)
        assert entry["lower_lr"] == pytest.approx(LOWER_LR * factor(entry["step"]), abs=1e-18)


def test_what_is_frozen_stays_and_the_rest_moves_at_its_rate(done):
    cut, moved = preset("vit_b16").vision.group_after, done.moved()
    theirs = {clip_name(name, cut) for name in moved}
    assert theirs == set(done.clip)  # all of CLIP is there
    assert {clip_name(name, cut) for name, change in moved.items() if change == 0} == FROZEN
    for name, change in moved.items():
        if clip_name(name, cut) in FROZEN:
            continue
        size = done.model[name].abs().max().item()
        # AdamW moves a value by its rate at most, and by its decay; float32 rounds.
        most = sum(factor(step) for step in range(1, STEPS + 1)) * (1.01 + WEIGHT_DECAY * size)
        slow = LOWER_LR * most + STEPS * 2**-23 * size
        assert (change <= slow) == learns_slowly(name), (name, change, slow)
        assert change <= slow or 30 * slow < change <= LR * most + STEPS * 2**-23 * size, (name, change, slow)


def test_the_result_is_the_papers_model(done):
    loaded = SegCLIP.from_pretrained(done.folder / "model")
    assert loaded.config == preset("vit_b16")
    assert loaded.loss.kl_form == "paper"
    assert all(torch.isfinite(value).all() for value in done.model.values())


def checkpoint(done) -> dict:
    (folder,) = (done.folder / "checkpoints").iterdir()
    assert folder.name == f"step-{STEPS:06d}"
    return json.loads((folder / "training.json").read_text())


def test_the_checkpoint_names_what_is_trained(done):
    entry = checkpoint(done)
    assert (entry["step"], entry["position"], entry["batch_size"]) == (STEPS, 2 * STEPS, 2)
    names = [name for group in entry["groups"] for name in group["names"]]
    cut = preset("vit_b16").vision.group_after
    frozen = {name for name in done.moved() if clip_name(name, cut) in FROZEN}
    assert len(names) == len(set(names))
    assert set(names) == set(done.model) - frozen
    assert [group["lr"] for group in entry["groups"]] == pytest.approx([0] * 5, abs=1e-18)  # after the last
    settings = entry["config"]
    assert (settings["steps"], settings["epochs"]) == (STEPS, 0)
    assert settings["optim"]["decay"] == "official"


@pytest.mark.golden
@requires_golden
def test_the_checkpoints_groups_are_those_of_the_release(done):
    stored = golden("model.pt")
    rates = {
        name: (group["lr"], group["weight_decay"])
        for group in stored["optim_groups"]
        for name in group["params"]
    }
    found = {}
    for group in checkpoint(done)["groups"]:
        members = [authors_name(name) for name in group["names"]]
        (kind,) = {rates[name] for name in members}
        # The logit scale has a group of its own.
        found[kind] = found.get(kind, set()) | set(members)
    expected = {kind: {name for name in rates if rates[name] == kind} for kind in rates.values()}
    assert found == {kind: members - set(stored["frozen"]) for kind, members in expected.items()}
    counts = {kind: len(members) for kind, members in found.items()}
    slow, fast = (LOWER_LR, WEIGHT_DECAY), (LR, WEIGHT_DECAY)
    assert counts == {slow: 135, (LOWER_LR, 0.0): 133, fast: 72, (LR, 0.0): 67}
