"""Checkpoints: round trips in both layouts, CLIP's towers, and every refusal."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
import torch
from small import small_config, small_model

from segclip_fast import LossConfig, SegCLIP
from segclip_fast.config import GroupingConfig, ReconstructionConfig, SegCLIPConfig, TextConfig, VisionConfig
from segclip_fast.interop import files
from segclip_fast.interop.authors import infer_config, to_authors
from segclip_fast.interop.clip import _weights, clip_name, load_clip


def same(a: SegCLIP, b: SegCLIP) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def wide_model() -> SegCLIP:
    """A small model with heads 64 wide, which the authors' layout can describe by its shapes."""
    return SegCLIP(
        SegCLIPConfig(
            embed_dim=32,
            vision=VisionConfig(32, 8, 128, 3, 2, group_after=2),
            grouping=GroupingConfig(centers=3, cross_layers=2),
            text=TextConfig(50, 12, 64, 2, 1),
            reconstruction=ReconstructionConfig(decoder_width=32, decoder_layers=2),
        )
    )


def test_our_folder(tmp_path):
    model = small_model()
    model.loss = LossConfig(kl_form="official", reconstruction=0.5)
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    loaded = SegCLIP.from_pretrained(tmp_path / "model")
    assert same(model, loaded)
    assert (loaded.config, loaded.loss) == (model.config, model.loss)
    assert not loaded.training


def test_loading_leaves_the_random_state_alone(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    SegCLIP.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.rand(2), expected)


def test_authors_layout(tmp_path):
    model = wide_model()
    model.export_authors(tmp_path / "segclip.bin")
    loaded = SegCLIP.from_pretrained(tmp_path / "segclip.bin")
    assert loaded.config == model.config
    assert same(model, loaded)
    state = torch.load(tmp_path / "segclip.bin", weights_only=True)
    assert state["clip.visual.transformer.semantic_layer2.k_conv.weight"].shape == (128, 64, 1)
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "wrapped.bin")
    assert same(model, SegCLIP.from_pretrained(tmp_path / "wrapped.bin"))


def test_authors_layout_without_decoder_is_inference_only(tmp_path):
    model = wide_model()
    values = {name: v for name, v in to_authors(model).items() if not name.startswith("vis_mae_decoder")}
    torch.save(values, tmp_path / "x.bin")
    loaded = SegCLIP.from_pretrained(tmp_path / "x.bin")
    assert loaded.reconstruction is None
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.encode_image(images).image, model.encode_image(images).image)


def test_authors_layout_with_given_config(tmp_path):
    model = small_model()
    model.export_authors(tmp_path / "x.bin")
    assert same(model, SegCLIP.from_pretrained(tmp_path / "x.bin", config=model.config))


def test_another_architecture_lists_the_keys(tmp_path):
    model = wide_model()
    values = to_authors(model)
    values["clip.visual.extra"] = torch.zeros(1)
    del values["clip.ln_final.bias"]
    values["clip.text_projection"] = torch.zeros(64, 32)[:60]
    torch.save(values, tmp_path / "x.bin")
    pattern = (
        r"missing: clip.ln_final.bias.*unexpected: clip.visual.extra.*another shape: clip.text_projection"
    )
    with pytest.raises(ValueError, match=pattern):
        SegCLIP.from_pretrained(tmp_path / "x.bin")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "y.bin")
    with pytest.raises(ValueError, match="expected the release's 415 tensors"):
        SegCLIP.from_pretrained(tmp_path / "y.bin")


