"""MaskCLIP: patch features against the formula by hand, CLIP's own outputs untouched, and every refusal."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segclip_fast.baselines import renormalise
from segclip_fast.baselines.maskclip import MaskCLIP
from segclip_fast.data.transforms import CLIP_MEAN, CLIP_STD
from segclip_fast.evaluation.segmentation import segment
from segclip_fast.evaluation.segmenter import PatchFeatures

open_clip = pytest.importorskip("open_clip", reason="needs the package open_clip_torch")
CLIP, CLIPTextCfg, CLIPVisionCfg = (
    getattr(open_clip.model, name) for name in ("CLIP", "CLIPTextCfg", "CLIPVisionCfg")
)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
D, E, PATCH = 24, 20, 8
GRIDS = [(4, 4), (2, 4), (1, 5), (6, 3), (8, 8)]  # the first is the training grid


def vision(**changes) -> dict:
    return {"layers": 3, "width": D, "head_width": 8, "patch_size": PATCH, "image_size": 32} | changes


def words(texts: list[str]) -> torch.Tensor:
    """One id per letter, 49 ends."""
    ids = torch.zeros(len(texts), 12, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        letters = [1 + ord(letter) % 40 for letter in text[:11]]
        row[: len(letters) + 1] = torch.tensor([*letters, 49])
    return ids


def clip(seed: int = 0, quick_gelu: bool = True, **changes) -> CLIP:
    """A small CLIP in float64 with parameters away from their initial ones and zeros."""
    torch.manual_seed(seed)
    text = CLIPTextCfg(context_length=12, vocab_size=50, width=16, heads=2, layers=2)
    model = CLIP(E, CLIPVisionCfg(**vision(**changes)), text, quick_gelu=quick_gelu)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def photos(rows: int, columns: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    shape = (count, 3, PATCH * rows, PATCH * columns)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return centred / deviation * layer.weight + layer.bias


def by_hand(model: CLIP, images: torch.Tensor, residual: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Image feature and patch features, op by op; only the earlier blocks and resizing are the libraries'."""
    tower = model.visual
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    pieces = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, rows, columns, PATCH, PATCH)
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).reshape(len(images), rows * columns, -1)
    tokens = pieces @ tower.conv1.weight.flatten(1).T
    tokens = torch.cat([tower.class_embedding.expand(len(images), 1, D), tokens], dim=1)
    table = tower.positional_embedding[1:].reshape(4, 4, D).permute(2, 0, 1)[None]
    if (rows, columns) != (4, 4):
        table = F.interpolate(table, size=(rows, columns), mode="bicubic")
    places = torch.stack([table[0, :, r, c] for r in range(rows) for c in range(columns)])
    x = norm(tokens + torch.cat([tower.positional_embedding[:1], places]), tower.ln_pre)
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    last = tower.transformer.resblocks[-1]
    image = norm(last(x)[:, 0], tower.ln_post) @ tower.proj
    v = norm(x, last.ln_1) @ last.attn.in_proj_weight[2 * D :].T + last.attn.in_proj_bias[2 * D :]
    y = v @ last.attn.out_proj.weight.T + last.attn.out_proj.bias
    if residual:
        y = x + y
        hidden = norm(y, last.ln_2) @ last.mlp.c_fc.weight.T + last.mlp.c_fc.bias
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        y = y + hidden @ last.mlp.c_proj.weight.T + last.mlp.c_proj.bias
    return image, (norm(y, tower.ln_post) @ tower.proj)[:, 1:]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_features_by_hand(grid, residual):
    model, images = clip(), photos(*grid)
    with torch.no_grad():
        found = MaskCLIP(model, words, residual=residual).encode_image(images)
        image, patches = by_hand(model, images, residual)
    assert isinstance(found, PatchFeatures)
    assert found.patches.shape == (2, grid[0] * grid[1], E)
    torch.testing.assert_close(found.patches, patches, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.image, image, rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.5}, {"no_ln_pre": True}], ids=str)
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_itself_is_unchanged(quick_gelu, changes):
    model, images = clip(quick_gelu=quick_gelu, **changes), photos(4, 4)
    maskclip = MaskCLIP(model, words)
    tokens = maskclip.tokenize(("a cat", "dog"))
    with torch.no_grad():
        expected = model.encode_image(images)
        found = maskclip.encode_image(images)
        assert torch.equal(found.image, expected)
        assert torch.equal(model.encode_image(images), expected)  # no hook is left, no position replaced
        assert torch.equal(maskclip.encode_text(tokens), model.encode_text(words(["a cat", "dog"])))
    assert not model.visual.transformer.resblocks[-1]._forward_pre_hooks
    assert (maskclip.image_size, maskclip.patch_size) == (32, PATCH)
    assert MaskCLIP(model, words, image_size=64).image_size == 64
    assert torch.equal(maskclip.logit_scale, model.logit_scale)


