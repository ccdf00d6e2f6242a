"""Ahead-of-time compilation of every kernel, no GPU needed: `python -m segclip_fast.kernels.compile`.

Prints registers, spilled bytes and shared memory of each variant for each architecture, and exits with 1 if a
variant of the paper's size spills or any asks for more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import group_assign, superpixel_kl
from .runtime import Variant, interpreted

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may use
MODULES = (group_assign, superpixel_kl)


@dataclass(frozen=True)
class Usage:
    """What one variant costs on one architecture.

    Attributes:
        name: the variant.
        arch: 80 or 90.
        registers: per thread.
        spilled: bytes of spill stores per thread.
        shared: bytes of shared memory per block.
        warps: warps per block.
        paper: of the paper's size.
    """

    name: str
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int
    paper: bool

    def problem(self) -> str | None:
        """What forbids this variant, or None."""
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_LIMIT[self.arch]}"
        if self.paper and self.spilled:
            return f"spills {self.spilled} bytes at the paper's size"
        return None


def compile_variant(variant: Variant, arch: int) -> Usage:
    """Compile `variant` for sm_`arch` and read its resources from the assembler's report."""
    signature = variant.arguments | dict.fromkeys(variant.constants, "constexpr")
    order = {name: index for index, name in enumerate(variant.kernel.arg_names)}
    aligned = {
        (order[name],): [["tt.divisibility", 16]]
        for name, kind in variant.arguments.items()
        if kind.startswith("*")
    }
    source = ASTSource(
        fn=variant.kernel,
        signature={name: signature[name] for name in variant.kernel.arg_names},
        constexprs={(order[name],): value for name, value in variant.constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    registers, spilled = _assemble(compiled.asm["ptx"], arch)
    return Usage(
        variant.name, arch, registers, spilled, compiled.metadata.shared, variant.warps, variant.paper
    )


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes that ptxas reports."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run(
            [
                str(assembler),
                "-v",
                f"--gpu-name={target[1] if target else f'sm_{arch}'}",
                str(path),
                "-o",
                f"{folder}/out",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas: expected a resource report, got {done.stderr!r}")
    return int(registers[1]), int(spilled[1])


def variants() -> list[Variant]:
    """Every variant of every kernel."""
    return [variant for module in MODULES for variant in module.variants()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="default all")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET: expected it unset, got 1 (nothing is compiled under the interpreter)")
    found = []
    for variant in variants():
        if options.only in variant.name:
            for arch in options.arch or sorted(SHARED_LIMIT):
                usage = compile_variant(variant, arch)
                found.append(usage)
                print(
                    f"sm_{arch}  {usage.registers:4} registers {usage.spilled:5} spilled "
                    f"{usage.shared:7} shared {usage.warps:3} warps  {usage.name}  {usage.problem() or ''}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in found], indent=1) + "\n")
    return 1 if not found or any(usage.problem() for usage in found) else 0


if __name__ == "__main__":
    sys.exit(main())
