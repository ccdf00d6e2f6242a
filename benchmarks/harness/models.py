"""The model under measurement, its batches, and the rivals that run it whole."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.gate import full_precision
from harness.pictures import images, patch_superpixels, tokens
from harness.rivals import Rival, Unavailable, Values
from harness.settings import COMPILE_STEP, CUDA, DEVICE, SMOKE
from segclip_fast import Noise, SegCLIP, SegCLIPConfig
from segclip_fast.ops._dispatch import force

RIVALS = ("reference", "compiled", "fast", "fast compiled")
PLAIN = "fast without oneDNN"  # on the CPU: what the algebra alone is worth
SCOPES = {
    "reference": "reference",
    "compiled": "reference",
    "fast": "auto",
    "fast compiled": "auto",
    PLAIN: "auto",
}
MARGINS = {"fp32": 0.1, "bf16": 2.0}  # least lead of a patch's best center over its second


@dataclass(frozen=True)
class Batch:
    """What a training step takes; tokens on the host."""

    images: Tensor
    tokens: Tensor
    superpixels: Tensor
    noise: Noise

    def arguments(self, rival: str) -> tuple[Any, ...]:
        """Arguments of a step; captions where the rival wants them: the fast path packs on the host."""
        captions = self.tokens if rival in ("fast", PLAIN) else self.tokens.to(self.images.device)
        return self.images, captions, self.superpixels, self.noise


@functools.lru_cache(maxsize=1)
def model() -> SegCLIP:
    """ViT-B/16 with random weights, the same every time; a few layers of it for a smoke run."""
    config = SegCLIPConfig()
    if SMOKE:
        vision = dataclasses.replace(config.vision, layers=3, group_after=2)
        config = dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, layers=1))
    torch.manual_seed(0)
    return SegCLIP(config).to(DEVICE)


def batch(B: int, precision: str) -> Batch:
    """Photographs, captions, superpixels and noise of a step on `B` pairs.

    The noise leaves no near ties, so that rounding cannot change an assignment and with it the gradients.
    """
    config = model().config
    N, L = config.vision.grid**2, config.grouping.centers
    random = torch.Generator().manual_seed(0)

    def gumbel(patches: int) -> Tensor:
        return -torch.empty(B, L, patches).exponential_(generator=random).clamp(min=1e-30).log().to(DEVICE)

    drawn = Noise(
        gumbel(N),
        torch.rand(B, N, generator=random).to(DEVICE),
        gumbel(config.reconstruction.kept(N)),
    )
    labels = patch_superpixels(B, config.vision.patch_size).to(DEVICE)
    found = Batch(images(B).to(DEVICE), tokens(B), labels, drawn)
    full, masked = _scores(found)
    margin = MARGINS[precision]
    noise = Noise(_widened(drawn.full, full, margin), drawn.mask, _widened(drawn.masked, masked, margin))
    return dataclasses.replace(found, noise=noise)


def _scores(given: Batch) -> tuple[Tensor, Tensor]:
    """Clean center-patch scores of the whole and of the masked images, from the reference path."""
    found: dict[int, Tensor] = {}

    def remember(_: Any, __: Any, grouping: Any) -> None:
        found[grouping.logits.shape[-1]] = grouping.logits

    hook = model().vision.grouping.register_forward_hook(remember)
    with torch.no_grad(), full_precision(), force("reference"):
        model()(*given.arguments("reference"))
    hook.remove()
    return found[given.noise.full.shape[-1]], found[given.noise.masked.shape[-1]]


def _widened(noise: Tensor, scores: Tensor, margin: float) -> Tensor:
    """The noise (B, L, N), raised at each patch's best center where the second comes within `margin`."""
    noisy = scores + noise
    best, second = noisy.topk(2, dim=1).values.unbind(1)  # (B, N)
    raised = margin * (best - second < margin).to(noise.dtype)
    return noise.scatter_add(1, noisy.argmax(dim=1, keepdim=True), raised[:, None])


def autocast(precision: str) -> torch.autocast:
    """bf16 autocast, or none."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def entry_point(rival: str, precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The model's `function` as `rival` runs it.

    Raises:
        Unavailable: not compiled here, and why.
    """
    if rival.endswith("compiled"):
        if rival == "fast compiled" and COMPILE_STEP != "both":
            raise Unavailable("asked for by SEGCLIP_BENCH_COMPILE_STEP=both")
        if COMPILE_STEP == "none":
            raise Unavailable("compiling the whole model takes minutes here: SEGCLIP_BENCH_COMPILE_STEP")
        if precision == "fp32" and CUDA:
            raise Unavailable("the whole model is compiled in bf16 only, to save time")
        function = torch.compile(function, dynamic=False)

    def run(*arguments: Any) -> Any:
        scope = without_onednn() if rival == PLAIN else contextlib.nullcontext()
        with force(SCOPES[rival]), autocast(precision), scope:
            return function(*arguments)

    return run


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """`ops.linear` takes PyTorch's own product for every size."""
    module = importlib.import_module("segclip_fast.ops.linear")
    least, module.LEAST = module.LEAST, 2**62
    try:
        yield
    finally:
        module.LEAST = least


def graph_breaks() -> dict[str, Any]:
    """How often torch.compile gave up on one graph since the counters were cleared, and the first reason."""
    reasons = torch._dynamo.utils.counters["graph_break"]
    first = next(iter(reasons), "").splitlines()[:1]
    return {"graph_breaks": sum(reasons.values()), "graph_break": "".join(first)}


def clear() -> None:
    """Drop the parameters' gradients."""
    model().zero_grad(set_to_none=True)


def step_rival(rival: str, precision: str, given: Batch, optimizer: Any = None) -> Rival:
    """One training step: gradients cleared, forward with the given noise, backward, maybe the optimizer."""
    torch._dynamo.utils.counters.clear()
    forward = entry_point(rival, precision, model().forward)
    arguments = given.arguments(rival)

    def call(_: int = 0) -> Mapping[str, Tensor]:
        clear()
        losses = forward(*arguments)
        losses.total.backward()
        if optimizer is not None:
            optimizer.step()
        return losses.named()

    def values() -> Values:
        found = {name: value.detach() for name, value in call().items()}
        named = model().named_parameters()
        return found | {f"d {name}": p.grad for name, p in named if p.grad is not None}

    return Rival(call, values, clear, graph_breaks if rival.endswith("compiled") else dict)