def test_layer_scale_is_in_the_value_path():
    model, images = clip(ls_init_value=0.5), photos(4, 4)
    maskclip = MaskCLIP(model, words, residual=False)
    with torch.no_grad():
        before = maskclip.encode_image(images).patches
        model.visual.transformer.resblocks[-1].ls_1.gamma[0] *= 3
        assert not torch.allclose(maskclip.encode_image(images).patches, before)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("rows", "changes_patches"),
    [((0, D), False), ((D, 2 * D), False), ((2 * D, 3 * D), True)],
    ids=["q", "k", "v"],
)
def test_queries_and_keys_of_the_last_block(rows, changes_patches, residual):
    model, images = clip(), photos(4, 4)
    maskclip = MaskCLIP(model, words, residual=residual)
    attention = model.visual.transformer.resblocks[-1].attn
    with torch.no_grad():
        before = maskclip.encode_image(images)
        attention.in_proj_weight[slice(*rows)] += torch.randn(D, D, dtype=torch.float64)
        attention.in_proj_bias[slice(*rows)] += 1
        after = maskclip.encode_image(images)
    assert torch.equal(before.patches, after.patches) == (not changes_patches)
    assert not torch.equal(before.image, after.image)


def test_a_patch_moves_others_through_earlier_blocks_only():
    """With one block, nothing but its own pixels reaches a patch feature."""
    maskclip, images = MaskCLIP(clip(layers=1), words), photos(4, 4, count=1)
    changed = images.clone()
    changed[..., :PATCH, :PATCH] += 1
    with torch.no_grad():
        difference = maskclip.encode_image(images).patches - maskclip.encode_image(changed).patches
    assert difference[0, 0].abs().max() > 1e-3
    assert not difference[0, 1:].any()


def test_gradients_reach_the_values():
    model = clip()
    MaskCLIP(model, words).encode_image(photos(2, 4)).patches.square().sum().backward()
    gradient = model.visual.transformer.resblocks[-1].attn.in_proj_weight.grad
    assert not gradient[: 2 * D].any()
    assert gradient[2 * D :].any()
    assert model.visual.positional_embedding.grad.any()


def test_batch_second_layout():
    model, images = clip(), photos(2, 4)
    with torch.no_grad():
        expected = MaskCLIP(model, words).encode_image(images)
        model.visual.transformer.batch_first = False
        for block in model.visual.transformer.resblocks:
            block.attn.batch_first = False
        found = MaskCLIP(model, words).encode_image(images)
    torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.image, expected.image, rtol=0, atol=1e-10)


