"""GroupViT against transformers' own outputs, on small random models; other grids, files, every refusal."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segclip_fast.baselines.groupvit import GroupViT
from segclip_fast.data.transforms import CLIP_MEAN, CLIP_STD
from segclip_fast.evaluation.segmentation import segment
from segclip_fast.model.segclip import ImageFeatures

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

PATCH, GROUPS, E = 8, 3, 20
# The text tower of transformers 4 cannot mask in float64.
TEXT_DTYPE = torch.float64 if int(transformers.__version__.split(".")[0]) >= 5 else torch.float32
STAGES = {
    "one stage": {"depths": [2, 1], "num_group_tokens": [5, 0], "num_output_groups": [GROUPS, GROUPS]},
    "two stages": {
        "depths": [1, 1, 1],
        "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, GROUPS, GROUPS],
    },
}


def words(texts: list[str]) -> torch.Tensor:
    """One id per letter, 49 ends."""
    ids = torch.zeros(len(texts), 12, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        letters = [1 + ord(letter) % 40 for letter in text[:11]]
        row[: len(letters) + 1] = torch.tensor([*letters, 49])
    return ids


def hf_model(stages: str = "two stages", vocabulary: int = 50, **changes):
    """A small GroupViTModel in float64 with all parameters and statistics away from their initial values."""
    vision = STAGES[stages] | {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3}
    vision |= {"num_hidden_layers": sum(vision["depths"]), "image_size": 32, "patch_size": PATCH} | changes
    text = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": vocabulary - 1}
    config = transformers.GroupViTConfig(
        text_config=text, vision_config=vision, projection_dim=E, projection_intermediate_dim=30
    )
    torch.manual_seed(0)
    model = transformers.GroupViTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_()
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
    return model.double().eval()


def photos(height: int = 32, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pixels normalised as CLIP's and as ImageNet's, (2, 3, height, width) each."""
    generator = torch.Generator().manual_seed(height + width)
    pixels = torch.rand((2, 3, height, width), generator=generator, dtype=torch.float64)

    def normalised(mean, std):
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
        return (pixels - mean) / std

    return normalised(CLIP_MEAN, CLIP_STD), normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("stages", STAGES)
@torch.no_grad()
def test_transformers_own_outputs(stages):
    model, tokens = hf_model(stages).to(TEXT_DTYPE), words(["cat", "grass", "a sofa"])
    groupvit, (clip, imagenet) = GroupViT(model, words), (images.to(TEXT_DTYPE) for images in photos())
    expected = model(input_ids=tokens, pixel_values=imagenet, output_segmentation=True)
    found = groupvit.encode_image(clip)
    text = F.normalize(groupvit.encode_text(tokens), dim=-1)
    assert isinstance(found, ImageFeatures)
    close(F.normalize(found.image, dim=-1), expected.image_embeds)
    close(text, expected.text_embeds)
    scale = groupvit.logit_scale.exp()
    affinity = scale * F.normalize(found.regions, dim=-1) @ text.T  # (B, L, C)
    maps = F.interpolate(found.soft.unflatten(-1, (4, 4)), (32, 32), mode="bilinear")
    logits = scale * torch.einsum("blc,blhw->bchw", affinity, maps)
    assert expected.segmentation_logits.std(dim=(2, 3)).min() > 0.01  # the maps say something
    close(logits, expected.segmentation_logits)


