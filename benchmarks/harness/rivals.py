"""Rivals in one comparison: each passes the gate, then all are timed in turn; memory is read beside.

reference   the plain-PyTorch twin (or the model on its reference path), eager
compiled    torch.compile of the same
fast        what `auto` takes
triton ...  a back end that `auto` does not take, so that a kernel that loses is seen to lose
"""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.gate import CAP, errors, full_precision, passes
from harness.machine import commit, versions
from harness.memory import peak_bytes
from harness.settings import DEVICE, SMOKE
from harness.timing import Call, interleaved, measured_seconds, play, replayed

timed = pytest.mark.benchmark(timer=measured_seconds)
Values = Mapping[str, Tensor]
Results = Mapping[str, "Result | Exception"]


class Unavailable(Exception):  # noqa: N818, a reason and no failure
    """Why a rival does not take part here."""


@dataclass(frozen=True)
class Rival:
    """One implementation in a comparison.

    Attributes:
        call: one call; its number picks the input set.
        values: all that input set 0 gives, by name: outputs, and gradients as "d name".
        reset: frees what a call left behind (parameter gradients).
        facts: to be stored with its times; asked for after the gate, when the rival has run.
    """

    call: Call
    values: Callable[[], Values]
    reset: Callable[[], object] = lambda: None
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Result:
    """Seconds per call of every round, and what is stored with them."""

    samples: list[float]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a comparison is run.

    Attributes:
        tolerance: of the gate.
        rounds: turns of every rival.
        seconds: least length of a turn.
        sets: number of input sets.
        replay: also time replays of a CUDA graph, where the host's launch overhead is out.
        flips_allowed: of the gate, per comparison.
    """

    tolerance: float
    rounds: int = 10
    seconds: float = 0.02
    sets: int = 1
    replay: bool = False
    flips_allowed: int = 0


def compare(
    rivals: Mapping[str, Callable[[], Rival]], exact: Callable[[], Values], plan: Plan
) -> dict[str, Result | Exception]:
    """Results by rival, or why there is none: `Unavailable`, a red gate, or whatever it raised.

    Args:
        rivals: how to make each; "reference" comes first and gives its own error at this precision.
        exact: what is right, at a precision above the rivals' where that can be had.
        plan: rounds, tolerance and so on.
    """
    torch._dynamo.reset()
    results: dict[str, Result | Exception] = {}
    ready: dict[str, Rival] = {}
    own: dict[str, float] = {}
    with full_precision():
        truth = exact()
    for name, make in rivals.items():
        try:
            rival = make()
            values = rival.values()
            if name == "reference":
                own = errors(values, truth)
            cap = CAP if name != "reference" else float("inf")
            gate = passes(values, truth, own, plan.tolerance, plan.flips_allowed, cap)
            del values
            rival.reset()
            peak = peak_bytes(lambda call=rival.call: call(0), DEVICE)
            rival.reset()
        except Exception as error:  # one rival's failure is no reason to lose the others' numbers
            results[name] = _light(error)
            continue
        ready[name] = rival
        results[name] = Result([], {"gate": vars(gate), "peak_bytes": peak} | rival.facts())
    del truth
    _time(ready, results, plan)
    return results


def _light(error: Exception) -> Exception:
    """The error with its traceback as text: the frames themselves would keep their tensors alive."""
    if hasattr(error, "add_note") and not isinstance(error, Unavailable):  # Python 3.11
        error.add_note("".join(traceback.format_exception(error)))
    return error.with_traceback(None)


def _time(ready: Mapping[str, Rival], results: dict[str, Result | Exception], plan: Plan) -> None:
    """Fill in the samples of the rivals that passed."""
    rounds, seconds = (1, 0.0) if SMOKE else (plan.rounds, plan.seconds)
    calls = {name: rival.call for name, rival in ready.items()}
    for name, samples in interleaved(calls, DEVICE, rounds, seconds).items():
        result = results[name]
        assert isinstance(result, Result)
        result.samples.extend(samples)
        if plan.replay and DEVICE.type == "cuda":
            try:
                replays = replayed(ready[name].call, plan.sets, rounds, seconds)
                result.facts["replay_ms"] = statistics.median(replays) * 1e3
            except RuntimeError as error:
                result.facts["replay_ms"] = None
                result.facts["replay_refused"] = str(error).splitlines()[0]
        ready[name].reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _absent(result: Result | Exception) -> str | None:
    """Why a rival has no times, in one line."""
    if isinstance(result, Result):
        return None
    kind = "" if isinstance(result, Unavailable) else f"{type(result).__name__}: "
    return kind + (str(result).splitlines() or [""])[0]


def enter(benchmark: Any, group: str, results: Results, rival: str, **facts: Any) -> None:
    """One entry of pytest-benchmark: the stored times of `rival`, or its skip or failure.

    Args:
        benchmark: pytest-benchmark's fixture.
        group: entries of one group are rivals.
        results: of `compare`.
        rival: whose entry this is.
        facts: what else to store: op, size, direction, dtype.
    """
    result = results[rival]
    if isinstance(result, Unavailable):
        pytest.skip(str(result))
    if isinstance(result, Exception):
        raise result
    benchmark.group = group
    benchmark.extra_info.update(
        group=group,
        rival=rival,
        device=DEVICE.type,
        device_name=torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else None,
        threads=torch.get_num_threads(),
        smoke=SMOKE,
        absent={name: reason for name, other in results.items() if (reason := _absent(other))},
        versions=versions(),
        commit=commit(),
        **facts,
        **result.facts,
    )
    play(benchmark, result.samples)