def test_other_normalisation():
    """Weights trained with another mean and deviation see the pixels as they were normalised then."""
    model, pixels = clip(), photos(4, 4).sigmoid()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    handed = (pixels - torch.tensor(CLIP_MEAN).double().view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    trained = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(renormalise(handed, mean, std), trained, rtol=0, atol=1e-6)
    assert renormalise(handed, list(CLIP_MEAN), list(CLIP_STD)) is handed
    model.visual.image_mean, model.visual.image_std = mean, std
    with torch.no_grad():
        found = MaskCLIP(model, words).encode_image(handed).image
        torch.testing.assert_close(found, model.encode_image(trained), rtol=0, atol=1e-5)


def test_evaluation_runs():
    maskclip = MaskCLIP(clip().float(), words)
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    found = segment(maskclip, image, ["a cat", "grass"])
    assert found.labels.shape == (40, 90)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, "VisionTransformer, got ModifiedResNet"),
        ({"attentional_pool": True, "attn_pooler_heads": 4}, r"\[CLS\] pooling \('tok'\), got 'attentional'"),
        ({"pool_type": "avg"}, r"\[CLS\] pooling \('tok'\), got 'avg'"),
        ({"qk_norm": True}, "nn.MultiheadAttention with one projection in the last block, got Attention"),
        ({"image_size": (32, 64)}, r"a square image_size, got \(32, 64\)"),
    ],
    ids=["resnet", "attentional", "average", "scaled attention", "oblong"],
)
def test_other_towers_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"clip_model: expected .*{message}"):
        MaskCLIP(clip(**changes), words)


def test_not_a_clip():
    with pytest.raises(ValueError, match="clip_model: expected .*VisionTransformer, got NoneType"):
        MaskCLIP(torch.nn.Linear(2, 2), words)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\) floating point, got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"floating point, got .* torch.uint8"),
        (torch.zeros(1, 3, 32, 30), "divisible by the patch size 8, got 32 x 30"),
        (torch.zeros(1, 3, 0, 32), "divisible by the patch size 8, got 0 x 32"),
    ],
    ids=["three axes", "integers", "oblong", "empty"],
)
def test_unusable_images(images, message):
    with pytest.raises(ValueError, match=f"images: expected .*{message}"):
        MaskCLIP(clip(), words).encode_image(images)


def test_patch_dropout():
    maskclip = MaskCLIP(clip(patch_dropout=0.5), words)
    assert maskclip.encode_image(photos(4, 4)).patches.shape == (2, 16, E)
    with pytest.raises(ValueError, match=r"patch dropout needs model.eval\(\)"):
        maskclip.train().encode_image(photos(4, 4))