@torch.no_grad()
def test_assignment():
    model = hf_model()
    clip, imagenet = photos()
    found = GroupViT(model, words).encode_image(clip)
    assert found.regions.shape == (2, GROUPS, E)
    assert found.image.shape == (2, E)
    assert found.logits.shape == found.soft.shape == found.hard.shape == (2, GROUPS, 16)
    first, second = model.vision_model(imagenet, output_attentions=True, return_dict=True).attentions
    soft = torch.zeros(2, GROUPS, 16, dtype=torch.float64)
    for member in range(6):
        soft += second[:, :, member, None] * first[:, None, member]
    close(found.soft, soft)
    close(found.soft.sum(dim=1), torch.ones(2, 16, dtype=torch.float64))
    close(found.logits.softmax(dim=1), found.soft)
    assert torch.equal(found.hard.argmax(dim=1), soft.argmax(dim=1))
    assert torch.equal(found.hard.sum(dim=1), torch.ones(2, 16, dtype=torch.float64))
    assert set(found.hard.unique().tolist()) == {0.0, 1.0}
    assert len(found.hard.argmax(dim=1).unique()) > 1


@torch.no_grad()
def test_assignments_of_nothing_stay_finite():
    """Groups that no patch can belong to: log of a zero."""
    model = hf_model()
    for stage in model.vision_model.encoder.stages[:2]:
        for layer in (stage.downsample.assign.q_proj, stage.downsample.assign.k_proj):
            layer.weight.mul_(1e4)
    found = GroupViT(model.float(), words).encode_image(photos()[0].float())
    assert (found.soft == 0).any()
    assert found.logits.isfinite().all()
    assert torch.equal(found.logits.argmax(dim=1), found.hard.argmax(dim=1))


@torch.no_grad()
def test_mixed_precision():
    """Assignments are multiplied in float32 whatever the model computes in."""
    groupvit, images = GroupViT(hf_model().float(), words), photos()[0].float()
    exact = groupvit.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = groupvit.encode_image(images)
    assert found.soft.dtype == found.logits.dtype == torch.float32
    torch.testing.assert_close(found.soft.sum(dim=1), torch.ones(2, 16), rtol=0, atol=1e-6)
    assert (found.soft - exact.soft).abs().max() < 0.2
    assert F.cosine_similarity(found.regions.float(), exact.regions, dim=-1).min() > 0.95


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (8, 40), (8, 128)], ids=str)
@torch.no_grad()
def test_other_grids(size):
    """As a model of that size whose position embeddings are the resized ones."""
    small = hf_model()
    large = hf_model(image_size=list(size))
    values = copy.deepcopy(small.state_dict())
    name = "vision_model.embeddings.position_embeddings"
    table = values[name].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = (size[0] // PATCH, size[1] // PATCH)
    values[name] = F.interpolate(table, grid, mode="bicubic", align_corners=False).flatten(2).mT
    large.load_state_dict(values)
    clip, imagenet = photos(*size)
    found = GroupViT(small, words).encode_image(clip)
    expected = large.vision_model(imagenet, output_attentions=True, return_dict=True)
    first, second = expected.attentions
    close(found.soft, second @ first)
    close(found.image, small.visual_projection(expected.pooler_output))


@torch.no_grad()
def test_text_ends_at_its_end_token():
    """What pads a text behind its end changes nothing."""
    groupvit, tokens = GroupViT(hf_model().to(TEXT_DTYPE), words), words(["cat"])
    padded = tokens.clone()
    padded[0, 4:] = 7
    close(groupvit.encode_text(tokens), groupvit.encode_text(padded))
    close(groupvit.encode_text(tokens), groupvit.encode_text(tokens[:, :4]))
    assert not torch.allclose(groupvit.encode_text(tokens), groupvit.encode_text(words(["cow"])))


def test_sizes_and_thresholds():
    model = hf_model()
    groupvit = GroupViT(model, words)
    assert (groupvit.image_size, groupvit.patch_size) == (64, PATCH)  # evaluated at twice the training size
    assert GroupViT(model, words, image_size=32).image_size == 32
    assert groupvit.thresholds == {"voc": 0.95, "context": 0.35, "coco_object": 0.95}
    assert groupvit.logit_scale is model.logit_scale
    assert groupvit.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}


