"""The rivals of one op: its twin, the compiled twin, what `auto` takes, and back ends it does not take."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.counts import moved_bytes
from harness.floors import FLOORS
from harness.gate import TOLERANCES
from harness.rivals import Plan, Result, Rival, Unavailable, Values, compare, enter
from harness.settings import CUDA, DEVICE, DIRECTIONS, DTYPES, SMOKE
from segclip_fast.ops import _dispatch

MAIN_RIVALS = ("reference", "compiled", "fast")
CACHES = 2.5  # all input sets together are this many times the L2 cache


@dataclass(frozen=True)
class Op:
    """An op under measurement.

    Attributes:
        name: its stem.
        fast: the public function.
        twin: the plain-PyTorch one.
        outputs: what either returns -> tensors by name.
        operands: names of the inputs a back end is chosen by.
    """

    name: str
    fast: Callable[..., Any]
    twin: Callable[..., Any]
    outputs: Callable[[Any], Mapping[str, Tensor]]
    operands: Sequence[str]

    def backends(self) -> Sequence[Any]:
        """The op's table of back ends."""
        return sys.modules[self.fast.__module__].BACKENDS


@dataclass(frozen=True)
class Inputs:
    """One input set: arguments by name (those that require a gradient are leaves), and output gradients."""

    arguments: dict[str, Any]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """The arguments whose gradient is asked for."""
        return {name: x for name, x in self.arguments.items() if isinstance(x, Tensor) and x.requires_grad}

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.arguments.values(), *self.gradients.values()]
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values at another precision, as leaves of their own."""

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().to(dtype).requires_grad_(x.requires_grad)

        return Inputs(
            {name: convert(x) for name, x in self.arguments.items()},
            {name: convert(x) for name, x in self.gradients.items()},
        )


@dataclass(frozen=True, eq=False)
class Case:
    """An op at one size and precision.

    Attributes:
        op: which.
        shape: sizes by the letters of `floors`.
        precision: fp32 or bf16.
        make: (seed, shape, dtype) -> Inputs.
        label: size in words.
        replay: also time replays of a CUDA graph.
        compiled: why the compiled twin does not take part; None if it does.
        autocast: run the forward pass under autocast to bf16, as a training step does.
    """

    op: Op
    shape: Mapping[str, int]
    precision: str
    make: Callable[[int, Mapping[str, int], torch.dtype], Inputs]
    label: str
    replay: bool = True
    compiled: str | None = None
    autocast: bool = False

    def __str__(self) -> str:
        return f"{self.label.replace(', ', '_').replace(' ', '')}-{self.precision}"

    def group(self, direction: str) -> str:
        return f"{self.op.name}, {self.label}, {self.precision}, {direction.replace('_', ' + ')}"

    def facts(self, direction: str) -> dict[str, Any]:
        """What is stored with every rival's times."""
        size = torch.empty((), dtype=DTYPES[self.precision]).element_size()
        floor = FLOORS[self.op.name](self.shape, size, direction != "forward")
        return {
            "op": self.op.name,
            "size": self.label,
            "shape": dict(self.shape),
            "dtype": self.precision,
            "direction": direction,
            "floor_bytes": floor.bytes,
            "floor_operations": floor.operations,
        }


