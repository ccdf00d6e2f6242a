"""Time the kernels that can serve a call once per kind of input, and remember the fastest.

A kind of input is whatever the op puts into its key (shapes, dtypes, device, whether gradients are needed).
The first call with a new key runs every candidate that accepts the inputs on the caller's own tensors,
detached, forward and, where gradients are needed, backward; a candidate that raises, or whose result is not
finite or not close to the first good one, is out. Nothing is written to disk; ranks of a distributed run
choose for themselves. The times are those of the process as it runs, launch overhead included.

SEGCLIP_FAST_AUTOTUNE = 1 | 0 switches it; 0 takes the first candidate that accepts, in the op's order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SWITCH = "SEGCLIP_FAST_AUTOTUNE"
Timer = Callable[[Callable[[], object]], float]

# A later candidate must be faster by this factor: noise does not move the choice off the preferred kernel.
MARGIN = 1.03
# Allowed difference between two kernels, relative to the largest RMS among the results. It is there to catch
# wrong results, not rounding: float32 leaves room for TF32.
TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 2e-2}
TOLERANCE = 5e-3

_log = logging.getLogger("segclip_fast")


@dataclass(frozen=True)
class Candidate:
    """One kernel that may serve an op.

    Attributes:
        name: what reports call it.
        run: the kernel; takes the op's arguments by name, returns one tensor.
        refuse: takes the same arguments, returns why the kernel cannot serve them, or None if it can.
    """

    name: str
    run: Callable[..., Tensor]
    refuse: Callable[..., str | None]


@dataclass(frozen=True)
class Choice:
    """What was decided for one kind of input.

    Attributes:
        op: the op's name.
        inputs: the first such inputs, in words.
        winner: the kernel that serves them; None if all failed, and PyTorch's own choice serves.
        milliseconds: the time of each candidate that ran (empty where nothing was timed).
        reasons: why each of the others did not.
    """

    op: str
    inputs: str
    winner: Candidate | None
    milliseconds: Mapping[str, float]
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        name = self.winner.name if self.winner else "PyTorch's own choice"
        times = [f"{kernel} {time:.3f} ms" for kernel, time in sorted(self.milliseconds.items(), key=_second)]
        reasons = [f"{kernel}: {reason}" for kernel, reason in self.reasons.items()]
        return f"{self.op} ({self.inputs}): {name} [{'; '.join([*times, *reasons])}]"


_remembered: dict[Hashable, Choice] = {}


def enabled() -> bool:
    """Whether candidates are timed (SEGCLIP_FAST_AUTOTUNE).

    Raises:
        ValueError: the switch is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {value!r}")
    return value == "1"


def applies(tensor: Tensor) -> bool:
    """Whether a kernel may be chosen for a call on `tensor`; if not, PyTorch's own choice is the one to use.

    Only CUDA has a choice. A traced call must stay traceable; a captured one cannot be timed; deterministic
    mode asks for PyTorch's deterministic kernels; dispatch modes (fake tensors, counters, selective
    checkpointing) and function transforms would see every trial run as if the model had made it.
    """
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return False
    return not (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or _private("_len_torch_dispatch_stack")
        or _private("_are_functorch_transforms_active")
        or torch.jit.is_tracing()
        or torch.are_deterministic_algorithms_enabled()
        or torch.cuda.is_current_stream_capturing()
    )


def signature(*tensors: Tensor, skip: int = 0) -> Hashable:
    """What a choice depends on: device, and of each tensor shape, dtype, dense rows, gradient needed.

    Args:
        tensors: at least one.
        skip: leave out that many leading dimensions.
    """
    gradients = torch.is_grad_enabled()
    kinds = [(x.shape[skip:], x.dtype, x.stride(-1) == 1, gradients and x.requires_grad) for x in tensors]
    return (tensors[0].device, *kinds)


def pick(
    op: str,
    key: Hashable,
    candidates: Sequence[Candidate],
    arguments: Mapping[str, Any],
    timer: Timer | None = None,
) -> Candidate | None:
    """The candidate that serves `arguments`: remembered for `key`, else decided now.

    Args:
        op: name of the op, part of the key.
        key: kind of input.
        candidates: in order of preference.
        arguments: of the op, by name; tensors that require a gradient decide what is timed.
        timer: takes a function, returns its milliseconds (`time_cuda`).

    Returns:
        The winner; None if no candidate both accepts and works, which is remembered too.
    """
    timed = enabled()
    choice = _remembered.get((op, key, timed))
    if choice is None:
        choice = _fastest(op, candidates, arguments, timer or time_cuda) if timed else None
        choice = choice or _first(op, candidates, arguments)
        # No lock is held while timing: a backward pass of another thread may be waiting for this device.
        # Two threads may thus time the same key; the first answer stays.
        choice = _remembered.setdefault((op, key, timed), choice)
        _log.info("%s", choice)
    return choice.winner


