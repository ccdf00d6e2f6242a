"""The model as a whole: shapes, sizes, replay, back ends, gradients, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import assert_close
from small import small_config, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from segclip_fast import LossConfig, Noise, SegCLIP
from segclip_fast.config import preset
from segclip_fast.model.reconstruction import mask_patches, patchify, sincos_positions


def batch(model, B=3, dtype=torch.float32):
    config = model.config
    images = torch.randn(B, 3, config.vision.image_size, config.vision.image_size, dtype=dtype)
    tokens = model.tokenize(["a photo of cat", "dog and sofa", "grass"][:B])
    superpixels = torch.randint(4, (B, config.vision.grid, config.vision.grid))
    return images, tokens, superpixels


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (16, 64), (40, 24)], ids=str)
def test_features_at_any_size(size):
    model = small_model().eval()
    features = model.encode_image(torch.randn(2, 3, *size))
    N = size[0] // 8 * (size[1] // 8)
    assert features.image.shape == (2, 16)
    assert features.regions.shape == (2, 3, 16)
    for values in (features.logits, features.soft, features.hard):
        assert values.shape == (2, 3, N)
    torch.testing.assert_close(features.soft.sum(dim=1), torch.ones(2, N))
    assert torch.equal(features.hard.argmax(dim=1), features.logits.argmax(dim=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"grouping__centers": 1},
        {"grouping__centers": 64},
        {"grouping__cross_layers": 0},
        {"grouping__cross_layers": 4},
        {"vision__group_after": 0},
        {"vision__group_after": 3},
        {"vision__patch_size": 4},
        {"vision__image_size": 40},
        {"vision__heads": 12},
        {"vision__activation": "gelu"},
        {"reconstruction__enabled": False},
        {"reconstruction__mask_ratio": 0.5},
    ],
    ids=str,
)
def test_every_architecture_trains(changes):
    model = small_model(**changes)
    losses = model(*batch(model))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert (losses.reconstruction is None) == (not model.config.reconstruction.enabled)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("name", ["vit_b16", "vit_b32", "vit_l14", "scenes_tiny"])
def test_presets(name):
    with torch.device("meta"):
        model = SegCLIP(preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    tensors = len(model.state_dict()) + 1  # the fixed decoder positions are not stored
    if name == "vit_b16":
        assert tensors == 415
        assert count == 188_799_561 - 197 * 384 - 768  # positions and [CLS] are no parameters here
    assert (count > 1.5e8) == (name != "scenes_tiny")
    grid = {"vit_b16": 14, "vit_b32": 7, "vit_l14": 16, "scenes_tiny": 8}[name]
    assert model.vision.position_embedding.shape == (grid**2 + 1, model.config.vision.width)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset: expected one of .*got 'vit_x'"):
        preset("vit_x")


def test_a_step_can_be_replayed():
    model = small_model()
    inputs = batch(model)
    noise = model.draw_noise(inputs[0], torch.Generator().manual_seed(5))
    drawn = model(*inputs, generator=torch.Generator().manual_seed(5))
    replayed = model(*inputs, noise)
    other = model(*inputs, generator=torch.Generator().manual_seed(6))
    assert torch.equal(drawn.total, replayed.total)
    assert not torch.equal(drawn.total, other.total)


def test_encode_image_is_clean_in_training_mode():
    model = small_model().train()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(images).image, model.eval().encode_image(images).image)


@pytest.mark.parametrize("form", ["paper", "official"])
def test_fast_path_equals_the_literal_one(form):
    """Absorbed projections, packed text, one pass for both images, segment sums: the same numbers."""
    model = small_model().double()
    model.loss = LossConfig(kl_form=form)
    images, tokens, superpixels = batch(model, dtype=torch.float64)
    assert len(set(tokens.argmax(dim=1).tolist())) > 1  # texts of different lengths
    noise = model.draw_noise(images, torch.Generator().manual_seed(1))
    noise = Noise(noise.full, noise.mask.double(), noise.masked)
    results = []
    for backend in ("auto", "fused", "reference"):
        model.backend = backend
        losses = model(images, tokens, superpixels, noise)
        grads = torch.autograd.grad(losses.total, list(model.parameters()))
        features = model.encode_image(images)
        results.append([*losses.named().values(), features.image, features.regions, features.soft, *grads])
    names = ["total", "contrastive", "reconstruction", "superpixel_kl", "image", "regions", "soft"]
    for fast in results[:2]:
        for name, value, reference in zip(
            [*names, *dict(model.named_parameters())], fast, results[2], strict=True
        ):
            assert value.dtype == torch.float64, name
            # The gradient of the key bias is zero: softmax does not see it.
            scale = reference.abs().max().clamp(min=1e-8)
            assert ((value - reference).abs().max() / scale).item() < 1e-10, name


def test_backend_of_a_model():
    assert SegCLIP(small_config(), backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="backend: expected one of .* got 'fastest'"):
        SegCLIP(small_config(), backend="fastest")


def test_terms_of_weight_zero_are_left_out():
    model = small_model()
    images, tokens, superpixels = batch(model)
    model.loss = LossConfig(reconstruction=0.0, superpixel_kl=0.5)
    losses = model(images, tokens, superpixels)
    assert losses.reconstruction is None
    expected = losses.contrastive + 0.5 * losses.superpixel_kl
    assert losses.total.item() == pytest.approx(expected.item())
    assert model(images, tokens).superpixel_kl is None


def test_false_negatives_are_masked_only_if_asked():
    model = small_model()
    images, tokens, superpixels = batch(model)
    noise = model.draw_noise(images)
    holds = torch.ones(3, 3, dtype=torch.bool)
    strict = model(images, tokens, superpixels, noise, holds=holds).contrastive
    model.loss = dataclasses.replace(model.loss, mask_false_negatives=True)
    lenient = model(images, tokens, superpixels, noise, holds=holds).contrastive
    assert strict.item() > 0.5
    assert lenient.item() == pytest.approx(0.0, abs=1e-6)


def test_text_after_the_end_token_is_ignored():
    model = small_model().eval()
    tokens = model.tokenize(["cat and dog"])
    changed = tokens.clone()
    changed[0, tokens.argmax() + 1 :] = 1
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(changed))
    torch.testing.assert_close(model.encode_text(tokens[:, :5]), model.encode_text(tokens))


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("auto", "aot_eager"),
        ("auto", "inductor"),
        ("reference", "aot_eager"),
        pytest.param("reference", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_break(backend, compiler):
    """Training step and inference. No break also means that nothing waits for the device."""
    torch._dynamo.reset()
    model = SegCLIP(small_config(), backend=backend)
    inputs = batch(model)
    noise = model.draw_noise(inputs[0])
    parameters = dict(model.named_parameters())
    step = torch.compile(model, fullgraph=True, backend=compiler)
    results = []
    for function in (step, model):
        losses = function(*inputs, noise)
        grads = torch.autograd.grad(losses.total, list(parameters.values()))
        results.append([*losses.named().values(), *grads])
    names = ["total", "contrastive", "reconstruction", "superpixel_kl", *parameters]
    for name, actual, expected in zip(names, *results, strict=True):
        if expected.abs().max() > 1e-8:
            assert_close(name, actual, expected, 1e-4)
    with torch.no_grad():
        encode = torch.compile(model.encode_image, fullgraph=True, backend=compiler)
        assert_close("regions", encode(inputs[0]).regions, model.encode_image(inputs[0]).regions, 1e-5)
        write = torch.compile(model.encode_text, fullgraph=True, backend=compiler)
        assert_close("text", write(inputs[1]), model.encode_text(inputs[1]), 1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_keeps_softmax_norms_and_losses_in_float32(backend):
    found: dict[str, set] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            first = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(first, torch.Tensor):
                found.setdefault(function._schema.name, set()).add(first.dtype)
            return result

    model = SegCLIP(small_config(), backend=backend)
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16), Record():
        losses = model(*inputs)
        losses.total.backward()
        features = model.encode_image(inputs[0])
    assert torch.bfloat16 in found["aten::mm"]
    for name in ("softmax", "_softmax", "_log_softmax", "native_layer_norm", "native_layer_norm_backward"):
        assert found.get(f"aten::{name}", {torch.float32}) == {torch.float32}, name
    assert "aten::native_layer_norm" in found
    assert {value.dtype for value in losses.named().values()} == {torch.float32}
    assert features.soft.dtype == features.logits.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_half_precision_model_runs():
    model = small_model().bfloat16()
    images, tokens, superpixels = batch(model, dtype=torch.bfloat16)
    model(images, tokens, superpixels).total.backward()
    assert model.encode_image(images).regions.dtype == torch.bfloat16


def test_masking_keeps_the_least_noise():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    masking = mask_patches(noise, 2)
    assert masking.keep.tolist() == [[1, 3]]
    assert masking.hidden.tolist() == [[1, 0, 1, 0]]
    tokens = torch.arange(4.0)[None, :, None]
    hidden = torch.full((1, 2, 1), -1.0)
    restored = torch.cat([masking.select(tokens), hidden], 1).gather(1, masking.restore[:, :, None])
    assert restored.flatten().tolist() == [-1, 1, -1, 3]


def test_kept_patches():
    assert small_config().reconstruction.kept(196) == 48
    assert small_config().reconstruction.kept(1) == 1


def test_patchify_orders_row_column_channel():
    images = torch.arange(3 * 4 * 4.0).reshape(1, 3, 4, 4)
    patches = patchify(images, 2)
    assert patches.shape == (1, 4, 12)
    assert patches[0, 1, :6].tolist() == [2, 18, 34, 3, 19, 35]  # pixel (0, 2), then (0, 3), all channels


def test_sincos_positions():
    table = sincos_positions(3, 8)
    assert table.shape == (10, 8)
    assert not table[0].any()
    row, column = 2, 1
    expected = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    assert table[1 + 3 * row + column, :4].tolist() == pytest.approx(expected, abs=1e-6)
    assert table[1 + 3 * row + column, 4].item() == pytest.approx(math.sin(2), abs=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"images: expected \(B, 3, H, W\)"),
        (torch.zeros(1, 4, 32, 32), r"images: expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating point"),
        (torch.zeros(1, 3, 33, 32), "divisible by the patch size 8, got 33 x 32"),
        (torch.zeros(1, 3, 0, 32), "divisible by the patch size"),
    ],
    ids=str,
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        small_model().encode_image(images)


def test_bad_tokens_and_superpixels():
    model = small_model()
    images, tokens, superpixels = batch(model)
    with pytest.raises(ValueError, match="tokens: expected"):
        model.encode_text(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens: expected"):
        model.encode_text(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"superpixels: expected \(3, 4, 4\) patch labels"):
        model(images, tokens, superpixels[:, :3])
    with pytest.raises(ValueError, match="images: expected 32 x 32 to reconstruct"):
        model(torch.zeros(3, 3, 40, 40), tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision__image_size": 33},
        {"vision__width": 25},
        {"vision__group_after": 4},
        {"grouping__centers": 65},
        {"grouping__cross_layers": 5},
        {"text__vocab_size": 5},
        {"reconstruction__decoder_width": 18},
        {"reconstruction__mask_ratio": 1.0},
    ],
    ids=str,
)
def test_bad_config(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name.replace("__", ".") + ": expected"):
        small_config(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_step_on_cuda_waits_for_nothing_and_equals_the_reference(where):
    """Any call that would wait for the device raises; tokens on the host are packed, on the device padded."""
    model = small_model().cuda()
    images, given, superpixels = batch(model)
    images, tokens, superpixels = images.cuda(), given.cuda(), superpixels.cuda()
    given = given.to(where)
    noise = model.draw_noise(images)
    model(images, given, superpixels, noise).total.backward()  # attention kernels are timed here
    expected = SegCLIP(small_config(), backend="reference").cuda()
    expected.load_state_dict(model.state_dict())
    try:
        torch.cuda.set_sync_debug_mode("error")
        model.zero_grad()
        losses = model(images, given, superpixels, noise)
        losses.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference = expected(images, tokens, superpixels, noise)
    reference.total.backward()
    assert_close("total", losses.total, reference.total, 1e-4)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if q.grad is not None and q.grad.abs().max() > 1e-6:
            assert_close(name, p.grad, q.grad, 1e-2)


@pytest.mark.gpu
def test_step_in_a_cuda_graph():
    model = small_model().cuda()
    inputs = [x.cuda() for x in batch(model)]
    noise = model.draw_noise(inputs[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            expected = model(*inputs, noise).total
            expected.backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = model(*inputs, noise).total
        total.backward()
    graph.replay()
    assert_close("total", total, expected, 1e-4)
