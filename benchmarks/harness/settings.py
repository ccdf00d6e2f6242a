"""How the benchmarks run: read from the environment, `pytest benchmarks/ --benchmark-only` needs no flags.

SEGCLIP_BENCH_DEVICE        cpu | cuda; default cuda where there is one
SEGCLIP_BENCH_SMOKE         1: tiny sizes, one round, to see that everything runs; the times mean nothing
SEGCLIP_BENCH_COMPILE_STEP  none | reference | both: which whole models torch.compile is tried on; default
                            reference on cuda (bf16 only), none on cpu, where compiling one ViT-B/16 training
                            step takes minutes. `both` adds the fast path compiled: the rival "fast compiled"
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(
    os.environ.get("SEGCLIP_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
)
CUDA = DEVICE.type == "cuda"
SMOKE = os.environ.get("SEGCLIP_BENCH_SMOKE") == "1"
COMPILE_STEP = os.environ.get("SEGCLIP_BENCH_COMPILE_STEP") or ("reference" if CUDA else "none")
if COMPILE_STEP not in ("none", "reference", "both"):
    raise ValueError(f"SEGCLIP_BENCH_COMPILE_STEP: expected none, reference or both, got {COMPILE_STEP!r}")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = tuple(DTYPES) if CUDA else ("fp32",)
DIRECTIONS = ("forward", "forward_backward")
