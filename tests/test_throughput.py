"""The report of where a run's time went."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from segclip_fast.training import throughput
from segclip_fast.training.throughput import BOUND, Throughput, bound_by, describe

STEP = torch.nn.Linear(1, 1)  # no DDP: nothing is added to the communication
STAGES = (1.0, 2.0, 4.0, 1.0)


def filled(steps: int, *, pairs=4, world=2, workers=3, first=(0.0, 0.0, 0.0), **each) -> Throughput:
    """`steps` equal steps after two of `first`."""
    found = Throughput(pairs, world, workers)
    for _ in range(2):
        found.add(*first, (9.0,) * 4)
    for _ in range(steps):
        found.add(each.get("seconds", 8.0), each.get("waited", 2.0), each.get("communicated", 1.0), STAGES)
    return found


def test_report_of_equal_steps():
    report = filled(5, first=(100.0, 90.0, 5.0)).report(STEP)
    assert report == {
        "steps": 5,
        "pairs_per_second": 2 * 4 / 8,
        "step_seconds": 8.0,
        "shares": {"data": 0.25, "communication": 0.125, "compute": 0.625},
        "communication_within_compute": False,
        "bound_by": "data",
        "worker_ms_per_pair": {"read": 250, "crop": 500, "superpixels": 1000, "tokens": 250, "all": 2000},
        "superpixel_share_of_worker": 0.5,
        "workers": 3,
        "workers_could_deliver": 2 * 3 / 2,
    }


@pytest.mark.parametrize(("steps", "counted", "seconds"), [(1, 1, 10), (2, 2, 15), (3, 1, 1), (4, 2, 1)])
def test_the_first_two_steps_count_only_where_no_more_follow(steps, counted, seconds):
    found = Throughput(4, 1, 0)
    for each in (10.0, 20.0, 1.0, 1.0)[:steps]:
        found.add(each, each / 2, each / 4, (each,) * 4)
    assert found.counted == counted
    report = found.report(STEP)
    assert report["steps"] == counted
    assert report["step_seconds"] == seconds
    assert report["shares"] == {"data": 0.5, "communication": 0.25, "compute": 0.25}
    assert report["worker_ms_per_pair"]["read"] == pytest.approx(1000 * seconds / 4)


def test_without_steps_or_time_there_is_no_report():
    assert Throughput(4, 1, 0).report(STEP) == {}
    assert filled(0).report(STEP) == {}


@pytest.mark.parametrize(
    ("waited", "communicated", "data", "communication"),
    [(0, 0, 0, 0), (8, 0, 1, 0), (9, 1, 1, 0), (6, 4, 0.75, 0.25), (0, 9, 0, 1)],
)
def test_shares_sum_to_one_whatever_the_clocks_say(waited, communicated, data, communication):
    shares = filled(3, waited=waited, communicated=communicated).report(STEP)["shares"]
    assert shares == {"data": data, "communication": communication, "compute": 1 - data - communication}
    assert sum(shares.values()) == 1


def test_without_workers_the_training_process_delivers():
    alone = filled(3, world=1, workers=0).report(STEP)
    assert (alone["workers"], alone["workers_could_deliver"]) == (0, 0.5)
    nothing = Throughput(4, 1, 2)
    nothing.add(1.0, 0.0, 0.0, (0.0,) * 4)
    report = nothing.report(STEP)
    assert (report["workers_could_deliver"], report["superpixel_share_of_worker"]) == (None, 0.0)


@pytest.mark.parametrize(
    ("data", "communication", "expected"),
    [
        (0.0, 0.0, "compute"),
        (BOUND, 0.0, "data"),
        (0.199, 0.199, "compute"),
        (0.19, BOUND, "communication"),
        (0.3, 0.31, "communication"),
        (0.31, 0.3, "data"),
        (0.3, 0.3, "data"),
    ],
)
def test_what_bounds(data, communication, expected):
    shares = {"data": data, "communication": communication, "compute": 1 - data - communication}
    assert bound_by(shares) == expected


@pytest.mark.parametrize(
    ("times", "first", "advice"),
    [
        (
            {"waited": 2.0},
            "1.0 pairs/s over 5 steps, bound by data: ",
            "more data.workers, data.superpixels.where, or faster storage would help",
        ),
        (
            {"waited": 0.0, "communicated": 2.0},
            "1.0 pairs/s over 5 steps, bound by communication: ",
            "a larger batch_size or accum_freq, or a faster network would help",
        ),
        (
            {"waited": 0.8},
            "1.0 pairs/s over 5 steps, bound by compute: ",
            "the loader and the network keep up",
        ),
    ],
    ids=["data", "communication", "compute"],
)
def test_text(times, first, advice):
    report = filled(5, **times).report(STEP)
    lines = describe(report).splitlines()
    assert lines[0] == first + advice
    shares = [f"{name} {share:.0%}" for name, share in report["shares"].items()]
    assert lines[1] == f"  time: {shares[0]}, {shares[1]}, {shares[2]}"
    assert lines[2] == (
        "  a worker's milliseconds per pair: read 250.00, crop 500.00, superpixels 1000.00, tokens 250.00, "
        "together 2000.00 (superpixels 50%)"
    )
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("measured", "share"),
    [
        ({"avg_backward_comm_time": 3e9, "avg_backward_compute_comm_overlap_time": 1e9}, 0.375),
        ({"avg_backward_comm_time": 1e9, "avg_backward_compute_comm_overlap_time": 3e9}, 0.125),
        ({}, 0.125),
    ],
    ids=["exposed", "hidden", "unknown"],
)
def test_what_ddp_does_not_hide_counts_as_communication(measured, share):
    """DDP says it in nanoseconds; 1 of 8 seconds is in the step's own collectives."""
    step = DistributedDataParallel.__new__(DistributedDataParallel)
    step._get_ddp_logging_data = lambda: measured
    assert filled(5).report(step)["shares"]["communication"] == pytest.approx(share)


def test_what_fsdp_communicates_is_not_known_apart():
    report = filled(5).report(object.__new__(FSDPModule))
    assert report["communication_within_compute"]
    shares = "data 25%, communication 12%, compute 62%"
    assert describe(report).splitlines()[1] == f"  time: {shares} (FSDP's communication is within compute)"


def test_stages_are_those_of_the_loader():
    assert throughput.STAGES == ("read", "crop", "superpixels", "tokens")
