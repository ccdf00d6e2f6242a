"""Where the time of a run goes: waiting for data, computing, or communicating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..data.pipeline import STAGES
from .accumulation import Step

BOUND = 0.2  # share of the time from which on waiting is what bounds a run
_WARM_UP = 2  # first steps, in which workers start and kernels are compiled


@dataclass
class Throughput:
    """Adds up the steps of this process.

    Attributes:
        pairs: of this process and step.
        world: number of processes.
        workers: loader processes of each.
    """

    pairs: int
    world: int
    workers: int
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    communicated: float = 0.0
    stages: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))

    def add(self, seconds: float, waited: float, communicated: float, stages: Sequence[float]) -> None:
        """One step: its seconds, those waiting for data and in collectives, and the workers' by STAGES."""
        self.steps += 1
        if self.steps == _WARM_UP + 1:  # more follow: begin anew
            self.seconds = self.waited = self.communicated = 0.0
            self.stages = [0.0] * len(STAGES)
        self.seconds += seconds
        self.waited += waited
        self.communicated += communicated
        self.stages = [old + new for old, new in zip(self.stages, stages, strict=True)]

    @property
    def counted(self) -> int:
        """The steps that the sums are of."""
        return self.steps if self.steps <= _WARM_UP else self.steps - _WARM_UP

    def report(self, step: Step) -> dict[str, Any]:
        """Pairs per second of all processes, shares of the time, what bounds, the workers' work per pair."""
        steps, pairs = self.counted, self.counted * self.pairs
        if not steps or self.seconds <= 0:
            return {}
        exposed = self.communicated + steps * _exposed(step)
        data = min(self.waited / self.seconds, 1.0)
        communication = min(exposed / self.seconds, 1.0 - data)
        shares = {"data": data, "communication": communication, "compute": 1.0 - data - communication}
        spent = {stage: 1e3 * total / pairs for stage, total in zip(STAGES, self.stages, strict=True)}
        total = sum(spent.values())
        return {
            "steps": steps,
            "pairs_per_second": self.world * pairs / self.seconds,
            "step_seconds": self.seconds / steps,
            "shares": shares,
            "communication_within_compute": isinstance(step, FSDPModule),
            "bound_by": bound_by(shares),
            "worker_ms_per_pair": {**spent, "all": total},
            "superpixel_share_of_worker": spent["superpixels"] / total if total else 0.0,
            "workers": self.workers,
            "workers_could_deliver": self.world * max(self.workers, 1) * 1e3 / total if total else None,
        }


def bound_by(shares: dict[str, float]) -> str:
    """What is worth mending first: data or communication from a fifth of the time on, else compute."""
    worst = max(("data", "communication"), key=lambda name: shares[name])
    return worst if shares[worst] >= BOUND else "compute"


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines of text."""
    shares, spent = report["shares"], report["worker_ms_per_pair"]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    stages = ", ".join(f"{stage} {spent[stage]:.2f}" for stage in STAGES)
    advice = {
        "data": "more data.workers, data.superpixels.where, or faster storage would help",
        "communication": "a larger batch_size or accum_freq, or a faster network would help",
        "compute": "the loader and the network keep up",
    }[report["bound_by"]]
    rate, bound = f"{report['pairs_per_second']:.1f} pairs/s", report["bound_by"]
    if report["communication_within_compute"]:
        parts += " (FSDP's communication is within compute)"
    superpixels = f"superpixels {report['superpixel_share_of_worker']:.0%}"
    return (
        f"{rate} over {report['steps']} steps, bound by {bound}: {advice}\n"
        f"  time: {parts}\n"
        f"  a worker's milliseconds per pair: {stages}, together {spent['all']:.2f} ({superpixels})"
    )


def _exposed(step: Step) -> float:
    """Seconds per step that DDP's averaging of gradients adds to the backward pass, as DDP measures it."""
    if not isinstance(step, DistributedDataParallel):
        return 0.0
    measured = step._get_ddp_logging_data()
    both = (
        measured.get("avg_backward_comm_time", 0),
        measured.get("avg_backward_compute_comm_overlap_time", 0),
    )
    return max(both[0] - both[1], 0) / 1e9