def test_tokens():
    assert GroupViT(hf_model(), words).tokenize(("cat",)).equal(words(["cat"]))
    with pytest.raises(ValueError, match="tokenizer: expected one for the model's 50 ids, got none"):
        GroupViT(hf_model()).tokenize(["cat"])
    tokens = GroupViT(hf_model(vocabulary=49408)).tokenize(["a photo of a cat.", "sofa " * 80])
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407, 0, 0, 0, 0]
    assert tokens.shape == (2, 12)  # the model's positions
    assert tokens[1, -1] == 49407


def test_evaluation_runs():
    groupvit = GroupViT(hf_model().float(), words)
    image = np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    found = segment(groupvit, image, ["cat", "grass"], stride=32)
    assert found.labels.shape == (70, 130)
    assert found.regions is not None


def test_from_a_folder(tmp_path, monkeypatch):
    import socket

    model = hf_model(vocabulary=49408).float()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("went to the network"))
    loaded = GroupViT.from_pretrained(tmp_path / "model", image_size=32)
    assert not loaded.training
    assert loaded.image_size == 32
    assert all(
        torch.equal(loaded.model.state_dict()[name], value) for name, value in model.state_dict().items()
    )
    clip = photos()[0].float()
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(clip).soft, GroupViT(model).encode_image(clip).soft)
    model.half().save_pretrained(tmp_path / "half")
    assert GroupViT.from_pretrained(tmp_path / "half").logit_scale.dtype == torch.float32


def test_unusable_folders(tmp_path):
    for missing in (tmp_path / "none", "./none", "no/such/model", "none"):
        with pytest.raises(
            FileNotFoundError, match="path_or_id: expected a folder or OWNER/NAME, found nothing"
        ):
            GroupViT.from_pretrained(missing)
    with pytest.raises(FileNotFoundError, match="path_or_id: expected a folder with config.json"):
        GroupViT.from_pretrained(tmp_path)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="path_or_id: expected a model of type groupvit, got 'clip'"):
        GroupViT.from_pretrained(tmp_path / "clip")


def test_missing_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_model().save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    del values["visual_projection.0.weight"]
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected all weights, .* lacks 1: \['visual_projection.0.weight'\]"
    ):
        GroupViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "a transformers.GroupViTModel, got Linear"),
        (lambda: hf_model(num_group_tokens=[0, 0, 0]), r"a stage with group tokens, got \[0, 0, 0\]"),
        (lambda: hf_model(image_size=[32, 64]), r"one number of pixels as image_size, got \[32, 64\]"),
    ],
    ids=["another module", "no groups", "oblong"],
)
def test_unusable_models(make, message):
    with pytest.raises(ValueError, match=f"hf_model: expected {message}"):
        GroupViT(make())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\) floating point, got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 30), "divisible by the patch size 8, got 32 x 30"),
    ],
    ids=["three axes", "oblong"],
)
def test_unusable_images(images, message):
    with pytest.raises(ValueError, match=f"images: expected .*{message}"):
        GroupViT(hf_model()).encode_image(images)


def test_without_transformers(monkeypatch):
    model = hf_model()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: GroupViT(model), lambda: GroupViT.from_pretrained("nvidia/groupvit-gcc-yfcc")):
        with pytest.raises(
            ImportError, match="GroupViT needs the package transformers: pip install transformers"
        ):
            call()


def test_through_the_evaluate_command(tmp_path):
    from dataset_files import build

    from segclip_fast.evaluate import main

    hf_model(vocabulary=49408).float().save_pretrained(tmp_path / "model")
    root, output = build(tmp_path / "data", "voc"), tmp_path / "out.json"
    words = ["--dataset", "voc", "--data-root", str(root), "--partial", "--output", str(output)]
    words += ["--model", f"groupvit:{tmp_path / 'model'}", "--device", "cpu", "--workers", "0"]
    assert main([*words, "--stride", "32"]) == 0
    found = json.loads(output.read_text())
    assert found["options"]["threshold"] == 0.95  # of GroupViT's release
    assert found["result"]["images"] == 2
    assert found["checkpoint"]["of"] == "model.safetensors"
