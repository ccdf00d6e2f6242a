"""Two processes, and batches in parts, against one process with the joined batch."""

from __future__ import annotations

import dataclasses
from functools import partial

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
import torchrun
from conftest import assert_close, relative_rms

from segclip_fast import LossConfig, losses
from segclip_fast.training.accumulation import TrainingPass, accumulate, split
from segclip_fast.training.distributed import (
    agree,
    contrastive_global,
    gather_features,
    process_group,
    seed_for,
)

# Of losses and of all gradients as one vector. In float32 they are compared with the float64 of the undivided
# batch in one process, and may be off by twice what that batch itself loses in float32, if it is more. A
# single gradient may be off by three times as much.
TOLERANCE = {"float64": 1e-10, "float32": 1e-6}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes under torchrun found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun.run(worker.__file__, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(worker.WORLD)]


def one_process(dtype: str, kind: str) -> dict:
    """Losses and gradients of the joined batch, by the model's own forward."""
    model = worker.make_model(worker.DTYPES[dtype])
    if kind == "unused":
        model.loss = worker.UNUSED
    if kind == "holds":
        model.loss = LossConfig(mask_false_negatives=True)
    images, tokens, superpixels, noise, holds = worker.joined(model)
    return gradients(model, model(images, tokens, superpixels, noise, holds=holds), backward=True)


def gradients(model, found, backward=False) -> dict:
    if backward:
        found.total.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": {name: value.detach() for name, value in found.named().items()}, "grads": grads}


def together(found: dict) -> torch.Tensor:
    """All gradients that there are as one vector."""
    return torch.cat([grad.flatten().double() for grad in found["grads"].values() if grad is not None])


def assert_same(actual: dict, expected: dict, tolerance: float, plain: dict | None = None) -> None:
    """Losses, all gradients together, each gradient by its maximum.

    `plain`: what one process gives in the precision of `actual`, where `expected` is more precise.
    """
    if plain is not None:
        tolerance = max(tolerance, 2 * relative_rms(together(plain), together(expected)))
    assert actual["losses"].keys() == expected["losses"].keys()
    for name, value in expected["losses"].items():
        assert actual["losses"][name].item() == pytest.approx(value.item(), rel=tolerance), name
    assert actual["grads"].keys() == expected["grads"].keys()
    pairs = {}
    for name, grad in expected["grads"].items():
        found = actual["grads"][name]
        assert (found is None) == (grad is None), name
        if grad is not None:
            assert plain is not None or found.dtype == grad.dtype, name
            pairs[name] = found, grad
    assert_close("gradients", together(actual), together(expected), tolerance)
    largest = max(grad.abs().max() for _, grad in pairs.values())
    for name, (found, grad) in pairs.items():
        scale = grad.abs().max().clamp(min=0.01 * largest)  # those of key biases are 0 but for rounding
        assert ((found - grad).abs().max() / scale).item() < 3 * tolerance, name


CASES = [
    *[("ddp", cut) for cut in worker.SIZES],
    *[(kind, cut) for kind in ("unused", "holds", "fsdp") for cut in ("whole", "uneven")],
]


@pytest.mark.parametrize("dtype", worker.DTYPES)
@pytest.mark.parametrize(("kind", "cut"), CASES, ids=["-".join(case) for case in CASES])
def test_two_processes_equal_one(ranks, kind, cut, dtype):
    expected = one_process(dtype, kind)
    if kind == "unused":
        assert any(grad is None for grad in expected["grads"].values())
    for found in ranks:
        plain = expected if dtype == "float32" else None
        exact = expected if plain is None else one_process("float64", kind)
        assert_same(found[kind, dtype, cut], exact, TOLERANCE[dtype], plain)


def test_masked_negatives_matter():
    plain, masked = (one_process("float64", kind)["losses"]["contrastive"] for kind in ("ddp", "holds"))
    assert abs(plain - masked) > 1e-3


def test_fsdp_shards(ranks):
    count = len(list(worker.make_model(torch.float32).parameters()))
    assert ranks[0]["fsdp", "float64", "uneven"]["sharded"] == count - 1  # all but the logit scale


@pytest.mark.parametrize("cut", [name for name in worker.SIZES if name != "whole"])
def test_gradients_travel_once(ranks, cut):
    for found in ranks:
        once = found["ddp", "float64", "whole"]["messages"]
        assert once >= 1
        assert found["ddp", "float64", cut]["messages"] == once


def test_gather_by_hand(ranks):
    for rank, found in enumerate(ranks):
        assert found["place"].rank == found["place"].local_rank == rank
        assert found["place"].world == 2
        assert found["place"].device.type == "cpu"
        rows = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 3)
        assert torch.equal(found["by_hand"]["gathered"], rows)
        # Rows of rank 0 have the factors 1, 2 on rank 0 and 2, 4 on rank 1; those of rank 1: 3, 4 and 6, 8.
        sums = torch.tensor([[3.0, 6.0], [9.0, 12.0]][rank])[:, None].expand(2, 3)
        assert torch.equal(found["by_hand"]["grad"], sums)