def every_rival(cases: Sequence[Case]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test with case, direction and rival; the rivals of one comparison follow each other."""
    marks = (
        pytest.mark.parametrize("case", cases, ids=str),
        pytest.mark.parametrize("direction", DIRECTIONS),
        pytest.mark.parametrize("rival", [*MAIN_RIVALS, *other_backends(cases[0].op)]),
    )

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for mark in marks:  # the one applied last varies fastest
            test = mark(test)
        return test

    return decorate


def enter_op(benchmark: Any, case: Case, direction: str, rival: str) -> None:
    """One entry of pytest-benchmark; the first of a comparison measures for all."""
    enter(benchmark, case.group(direction), op_results(case, direction), rival, **case.facts(direction))


@functools.lru_cache(maxsize=1)
def op_results(case: Case, direction: str) -> dict[str, Result | Exception]:
    """Gate, memory and times of all rivals of `case` in `direction`."""
    dtype = DTYPES[case.precision]
    first = case.make(0, case.shape, dtype)
    sets = [first]
    if not SMOKE:
        count = 2
        if CUDA:  # timed calls must not find their inputs in the cache
            cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            count = max(2, min(512, math.ceil(CACHES * cache / first.nbytes())))
        sets += [case.make(seed, case.shape, dtype) for seed in range(1, count)]
    backward = direction != "forward"

    def twin(inputs: Mapping[str, Any]) -> Any:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.autocast and inputs is first.arguments):
            return case.op.twin(**inputs)

    def exact() -> Values:
        return _values(case.op, twin, first.to(torch.float64), backward)

    def rival(function: Callable[..., Any], scope: str, **facts: Any) -> Rival:
        return _rival(case, function, sets, backward, scope, facts)

    def compiled() -> Rival:
        if case.compiled is not None:
            raise Unavailable(case.compiled)
        return rival(torch.compile(case.op.twin, dynamic=False), "auto")

    def fast() -> Rival:
        return rival(case.op.fast, "auto", backend=_chosen(case.op, first))

    makers: dict[str, Callable[[], Rival]] = {
        "reference": lambda: rival(case.op.twin, "auto"),
        "compiled": compiled,
        "fast": fast,
    }
    for name in other_backends(case.op):
        makers[name] = lambda name=name: _forced(case.op, first, name, rival)
    plan = Plan(TOLERANCES[dtype], sets=len(sets), replay=case.replay)
    results = compare(makers, exact, plan)
    reference = results["reference"]
    if isinstance(reference, Result):
        reference.facts["moved_bytes"] = moved_bytes(lambda: _run(case.op, twin, first, backward))
    return results


def other_backends(op: Op) -> tuple[str, ...]:
    """Back ends that may be left out by `auto`; on the CPU a Triton kernel only runs interpreted."""
    return tuple(b.name for b in op.backends() if b.name != "reference") if CUDA else ()


def _chosen(op: Op, inputs: Inputs, scope: str = "auto") -> str:
    """The back end that serves these inputs.

    Raises:
        RuntimeError: the one asked for does not.
    """
    operands = [inputs.arguments[name] for name in op.operands if inputs.arguments.get(name) is not None]
    with _dispatch.force(scope):
        return _dispatch.select(op.name, op.backends(), operands).name


def _forced(op: Op, inputs: Inputs, name: str, rival: Callable[..., Rival]) -> Rival:
    if _chosen(op, inputs) == name:
        raise Unavailable(f"auto takes {name}: see the entry fast")
    try:
        _chosen(op, inputs, name)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    return rival(op.fast, name)


def _rival(
    case: Case,
    function: Callable[..., Any],
    sets: Sequence[Inputs],
    backward: bool,
    scope: str,
    facts: dict[str, Any],
) -> Rival:
    matching: dict[int, dict[str, Tensor]] = {}  # output gradients in the dtypes of this rival's outputs

    def within(inputs: Mapping[str, Any]) -> Any:
        with _dispatch.force(scope), torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.autocast):
            return function(**inputs)

    def call(number: int) -> None:
        index = number % len(sets)
        _run(case.op, within, sets[index], backward, matching.setdefault(index, {}))

    def values() -> Values:
        return _values(case.op, within, sets[0], backward, matching.setdefault(0, {}))

    return Rival(call, values, facts=lambda: facts)


def _run(
    op: Op,
    function: Callable[[Mapping[str, Any]], Any],
    inputs: Inputs,
    backward: bool,
    matching: dict[str, Tensor] | None = None,
) -> tuple[Mapping[str, Tensor], Sequence[Tensor]]:
    """Outputs by name, and the gradients of the leaves in their order."""
    with torch.set_grad_enabled(backward):
        outputs = op.outputs(function(inputs.arguments))
    if not backward:
        return outputs, ()
    matching = {} if matching is None else matching
    if not matching:
        matching.update({name: inputs.gradients[name].to(out.dtype) for name, out in outputs.items()})
    upstream = [matching[name] for name in outputs]
    return outputs, torch.autograd.grad(list(outputs.values()), list(inputs.leaves().values()), upstream)


def _values(
    op: Op,
    function: Callable[[Mapping[str, Any]], Any],
    inputs: Inputs,
    backward: bool,
    matching: dict[str, Tensor] | None = None,
) -> Values:
    outputs, gradients = _run(op, function, inputs, backward, matching)
    found = {name: value.detach() for name, value in outputs.items()}
    if "hard" in found:  # the assignment itself, to be counted and not averaged
        found["assignment"] = found["hard"].argmax(dim=1)
    leaves = inputs.leaves() if backward else ()
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device that is timed."""
    return torch.Generator(DEVICE).manual_seed(seed)
