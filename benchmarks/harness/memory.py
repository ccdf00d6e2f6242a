"""The most memory a call holds at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes alive at the call's peak beyond those alive when it began.

    Counted is every block that PyTorch's allocator hands out for the device during the call: outputs,
    gradients it leaves behind, tensors saved for the backward pass, temporaries inside operations. Not
    counted: what was alive before (parameters, inputs), the allocator's rounding and cache, and memory that
    libraries get elsewhere (matrix libraries' own buffers, the C++ extension).

    CUDA: the allocator's own peak. CPU: the peak of the running sum over the profiler's allocation events in
    time order; the same call gives the same number.

    Args:
        call: made once; should have been made before, so that one-time buffers exist.
        device: cpu or cuda.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that events are cleared after each cycle: there is one
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    recorded = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak
