"""Several processes as one: their contrastive loss is that of the joined batch (paper Section 2.4).

Shapes: B pairs of a process, W processes, E joint embedding. Row r B + i of a gathered tensor is row i of
rank r.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..losses import inverse_temperature

_SEED_BYTES = 5  # times the million that a run multiplies its seed by, still a 64-bit integer


@dataclass(frozen=True)
class Place:
    """Where a process stands among all.

    Attributes:
        rank: 0 to world - 1.
        world: number of processes.
        local_rank: number of the process on its machine.
        device: what it computes on.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device


@contextlib.contextmanager
def process_group(
    backend: str | None = None, timeout: float = 600.0, device: str | None = None
) -> Iterator[Place]:
    """The process group that torchrun describes in the environment, for the time of the block.

    Without torchrun there is one process and no group; everything in this module works there as well. A group
    that exists already is taken as it is, and left.

    Args:
        backend: "nccl" (CUDA) or "gloo"; None takes the one of the device.
        timeout: seconds after which a rank that waits in vain for another one fails.
        device: "cuda" or "cpu"; None takes the one of the backend, or CUDA where it works.

    Yields:
        The place of this process.

    Raises:
        ValueError: unknown backend, nccl on a CPU, or more processes on this machine than GPUs.
        OSError: the port of the rendezvous is in use.
    """
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f"backend: expected 'nccl' or 'gloo', got {backend!r}")
    cuda = backend == "nccl" or (backend is None and torch.cuda.is_available())
    device = device or ("cuda" if cuda else "cpu")
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    if backend == "nccl" and device != "cuda":
        raise ValueError(f"backend: expected 'gloo' on device {device!r}, got 'nccl'")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cpu")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK: expected below {torch.cuda.device_count()} GPUs, got {local}")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    if "WORLD_SIZE" not in os.environ:
        yield Place(0, 1, local, own)
        return
    if dist.is_initialized():  # to make one twice under the same torchrun is a race for the store's keys
        yield Place(dist.get_rank(), dist.get_world_size(), local, own)
        return
    _initialise(backend, timeout, own)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), local, own)
        dist.barrier()  # no rank leaves while another still talks
    except SystemExit:  # all of them leave, by agreement
        dist.barrier()
        raise
    finally:
        dist.destroy_process_group()


def _initialise(backend: str, timeout: float, device: torch.device) -> None:
    try:
        dist.init_process_group(
            backend,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=device if backend == "nccl" else None,
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        advice = "another run has it: torchrun --master-port takes another, --standalone finds a free one"
        raise OSError(f"MASTER_PORT: expected a free port, got {port}; {advice}") from error


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world() > 1 else 0


class Timer:
    """Seconds that this process has spent in collectives of its own; on a GPU they run beside the host.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


communication = Timer()


# --- features of all processes


def gather_features(x: Tensor, *, check: bool = True) -> Tensor:
    """Rows of all processes, with gradient: a row's gradient is the sum of those that all ranks have for it.

    Args:
        x: (B, E), the same shape and dtype on every rank.
        check: compare the shapes first, for the price of waiting for the device once.

    Returns:
        (W B, E); x itself where there is one process.

    Raises:
        ValueError: not two-dimensional, or (on every rank) shapes or dtypes differ between ranks.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected (B, E), got {tuple(x.shape)}")
    if world() == 1:
        return x
    if check:
        _same_everywhere(x)
    return _Gather.apply(x)


def _same_everywhere(x: Tensor) -> None:
    mine = torch.tensor([*x.shape, x.element_size()], device=x.device)
    found = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(found, mine)
    shapes = [tuple(shape.tolist()) for shape in found]
    if len(set(shapes)) > 1:
        listed = ", ".join(f"rank {rank}: {shape}" for rank, shape in enumerate(shapes))
        raise ValueError(f"x: expected the same rows, columns, bytes a value on every rank, got {listed}")


class _Gather(torch.autograd.Function):
    """All-gather; its backward is the reduce-scatter of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty((world() * x.shape[0], x.shape[1]))
        with communication.running():
            dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> Tensor:
        d_x = d_gathered.new_empty((d_gathered.shape[0] // world(), d_gathered.shape[1]))
        with communication.running():
            dist.reduce_scatter_tensor(d_x, d_gathered.contiguous())
        return d_x


def contrastive_global(
    image: Tensor, text: Tensor, logit_scale: Tensor, holds: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """Symmetric InfoNCE of this process's pairs against the pairs of all.

    The mean over ranks is `losses.contrastive` of the joined batch, and so is the mean of the gradients, as
    DDP and FSDP take it. Memory is O(B W B), and the logits are float32 or wider under autocast too.

    Args:
        image: (B, E) image features, B the same on every rank.
        text: (B, E) text features.
        logit_scale: () log of the inverse temperature; its exponential is clamped at 100.
        holds: (B, W B) bool, caption j of the joined batch also holds for image i of this rank: such pairs
            are no negatives. The own caption is ignored. None on one rank means None on all.
        check: as for `gather_features`.

    Returns:
        () mean over this rank's rows of the image-to-text and text-to-image cross-entropies.

    Raises:
        ValueError: shapes do not fit, here or between ranks.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image, text: expected two equal (B, E) shapes, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    B, E = image.shape
    rank = own_rank()
    with torch.autocast(image.device.type, enabled=False):
        image, text = _unit(image), _unit(text)
        pairs = gather_features(torch.cat([image, text], dim=1), check=check)  # (W B, 2 E)
        images, texts = pairs.split(E, dim=1)
        scale = inverse_temperature(logit_scale)
        to_text = scale * image @ texts.mT  # (B, W B), own images against all texts
        to_image = scale * text @ images.mT  # (B, W B), own texts against all images
        targets = torch.arange(B, device=image.device) + rank * B
        if holds is not None:
            held = _held_by_others(holds, B)
            own = F.one_hot(targets, len(pairs)).bool()
            to_text = to_text.masked_fill(holds & ~own, -torch.inf)
            to_image = to_image.masked_fill(held & ~own, -torch.inf)
        return (F.cross_entropy(to_text, targets) + F.cross_entropy(to_image, targets)) / 2


def _unit(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True)


def _held_by_others(holds: Tensor, B: int) -> Tensor:
    """(B, W B): own caption i also holds for image j of the joined batch; `holds` transposed across ranks."""
    W = world()
    if holds.dtype != torch.bool or holds.shape != (B, W * B):
        raise ValueError(f"holds: expected ({B}, {W * B}) bool, got {tuple(holds.shape)} {holds.dtype}")
    if W == 1:
        return holds.mT
    sent = holds.unflatten(1, (W, B)).movedim(1, 0).to(torch.uint8).contiguous()  # (W, B images, B captions)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.flatten(0, 1).mT.bool()


# --- agreement


def agree(flag: bool, device: torch.device) -> bool:
    """Whether any rank says `flag`: what one must not do alone, such as skipping a step, all then do."""
    if world() == 1:
        return flag
    votes = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over the ranks, in place."""
    if world() > 1:
        with communication.running():
            dist.all_reduce(values)
    return values


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the ranks, for parameters that no wrapper takes care of."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world())


def seed_for(seed: int, rank: int) -> int:
    """A seed of a rank's own, below 2^40; rank 0 keeps `seed`, so that one process computes what it did."""
    if rank == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "big")