@pytest.fixture
def small_name(tmp_path):
    """A small architecture that open_clip knows by name for the time of a test."""

    known, paths = dict(open_clip.factory._MODEL_CONFIGS), list(open_clip.factory._MODEL_CONFIG_PATHS)
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": E, "quick_gelu": True, "vision_cfg": vision(), "text_cfg": text}
    (tmp_path / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    yield "small-clip"
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(known)


def same(a: MaskCLIP, b: MaskCLIP) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_by_name(small_name, tmp_path):
    maskclip = MaskCLIP.from_open_clip(small_name)
    assert not maskclip.training
    assert maskclip.residual
    tokens = maskclip.tokenize(["a photo of a cat."])
    assert tokens.tolist() == [[49406, 320, 1125, 539, 320, 2368, 269, 49407, 0, 0, 0, 0]]
    assert maskclip.encode_text(tokens).shape == (1, E)
    torch.save(maskclip.clip.state_dict(), tmp_path / "weights.pt")
    loaded = MaskCLIP.from_open_clip(small_name, str(tmp_path / "weights.pt"), residual=False, image_size=64)
    assert same(maskclip, loaded)
    assert (loaded.residual, loaded.image_size) == (False, 64)
    assert not same(maskclip, MaskCLIP.from_open_clip(small_name))  # random weights are others


def archive(values: dict[str, torch.Tensor], path) -> None:
    """Write tensors as OpenAI distributes CLIP: TorchScript, with three numbers beside the weights."""
    root = torch.nn.Module()
    for name, value in (values | {"input_resolution": torch.tensor(32)}).items():
        *parents, leaf = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        place.register_buffer(leaf, value)
    torch.jit.script(root).save(str(path))


def test_openai_archive(small_name, tmp_path):
    maskclip = MaskCLIP.from_open_clip(small_name)
    archive(maskclip.clip.state_dict(), tmp_path / "ViT.pt")
    assert same(maskclip, MaskCLIP.from_open_clip(small_name, str(tmp_path / "ViT.pt")))
    archive(maskclip.clip.visual.state_dict(), tmp_path / "part.pt")
    with pytest.raises(ValueError, match="pretrained: expected weights of small-clip.*part.pt.*Missing key"):
        MaskCLIP.from_open_clip(small_name, str(tmp_path / "part.pt"))


def test_unusable_weights(small_name, tmp_path):
    with pytest.raises(ValueError, match=r"pretrained: expected one of \[\] or a file, got 'openai'"):
        MaskCLIP.from_open_clip(small_name, "openai")
    with pytest.raises(FileNotFoundError, match="pretrained: expected a tag or a file, found nothing"):
        MaskCLIP.from_open_clip(small_name, str(tmp_path / "none.pt"))
    weights = MaskCLIP.from_open_clip(small_name).clip.state_dict()
    torch.save(weights | {"visual.proj": torch.zeros(3, 3)}, tmp_path / "shape.pt")
    (tmp_path / "broken.pt").write_bytes(b"no torch file")
    for name in ("shape.pt", "broken.pt"):
        with pytest.raises(ValueError, match=f"pretrained: expected weights of {small_name}, got .*{name}"):
            MaskCLIP.from_open_clip(small_name, str(tmp_path / name))


def test_code_in_weights_is_not_run(small_name, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"visual.proj": Code()}, tmp_path / "code.pt")
    disguised = shutil.copy(tmp_path / "code.pt", tmp_path / "disguised.pt")
    with zipfile.ZipFile(disguised, "a") as file:
        file.writestr("code/sub/constants.pkl", b"")  # an archive at first sight only
    for path in (tmp_path / "code.pt", disguised):
        with pytest.raises(ValueError, match="pretrained: expected weights"):
            MaskCLIP.from_open_clip(small_name, str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-Z-99", r"one of open_clip.list_models\(\), got 'ViT-Z-99'"),
        ("RN50", "open_clip's ViT as image tower, got 'RN50'"),
        ("ViT-B-16-SigLIP", "open_clip's ViT as image tower, got 'ViT-B-16-SigLIP'"),
        ("convnext_base", "open_clip's ViT as image tower, got 'convnext_base'"),
        ("coca_ViT-B-32", r"\[CLS\] pooling, got another with 'coca_ViT-B-32'"),
        ("ViT-L-14-CLIPA", r"\[CLS\] pooling, got another with 'ViT-L-14-CLIPA'"),
    ],
)
def test_other_names_are_refused_before_weights(name, message, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("built a model"))
    with pytest.raises(ValueError, match=f"name: expected .*{message}"):
        MaskCLIP.from_open_clip(name)


@pytest.mark.parametrize("protocol", ["official", "paper"])
def test_through_the_evaluate_command(small_name, tmp_path, protocol):
    from dataset_files import build

    from segclip_fast.evaluate import main

    root, output = build(tmp_path / "data", "voc"), tmp_path / "out.json"
    words = ["--dataset", "voc", "--data-root", str(root), "--partial", "--output", str(output)]
    words += ["--model", f"maskclip:{small_name}", "--device", "cpu", "--workers", "0"]
    assert main([*words, "--protocol", protocol, "--background-names", "wall, sky", "--snap"]) == 0
    found = json.loads(output.read_text())
    assert (found["protocol"], found["refinement"]) == (protocol, "snap")
    assert found["result"]["images"] == 2
    assert found["checkpoint"]["of"] == "the values in memory, by name"