def test_folder_of_another_architecture(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["model"]["grouping"]["centers"] = 5
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of another shape: .*grouping.centers"):
        SegCLIP.from_pretrained(tmp_path / "model")
    config["model"]["grouping"]["colour"] = 5
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.grouping: expected fields .*unknown \['colour'\]"):
        SegCLIP.from_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint: expected JSON"):
        SegCLIP.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("kind", ["ours", "authors"])
def test_truncated(tmp_path, kind, share):
    model = wide_model()
    path = tmp_path / "segclip.bin"
    if kind == "ours":
        model.save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
    else:
        model.export_authors(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="checkpoint: expected a complete .*truncated or damaged"):
        SegCLIP.from_pretrained(path.parent if kind == "ours" else path)


class Trap:
    """Touches a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickle_with_code_is_refused_and_not_executed(tmp_path):
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="refused, nothing was executed"):
        SegCLIP.from_pretrained(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps({"weight": Trap(tmp_path / "executed")}))
    with pytest.raises(ValueError, match="checkpoint: expected"):
        SegCLIP.from_pretrained(tmp_path / "y.bin")
    assert not (tmp_path / "executed").exists()


def test_wrong_content(tmp_path):
    torch.save([1, 2], tmp_path / "x.bin")
    with pytest.raises(ValueError, match="expected names and tensors"):
        SegCLIP.from_pretrained(tmp_path / "x.bin")
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(ValueError, match="checkpoint: expected"):
        SegCLIP.from_pretrained(tmp_path / "text.bin")
    with pytest.raises(FileNotFoundError, match="path: expected a checkpoint folder or file"):
        SegCLIP.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        SegCLIP.from_pretrained(tmp_path / "empty")


def test_nothing_is_overwritten_silently(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="folder: expected one without a checkpoint"):
        small_model().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    small_model().save_pretrained(tmp_path / "model", overwrite=True)
    model.export_authors(tmp_path / "x.bin")
    with pytest.raises(FileExistsError, match="path: expected no file"):
        model.export_authors(tmp_path / "x.bin")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- CLIP

open_clip = pytest.importorskip("open_clip")


@pytest.fixture
def tiny_clip(monkeypatch):
    """A tiny open_clip architecture under the name "tiny", and an open_clip model of it."""
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    return open_clip.create_model("tiny")


def test_from_clip_towers_compute_the_same(tiny_clip, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(tiny_clip.state_dict(), path)
    model = SegCLIP.from_clip("tiny", str(path)).eval()
    assert model.config.vision.group_after == 2
    tokens = torch.tensor([[48, 5, 6, 49, 0, 0], [48, 7, 49, 0, 0, 0]])
    padded = torch.nn.functional.pad(tokens, (0, 6))
    tiny_clip.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(tokens), tiny_clip.encode_text(padded), atol=1e-5, rtol=1e-4
        )
        images = torch.randn(2, 3, 32, 32)
        visual = tiny_clip.visual
        x = visual.conv1(images).flatten(2).mT + visual.positional_embedding[1:]
        x = visual.ln_pre(x)
        torch.testing.assert_close(model.vision.embed(images), x, atol=1e-5, rtol=1e-4)
        for block in visual.transformer.resblocks[:2]:
            x = block(x)
        torch.testing.assert_close(
            model.vision.encode_patches(model.vision.embed(images)), x, atol=1e-5, rtol=1e-4
        )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "text.token_embedding.weight" in frozen
    assert len(frozen) == 6


def test_from_clip_maps_every_tensor():
    """All 302 tensors of CLIP ViT-B/16 have a place, and no place is left over."""
    architecture = open_clip.get_model_config("ViT-B-16-quickgelu")
    with torch.device("meta"):
        theirs = open_clip.CLIP(
            architecture["embed_dim"], architecture["vision_cfg"], architecture["text_cfg"], quick_gelu=True
        ).state_dict()
        ours = SegCLIP(SegCLIPConfig()).state_dict()
    theirs = {name: value for name, value in theirs.items() if name != "attn_mask"}
    assert len(theirs) == 302
    places = {
        clip_name(name, 10): value.shape
        for name, value in ours.items()
        if not name.startswith(("vision.grouping.", "reconstruction."))
    }
    assert places == {name: value.shape for name, value in theirs.items()}


def test_from_clip_resizes_positions(tiny_clip, tmp_path):
    torch.save(tiny_clip.state_dict(), tmp_path / "clip.pt")
    model = SegCLIP.from_clip("tiny", str(tmp_path / "clip.pt"), image_size=48)
    assert model.vision.position_embedding.shape == (37, 64)
    assert torch.equal(model.vision.position_embedding[0], tiny_clip.visual.positional_embedding[0])


def test_from_clip_reads_a_scripted_archive(tiny_clip, tmp_path):
    """OpenAI distributes CLIP as a TorchScript archive whose state dict has three scalars more."""

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in tiny_clip.state_dict().items():
                if "." not in name:
                    self.register_buffer(name, value)
            for name, child in tiny_clip.named_children():
                setattr(self, name, child)
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    traced = torch.jit.trace(Holder().eval(), torch.zeros(1), check_trace=False)
    torch.jit.save(traced, tmp_path / "openai.pt")
    with zipfile.ZipFile(tmp_path / "openai.pt") as archive:
        assert any(name.endswith("constants.pkl") for name in archive.namelist())
    model = SegCLIP.from_clip("tiny", str(tmp_path / "openai.pt"))
    assert torch.equal(model.text.projection, tiny_clip.text_projection)


def test_from_clip_refusals(tiny_clip, tmp_path):
    with pytest.raises(ValueError, match="name: expected one of open_clip"):
        SegCLIP.from_clip("ViT-B-17")
    with pytest.raises(ValueError, match="expected a CLIP model with a ViT"):
        SegCLIP.from_clip("RN50")
    with pytest.raises(FileNotFoundError, match="pretrained: expected a tag or a file"):
        SegCLIP.from_clip("tiny", str(tmp_path / "no.pt"))
    with pytest.raises(ValueError, match="pretrained: expected one of"):
        SegCLIP.from_clip("tiny", "openai9")
    values = dict(tiny_clip.state_dict())
    del values["ln_final.weight"]
    with pytest.raises(ValueError, match="missing: ln_final.weight"):
        load_clip(SegCLIP.from_clip("tiny"), values, "file")


def test_a_failed_download_says_what_to_do(monkeypatch):
    open_clip = pytest.importorskip("open_clip")

    def fail(name, pretrained):
        raise RuntimeError("no route to the hub")

    monkeypatch.setattr(open_clip, "create_model", fail)
    message = (
        r"pretrained: expected to download ViT-B-16-quickgelu 'openai', or the path of a file .*no route"
    )
    with pytest.raises(OSError, match=message):
        _weights("ViT-B-16-quickgelu", "openai")


def test_infer_config_needs_the_release():
    with pytest.raises(ValueError, match="release's 415 tensors"):
        infer_config({"a": torch.zeros(1)}, "here")


def test_fresh_values_follow_the_release():
    model = SegCLIP(small_config(vision__width=96, vision__heads=4))
    grouping = model.vision.grouping
    assert grouping.out_mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not grouping.out_mlp.fc1.bias.any()
    bound = (96 // 4) ** -0.5
    assert bound * 0.95 < grouping.key_weight.abs().max().item() <= bound
    xavier = (6 / (4 * 96)) ** 0.5
    assert xavier * 0.98 < grouping.blocks[0].attention.qkv.weight.abs().max().item() <= xavier
    assert model.reconstruction.mix.weight.std().item() < 0.05
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
