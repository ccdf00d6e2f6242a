"""What every launcher needs: whether Triton can run here, memory for results, and what was compiled.

Triton itself is imported by the kernel modules alone, so this module works without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OLDEST = (8, 0)  # compute capability with bf16 and tf32 matrix units
_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(tensors: Sequence[Tensor]) -> str | None:
    """Why no Triton kernel can take these tensors here; None if one can.

    Args:
        tensors: the operands of an op; they share a device. Floating-point ones must be fp32, fp16 or bf16.
    """
    device = tensors[0].device
    if device.type not in ("cpu", "cuda"):
        return f"runs on cuda, inputs are on {device.type}"
    reason = _missing(device.type, device.index or 0)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            return f"takes fp32, fp16 and bf16, got {tensor.dtype}"
    return None


@torch.compiler.assume_constant_result
def _missing(kind: str, index: int) -> str | None:
    """What this machine lacks; constant while a process runs, and so to a traced function."""
    if not _TRITON:
        return "triton is not installed"
    if kind == "cpu":
        return None if interpreted() else "runs on cuda, inputs are on cpu and TRITON_INTERPRET is not 1"
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST:
        return f"needs compute capability 8.0 or later, {torch.cuda.get_device_name(index)} has {found}"
    return None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a kernel's results and scratch: the one place it comes from.

    Tests replace this function by one that fills the memory with NaN: whatever a kernel leaves unwritten
    then shows.
    """
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: the size of a block with masked tail."""
    return max(least, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Variant:
    """One compiled form of one kernel, as a launcher would ask for it.

    Attributes:
        name: for reports, e.g. "group_assign.assign bf16 L8 D768".
        kernel: the @triton.jit function.
        arguments: its run-time arguments, name -> Triton type ("*bf16", "*fp32", "*i64", "i32", ...).
        constants: its constexpr arguments.
        warps: warps of a program.
        stages: depth of software pipelining.
        paper: of a size of the paper (L 8, D 768, N 196): must compile without spills.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    paper: bool = False
