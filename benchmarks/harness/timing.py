"""How long a call takes: rivals in turn, many launches per synchronisation, and a clock for pytest-benchmark.

On CUDA events around many launches are read after one synchronisation; on the CPU it is `perf_counter`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[int], object]  # takes the number of the call, which picks its input set
MOST_CALLS = 2000  # per round
_now = [0.0]


def measured_seconds() -> float:
    """The clock pytest-benchmark reads: it stands still except where `play` moves it by a measured time."""
    return _now[0]


def play(benchmark: Any, samples: Sequence[float]) -> None:
    """Give pytest-benchmark `samples`, seconds per call, as its rounds.

    The rounds of rivals are measured in turn (A, B, C, A, B, C, ...), so that a drift of the machine meets
    all alike; pytest-benchmark, which finishes one entry before it starts the next, gets them afterwards.
    The entry must be marked with `timer=measured_seconds`.
    """
    remaining = iter(samples)

    def advance() -> None:
        _now[0] += next(remaining)

    benchmark.pedantic(advance, rounds=len(samples))


def seconds_per_call(call: Call, first: int, count: int, device: torch.device) -> float:
    """Mean seconds of calls number `first` to `first + count - 1`, one synchronisation at the end."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for number in range(first, first + count):
            call(number)
        return (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for number in range(first, first + count):
        call(number)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def interleaved(
    calls: Mapping[str, Call], device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of every rival in every round.

    Args:
        calls: the rivals, which have run before.
        device: where they run.
        rounds: how often each has its turn.
        seconds: how long one turn should take at least; slow calls are made once per turn.
    """
    counts = {name: calls_per_round(call, device, seconds) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for turn in range(rounds):
        for name, call in calls.items():
            samples[name].append(seconds_per_call(call, turn * counts[name], counts[name], device))
    return samples


def calls_per_round(call: Call, device: torch.device, seconds: float) -> int:
    """How many calls take about `seconds`, found by a few; 1 for no seconds, without a call."""
    if seconds <= 0:
        return 1
    once = seconds_per_call(call, 0, 1, device)
    if once < seconds:
        once = seconds_per_call(call, 1, 5, device)
    return max(1, min(MOST_CALLS, math.ceil(seconds / max(once, 1e-7))))


def replayed(call: Call, sets: int, rounds: int, seconds: float) -> list[float]:
    """Seconds per call on CUDA without the launch overhead of the host: replays of a captured graph.

    Args:
        call: made once per input set inside the graph.
        sets: number of input sets.
        rounds: number of samples.
        seconds: how long one sample should take at least.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    device = torch.device("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch asks before a capture: nothing may be set up during it
        for number in range(sets):
            call(number)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(sets):
            call(number)

    def replay(_: int) -> None:
        graph.replay()

    count = calls_per_round(replay, device, seconds)
    return [seconds_per_call(replay, 0, count, device) / sets for _ in range(rounds)]