def chosen() -> list[Choice]:
    """Every choice remembered by this process, oldest first."""
    return list(_remembered.values())


def forget() -> None:
    """Forget every choice; the next calls decide anew."""
    _remembered.clear()


def time_cuda(call: Callable[[], object], warmups: int = 3, samples: int = 5, repeats: int = 4) -> float:
    """Median milliseconds of `call` on the current stream, over `samples` of `repeats` calls, one sync."""
    for _ in range(warmups):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in pairs:
        start.record()
        for _ in range(repeats):
            call()
        end.record()
    pairs[-1][1].synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / repeats


def _first(op: str, candidates: Sequence[Candidate], arguments: Mapping[str, Any]) -> Choice:
    """The first candidate that accepts, untimed."""
    reasons: dict[str, str] = {}
    for candidate in candidates:
        reason = candidate.refuse(**arguments)
        if reason is None:
            return Choice(op, _words(arguments), candidate, {}, reasons)
        reasons[candidate.name] = reason
    return Choice(op, _words(arguments), None, {}, reasons)


def _fastest(op: str, candidates: Sequence[Candidate], arguments: Mapping[str, Any], timer: Timer) -> Choice:
    """The candidate with the best time."""
    milliseconds: dict[str, float] = {}
    reasons: dict[str, str] = {}
    expected: list[Tensor] = []
    detached = _detached(arguments)
    with _shielded(detached):
        for candidate in candidates:
            try:
                outcome = _trial(candidate, detached, expected, timer)
            except Exception as error:  # whatever a kernel raises, another one can serve
                outcome = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if isinstance(outcome, str):
                reasons[candidate.name] = outcome
            else:
                milliseconds[candidate.name] = outcome
    limit = MARGIN * min(milliseconds.values(), default=0.0)
    good = (c for c in candidates if milliseconds.get(c.name, torch.inf) <= limit)
    return Choice(op, _words(detached), next(good, None), milliseconds, reasons)


def _trial(
    candidate: Candidate, arguments: Mapping[str, Any], expected: list[Tensor], timer: Timer
) -> float | str:
    """Milliseconds of one candidate, or why it is out; the first good results become `expected`."""
    refusal = candidate.refuse(**arguments)
    if refusal is not None:
        return refusal
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]

    def call() -> list[Tensor]:
        out = candidate.run(**arguments)
        if not leaves:
            return [out]
        upstream = expected[0] if expected else out.detach().contiguous()  # the same for every candidate
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    results = [x.detach().contiguous() for x in call()]
    fault = _fault(results, expected or results)
    if fault is not None:
        return fault
    if not expected:
        expected.extend(results)
    return timer(call)


def _fault(results: list[Tensor], expected: list[Tensor]) -> str | None:
    """What is wrong with the results (output, then gradients), or None."""
    if not all(bool(x.isfinite().all()) for x in results):
        return "wrong: its result is not finite"
    if [x.shape for x in results] != [x.shape for x in expected]:
        return f"wrong: its result has shape {tuple(results[0].shape)}, not {tuple(expected[0].shape)}"
    # Relative to the largest: a gradient that is zero but for rounding has no meaningful scale of its own.
    scale = max(_rms(x) for x in expected)
    error = max(_rms(x.double() - y.double()) for x, y in zip(results, expected, strict=True))
    allowed = TOLERANCES.get(expected[0].dtype, TOLERANCE)
    if error > allowed * scale:
        return f"wrong: its result differs by {error / max(scale, 1e-30):.1e}, allowed {allowed:.0e}"
    return None


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _detached(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as leaves of their own graph: same memory and strides, gradients where needed."""
    gradients = torch.is_grad_enabled()
    return {
        name: x.detach().requires_grad_(gradients and x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }


@contextlib.contextmanager
def _shielded(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Run trials on the tensors' device, unseen by the caller's activation checkpointing or offloading.

    Only the innermost saved-tensor hooks act, so hooks that do nothing keep the trial's tensors out of a
    checkpoint, which would otherwise count them and miss them when it recomputes.
    """
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    with contextlib.ExitStack() as stack:
        if tensors and tensors[0].is_cuda:
            stack.enter_context(torch.cuda.device(tensors[0].device))
        if any(x.requires_grad for x in tensors):
            stack.enter_context(saved_tensors_hooks(_same, _same))
        yield


def _words(arguments: Mapping[str, Any]) -> str:
    """The arguments in words: shapes, dtypes, flags that are set."""
    words = []
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            gradient = " with gradient" if x.requires_grad else ""
            words.append(f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{gradient}")
        elif isinstance(x, (list, tuple)):
            words.append(f"{len(x)} {name}")
        elif x:
            words.append(name if x is True else f"{name} {x}")
    return ", ".join(words)


def _private(name: str) -> Any:
    """The answer of a question that PyTorch has no public name for; none on a version that dropped it."""
    return getattr(torch._C, name, bool)()


def _same(x: Tensor) -> Tensor:
    return x


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
