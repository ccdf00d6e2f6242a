"""AdamW with the release's groups, schedule, clipping and logit clamp (paper Section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import OptimConfig
from ..losses import MAX_LOGIT_SCALE
from ..model.segclip import SegCLIP

# What CLIP brings before the grouping module learns at the lower rate; the third stage, its norm and the
# projection learn at the full rate with everything that is new.
LOWER = ("vision.first_stage.", "vision.patch_embedding.", "vision.norm_in.", "vision.position_embedding")
FULL_AFTER = ("vision.", "reconstruction.")


def learns_slowly(name: str) -> bool:
    """Whether parameter `name` takes the lower learning rate: text tower, first stage, logit scale."""
    return name.startswith(LOWER) or not name.startswith(FULL_AFTER)


def decays(name: str, parameter: nn.Parameter, rule: str) -> bool:
    """Whether `parameter` takes weight decay under `rule`.

    "default": matrices do; gains, biases, the logit scale and the centers do not. "official": all but those
    named bias.
    """
    if rule == "official":
        return "bias" not in name
    return parameter.ndim > 1 and not name.endswith("grouping.centers")


def build_optimizer(model: SegCLIP, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; each group carries `peak_lr` and `names`.

    Groups differ in rate and decay. The logit scale, a scalar that FSDP leaves whole, has one of its own.
    """
    groups: dict[tuple[bool, bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (learns_slowly(name), decays(name, parameter, config.decay), name == "logit_scale")
        if key not in groups:
            peak = config.lower_lr if key[0] else config.lr
            decay = config.weight_decay if key[1] else 0.0
            groups[key] = {"params": [], "names": [], "lr": peak, "peak_lr": peak, "weight_decay": decay}
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    fused = True if model.logit_scale.is_cuda else None  # one kernel per group instead of dozens
    return torch.optim.AdamW(list(groups.values()), betas=config.betas, eps=config.eps, fused=fused)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate: linear to 1 over the share `warmup` of the steps, then a cosine to 0."""
    progress = step / steps
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


@torch.no_grad()
def apply_step(
    model: SegCLIP,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    step: int,
    steps: int,
    norm: Tensor,
) -> None:
    """Clip the gradients of () `norm`, take step number `step` (from 1) of `steps`, clamp the logit scale."""
    nn.utils.clip_grads_with_norm_(trained(optimizer), config.clip, norm)
    set_rates(optimizer, schedule(step, steps, config.warmup))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that the optimizer changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
