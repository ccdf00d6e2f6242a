"""A model made ready for a step: compiled, checkpointed, and shared by several processes (DDP or FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..config import TrainConfig
from ..interop.checkpoint import build
from ..model.layers import Block
from ..model.segclip import SegCLIP
from .accumulation import Step, TrainingPass
from .distributed import Place, average_gradients, own_rank


def wrap(model: SegCLIP, config: TrainConfig, place: Place) -> Step:
    """What a step calls, for a model that is on its device already.

    With FSDP2 the parameters of `model` become sharded tensors; make the optimizer afterwards.
    """
    step = TrainingPass(model)
    if config.grad_checkpointing:
        for module in blocks(model):
            module.checkpointed = True
    if config.torchcompile:
        _compile(step, model, sharded=config.fsdp and place.world > 1)
    if place.world == 1:
        return step
    if config.fsdp:
        _shard(step, place)
        return step
    # A weight of 0 leaves parameters without a gradient, and DDP would wait for theirs.
    weights = model.loss
    partly = 0 in (weights.contrastive, weights.reconstruction)
    return DistributedDataParallel(
        step, broadcast_buffers=False, find_unused_parameters=partly, gradient_as_bucket_view=True
    )


def blocks(model: SegCLIP) -> list[Block]:
    """The transformer blocks, in which most activations lie."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _compile(step: TrainingPass, model: SegCLIP, sharded: bool) -> None:
    if not sharded:
        step.compile()
        return
    for block in blocks(model):  # FSDP2 gathers parameters between them, outside of compiled code
        block.compile()


def _shard(step: TrainingPass, place: Place) -> None:
    mesh = init_device_mesh(place.device.type, (place.world,))
    for block in blocks(step.model):
        fully_shard(block, mesh=mesh)
    # It takes no scalars: every process keeps the logit scale.
    fully_shard(step, mesh=mesh, ignored_params={step.model.logit_scale})
    if torch.distributed.get_backend() == "gloo":  # which has no mean
        for module in step.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


# --- gradients


def finish_gradients(step: Step) -> None:
    """Average those gradients that the wrapper leaves alone."""
    if isinstance(step, TrainingPass) and isinstance(step, FSDPModule):
        average_gradients([step.model.logit_scale])


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """() norm of all gradients as one vector, the same on every rank."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    whole_ones = [grad for grad in grads if not isinstance(grad, DTensor)]
    norms = [whole(nn.utils.get_total_norm(part)) for part in (sharded, whole_ones) if part]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


# --- whole values


def whole(value: Tensor) -> Tensor:
    """A tensor with all of its parts; every rank must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, whole and in host memory, on rank 0; the others help, and get none."""
    gathered = ((name, whole(value.detach())) for name, value in values.items())
    first = own_rank() == 0
    return {name: value.cpu().contiguous() for name, value in gathered if first}


def put_whole(target: Tensor, value: Tensor) -> Tensor:
    """`value`, whole on every rank, placed and cut as `target` is."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@contextlib.contextmanager
def plain(model: SegCLIP) -> Iterator[SegCLIP]:
    """The model for other uses than a training step; of a sharded one it is a whole copy."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield model
        return
    device = model.logit_scale.device
    copy = build(type(model), model.config, model.loss)
    copy.backend = model.backend
    copy.load_state_dict({name: whole(value.detach()).cpu() for name, value in model.state_dict().items()})
    yield copy.to(device).train(model.training)
