"""Which parts work on this machine, and why the others do not: `python -m segclip_fast.info`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from dataclasses import dataclass

import torch

from . import __version__
from .ops import attention, group_assign, superpixel_kl
from .ops._dispatch import SWITCH, Backend, requested


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
        return [Row("_C", False, f"{error}; build it with pip install -e . (superpixels on the CPU)")]
    build, devices = compiled.cuda_build(), compiled.cuda_devices()
    return [
        Row("_C", True, "built (superpixels on the CPU)"),
        Row("_C CUDA part", bool(build.get("compiled")), str(build)),
        Row("CUDA devices", bool(devices.get("devices")), str(devices)),
    ]


def backends(device: torch.device) -> list[Row]:
    """Every back end of every op on `device`, with its reason to refuse."""
    tables: dict[str, tuple[Backend, ...]] = {
        function.__name__: sys.modules[function.__module__].BACKENDS
        for function in (attention, group_assign, superpixel_kl)
    }
    probe = [torch.zeros(1, device=device)]
    rows = []
    for op, table in tables.items():
        for backend in table:
            reason = backend.refuse(probe)
            rows.append(Row(f"{op} / {backend.name}", reason is None, reason or f"serves {device.type}"))
    return rows


def main() -> int:
    """Print the report; returns 0."""
    cuda = torch.cuda.is_available()
    print(f"segclip_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"CUDA in torch: {torch.cuda.get_device_name(0) if cuda else 'no device'}")
    print(f"{SWITCH}={requested()}, {torch.get_num_threads()} threads\n")
    for row in (*packages(), *backends(torch.device("cuda" if cuda else "cpu"))):
        print(f"{'yes' if row.works else 'no ':3}  {row.name:28} {row.detail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
