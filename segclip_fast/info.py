"""Which parts work on this machine, and why the others do not: `python -m segclip_fast.info`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

from . import __version__
from .ops import _autotune, attention, attention_packed, group_assign, linear, superpixel_kl
from .ops._dispatch import SWITCH, Backend, force, requested


@dataclass(frozen=True)
class Row:
    """One line of the report: what, whether it works, and a version or a reason."""

    name: str
    works: bool
    detail: str


def packages() -> list[Row]:
    """The optional packages and the compiled extension."""
    uses = {
        "open_clip": ("open_clip_torch", "CLIP's tokenizer and weights"),
        "xformers": ("xformers", "attention kernels on CUDA"),
        "triton": ("triton", "fused kernels on CUDA"),
    }
    rows = []
    for module, (package, use) in uses.items():
        try:
            rows.append(Row(module, True, f"{importlib.metadata.version(package)} ({use})"))
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(module, False, f"not installed: pip install {package} ({use})"))
    return [*rows, *extension()]


def extension() -> list[Row]:
    """The compiled extension and its CUDA part."""
    try:
        compiled = importlib.import_module("segclip_fast._C")
    except ImportError as error:
        return [Row("_C", False, f"{error}; build it with pip install -e . (superpixels)")]
    build, devices = compiled.cuda_build(), compiled.cuda_devices()
    return [
        Row("_C", True, "built (superpixels)"),
        Row("_C CUDA part", bool(build.get("compiled")), f"superpixels and patch labels on CUDA: {build}"),
        Row("CUDA devices", bool(devices.get("devices")), str(devices)),
    ]


def backends(device: torch.device) -> list[Row]:
    """Every back end of every op on `device`, with its reason to refuse."""
    tables: dict[str, tuple[Backend, ...]] = {
        function.__name__: sys.modules[function.__module__].BACKENDS
        for function in (attention, attention_packed, group_assign, linear, superpixel_kl)
    }
    probe = [torch.zeros(1, device=device)]
    rows = []
    for op, table in tables.items():
        for backend in table:
            reason = backend.refuse(probe)
            rows.append(Row(f"{op} / {backend.name}", reason is None, reason or f"serves {device.type}"))
    return rows


def typical(device: torch.device, training: bool = False) -> list[tuple[Any, dict[str, Any]]]:
    """The attention ops with arguments of the model's sizes: patches of 32 images, their captions, packed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def qkv(*shape: int) -> dict[str, Any]:
        return {name: torch.rand(shape, dtype=dtype, device=device, requires_grad=training) for name in "qkv"}

    lengths = [12] * 32
    starts = torch.arange(33, dtype=torch.int32, device=device) * 12
    packed = {"starts": starts, "longest": 12, "causal": True, "lengths": lengths}
    return [
        (attention, {**qkv(32, 197, 12, 64), "causal": False, "lengths": None}),
        (attention, {**qkv(32, 77, 8, 64), "causal": True, "lengths": None}),
        (attention_packed, {**qkv(32 * 12, 8, 64), **packed}),
    ]


def kernels(device: torch.device) -> list[Row]:
    """Every kernel that attention chooses from on CUDA, with its reason to refuse the typical inputs."""
    by_op = {op.__name__: (op, arguments) for op, arguments in reversed(typical(device))}
    rows = []
    for name, (op, arguments) in sorted(by_op.items()):
        for candidate in sys.modules[op.__module__].CANDIDATES:
            reason = candidate.refuse(**arguments)
            rows.append(Row(f"{name}: {candidate.name}", reason is None, reason or "can be chosen"))
    return rows


def choices(device: torch.device) -> list[_autotune.Choice]:
    """The choices made in this process; on CUDA those for inputs of the model's sizes are made now."""
    if device.type == "cuda":
        with force("fused"):
            for training in (False, True):
                for op, arguments in typical(device, training):
                    op(**arguments)
    return _autotune.chosen()


def main() -> int:
    """Print the report; returns 0."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"segclip_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"CUDA in torch: {torch.cuda.get_device_name(0) if cuda else 'no device'}")
    print(f"{SWITCH}={requested()}, {torch.get_num_threads()} threads\n")
    for row in (*packages(), *backends(device)):
        print(line(row))
    print("\nKernels that attention chooses from:")
    for row in kernels(device):
        print(line(row))
    state = "on, the fastest is taken" if _autotune.enabled() else "off, the first that accepts is taken"
    print(f"\nTiming them on CUDA ({_autotune.SWITCH}): {state}")
    for choice in choices(device):
        print(f"  {choice}")
    return 0


def line(row: Row) -> str:
    """One row as text."""
    return f"{'yes' if row.works else 'no ':3}  {row.name:28} {row.detail}"


if __name__ == "__main__":
    sys.exit(main())
