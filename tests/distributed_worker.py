"""What torchrun starts for test_distributed, with a folder as argument.

Every rank writes what it found to FOLDER/RANK.pt; the test compares that with one process.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from small import small_model
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from segclip_fast import LossConfig, Noise
from segclip_fast._cli import leave
from segclip_fast.ops.gumbel import gumbel
from segclip_fast.training.accumulation import MicroBatch, TrainingPass, accumulate, split
from segclip_fast.training.distributed import (
    Place,
    agree,
    average_gradients,
    contrastive_global,
    gather_features,
    process_group,
)

WORLD, LOCAL = 2, 6  # processes, pairs of each
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SIZES = {"whole": LOCAL, "equal": 3, "uneven": 4, "single": 1}
UNUSED = LossConfig(contrastive=0.5, reconstruction=0.0)  # leaves parameters without gradient
TEXTS = ("a photo of cat", "dog and sofa", "grass", "cat and grass", "a dog", "photo of sofa")


def make_model(dtype):
    torch.manual_seed(0)
    model = small_model().to(dtype)
    model.logit_scale.data.fill_(1.5)
    return model


def joined(model):
    """The batch of all processes in one: images, tokens, superpixels, noise; and which captions hold."""
    B = WORLD * LOCAL
    generator = torch.Generator().manual_seed(1)
    dtype = model.logit_scale.dtype
    images = torch.randn(B, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    tokens = model.tokenize([TEXTS[i % 5] + " and" * (i // 5) for i in range(B)])
    superpixels = torch.randint(4, (B, 4, 4), generator=generator)
    noise = model.draw_noise(images, generator)
    K = model.config.reconstruction.kept(16)
    noise = Noise(gumbel(noise.full, B, 3, 16), noise.mask, gumbel(noise.masked, B, 3, K))
    holds = torch.rand(B, B, generator=generator) < 0.2
    return images, tokens, superpixels, noise, holds


def mine(model, rank, size) -> list[MicroBatch]:
    images, tokens, superpixels, noise, _ = joined(model)
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    noise = Noise(noise.full[rows], noise.mask[rows], noise.masked[rows])
    return split(model, images[rows], tokens[rows], superpixels[rows], noise, size)


def result(model, losses) -> dict:
    """Losses averaged over the ranks, gradients as this rank has them."""
    values = {}
    for name, value in losses.named().items():
        dist.all_reduce(value)
        values[name] = value / WORLD
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {"losses": values, "grads": grads}


def ddp(place, dtype, size, loss=None, **options) -> dict:
    model = make_model(dtype)
    model.loss = loss or model.loss
    step = DistributedDataParallel(TrainingPass(model), broadcast_buffers=False, **options)
    messages = []

    def count(state, bucket):
        messages.append(bucket.index())
        future = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    step.register_comm_hook(None, count)
    found = result(model, accumulate(step, mine(model, place.rank, size)))
    return {**found, "messages": len(messages)}


def fsdp(place, dtype, size) -> dict:
    model = make_model(dtype)
    step = TrainingPass(model)
    for module in (*model.vision.first_stage, *model.vision.third_stage, model.text):
        fully_shard(module)
    fully_shard(step, ignored_params={model.logit_scale})
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    losses = accumulate(step, mine(model, place.rank, size))
    average_gradients([model.logit_scale])
    sharded = sum(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return {**result(model, losses), "sharded": sharded}


def false_negatives(place, dtype, size) -> dict:
    model = make_model(dtype)
    holds = joined(model)[-1][place.rank * LOCAL : (place.rank + 1) * LOCAL]
    step = DistributedDataParallel(TrainingPass(model))
    loss = partial(contrastive_global, holds=holds)
    return result(model, accumulate(step, mine(model, place.rank, size), loss))


def by_hand(place) -> dict:
    """Rank r weighs the gathered rows by r + 1, 2 (r + 1), 3 (r + 1), ..."""
    x = torch.full((2, 3), float(place.rank), requires_grad=True)
    gathered = gather_features(x)
    factors = (place.rank + 1) * torch.arange(1.0, 5.0)[:, None]
    (gathered * factors).sum().backward()
    return {"gathered": gathered.detach(), "grad": x.grad}


def refusal(x: torch.Tensor) -> str:
    try:
        gather_features(x)
    except ValueError as error:
        return str(error)
    return "none"


def main(folder: Path, place: Place) -> None:
    found: dict = {"place": place}
    found["by_hand"] = by_hand(place)
    found["unequal"] = refusal(torch.zeros(2 + place.rank, 3))
    found["dtypes"] = refusal(torch.zeros(2, 3, dtype=[torch.float32, torch.float64][place.rank]))
    found["agree"] = [agree(flag, place.device) for flag in (False, place.rank == 1, True)]
    for name, dtype in DTYPES.items():
        for cut, size in SIZES.items():
            found["ddp", name, cut] = ddp(place, dtype, size)
        for cut in ("whole", "uneven"):
            found["unused", name, cut] = ddp(place, dtype, SIZES[cut], UNUSED, find_unused_parameters=True)
            found["holds", name, cut] = false_negatives(place, dtype, SIZES[cut])
            found["fsdp", name, cut] = fsdp(place, dtype, SIZES[cut])
    torch.save(found, folder / f"{place.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("gloo", timeout=60) as own:
        main(Path(sys.argv[1]), own)
    leave(0)