def test_unequal_ranks_fail_everywhere(ranks):
    for found in ranks:
        assert "expected the same rows" in found["unequal"]
        assert "rank 0: (2, 3, 4), rank 1: (3, 3, 4)" in found["unequal"]
        assert "rank 0: (2, 3, 4), rank 1: (2, 3, 8)" in found["dtypes"]


def test_ranks_agree(ranks):
    for found in ranks:
        assert found["agree"] == [False, True, True]


# --- in one process


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 2, 5, 11, 12, 20])
def test_any_cut_gives_the_whole(size, dtype):
    """With seeds as noise, which count images from the start of the batch."""
    results = []
    for parts, kind in ((False, "float64"), (False, dtype), (True, dtype)):
        model = worker.make_model(worker.DTYPES[kind])
        images, tokens, superpixels, noise, _ = worker.joined(model)
        drawn = model.draw_noise(images, torch.Generator().manual_seed(3))
        noise = dataclasses.replace(drawn, mask=noise.mask)
        if parts:
            batch = split(model, images, tokens, superpixels, noise, size)
            assert [len(part.images) for part in batch[:-1]] == [size] * (len(batch) - 1)
            found = accumulate(TrainingPass(model), batch)
            assert not any(value.requires_grad for value in found.named().values())
            results.append(gradients(model, found))
        else:
            results.append(gradients(model, model(images, tokens, superpixels, noise), backward=True))
    exact, plain, cut = results
    assert_same(cut, exact, TOLERANCE[dtype], plain if dtype == "float32" else None)


@pytest.mark.parametrize("name", ["contrastive", "reconstruction", "superpixel_kl"])
@pytest.mark.parametrize("size", [4, 12])
def test_terms_of_weight_zero_stay_out(name, size):
    results = []
    for cut in (None, size):
        model = worker.make_model(torch.float64)
        model.loss = LossConfig(**{"superpixel_kl": 0.5, "reconstruction": 2.0, name: 0.0})
        images, tokens, superpixels, noise, _ = worker.joined(model)
        if cut:
            found = accumulate(TrainingPass(model), split(model, images, tokens, superpixels, noise, cut))
            results.append(gradients(model, found))
        else:
            results.append(gradients(model, model(images, tokens, superpixels, noise), backward=True))
    assert name not in results[0]["losses"]
    assert_same(results[1], results[0], 1e-10)


def test_gradients_add_up():
    model = worker.make_model(torch.float64)
    batch = worker.mine(model, 0, 4)
    accumulate(TrainingPass(model), batch)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    accumulate(TrainingPass(model), batch)
    for parameter, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_autocast_stays_in_the_forward_passes():
    model = worker.make_model(torch.float32)
    seen = []

    def loss(image, text, scale):
        seen.append((image.dtype, torch.is_autocast_enabled("cpu")))
        return contrastive_global(image, text, scale)

    context = partial(torch.autocast, "cpu", torch.bfloat16)
    found = accumulate(TrainingPass(model), worker.mine(model, 0, 4), loss, context)
    assert seen == [(torch.bfloat16, False)]
    assert torch.isfinite(found.total)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_alone_it_is_the_contrastive_loss(masked):
    image, text = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_()
    holds = torch.rand(5, 5) < 0.3 if masked else None
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    ours, theirs = (form(image, text, scale, holds) for form in (contrastive_global, losses.contrastive))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (image, text, scale)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_logits_are_wide_under_autocast():
    image, text = torch.randn(2, 16, 8)
    scale = torch.tensor(4.6)
    exact = contrastive_global(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_global(image, text, scale) == exact


def test_one_process_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group("gloo") as place:
        assert (place.rank, place.world, place.local_rank) == (0, 1, 0)
        assert not dist.is_initialized()
        x = torch.zeros(2, 3)
        assert gather_features(x) is x
        assert agree(True, place.device)
        assert not agree(False, place.device)


def test_torchrun_with_one_process_has_a_group(monkeypatch):
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in {**values, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)

    def fail():
        with process_group("gloo"):
            raise RuntimeError(f"{dist.get_world_size()} in the block")

    with pytest.raises(RuntimeError, match="1 in the block"):
        fail()
    assert not dist.is_initialized()


def test_seeds_of_ranks():
    assert seed_for(42, 0) == 42
    seeds = {seed_for(seed, rank) for seed in range(20) for rank in range(1, 50)}
    assert len(seeds) == 20 * 49
    assert all(50 < seed < 2**40 for seed in seeds)
    assert seed_for(42, 1) == seed_for(42, 1)


def test_bad_input():
    good = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"x: expected \(B, E\), got \(2,\)"):
        gather_features(torch.zeros(2))
    with pytest.raises(ValueError, match=r"image, text: expected two equal \(B, E\)"):
        contrastive_global(good, good[:1], torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"holds: expected \(2, 2\) bool"):
        contrastive_global(good, good, torch.tensor(0.0), torch.zeros(2, 2))
    with (
        pytest.raises(ValueError, match="backend: expected 'nccl' or 'gloo', got 'mpi'"),
        process_group("mpi"),
    ):
        pass
    model = worker.make_model(torch.float32)
    with pytest.raises(ValueError, match="micro_batches: expected at least one"):
        accumulate(TrainingPass(model), [])
    images, tokens, superpixels, noise, _ = worker.joined(model)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        split(model, images, tokens, superpixels, noise, 0)
