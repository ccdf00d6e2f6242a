"""Large contrastive batches in little memory: features first, their gradients, then the encoders in parts.

The contrastive loss needs all features of a batch but no encoder's graph: its gradient with respect to the
features is computed from features without graph, and handed to the encoders one micro-batch after another
(Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021). Negatives are
those of the whole batch, at the price of a second forward pass.

Shapes: B pairs of a process, b of one micro-batch, L centers, N patches, K visible ones, T tokens, E joint
embedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import LossConfig
from ..losses import Losses
from ..model.segclip import Noise, SegCLIP, Terms, weighted
from ..ops.gumbel import gumbel
from .distributed import contrastive_global

FeatureLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
Context = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class MicroBatch:
    """Some pairs of a batch, with their random numbers.

    Attributes:
        images: (b, 3, H, W) normalised.
        tokens: (b, T) int64.
        superpixels: (b, h, w) patch labels, or None without that loss.
        noise: of these images; a seed in it counts images from 0 in every micro-batch.
    """

    images: Tensor
    tokens: Tensor
    superpixels: Tensor | None
    noise: Noise


def split(
    model: SegCLIP, images: Tensor, tokens: Tensor, superpixels: Tensor | None, noise: Noise, size: int
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of `size` pairs (the last may be smaller), each image with its noise.

    Seeds are written out as the noise they stand for, so that the cut changes no random number.

    Args:
        model: says how many centers and visible patches there are.
        images: (B, 3, H, W) normalised.
        tokens: (B, T) int64.
        superpixels: (B, h, w) patch labels, or None.
        noise: of the whole batch, as `SegCLIP.draw_noise` gives it.
        size: pairs of a micro-batch.

    Raises:
        ValueError: size is below 1.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    B, N = noise.mask.shape
    L, K = model.config.grouping.centers, model.config.reconstruction.kept(N)
    full = gumbel(noise.full, B, L, N) if noise.full.ndim == 1 else noise.full
    masked = gumbel(noise.masked, B, L, K) if noise.masked.ndim == 1 else noise.masked
    return [
        MicroBatch(
            images[part],
            tokens[part],
            None if superpixels is None else superpixels[part],
            Noise(full[part], noise.mask[part], masked[part]),
        )
        for part in (slice(start, start + size) for start in range(0, B, size))
    ]


class TrainingPass(nn.Module):
    """The part of a step that DDP or FSDP wraps: everything up to the features and the losses of images.

    Its forward returns the terms and the () logit scale (None without contrastive loss), so that the wrapper
    sees every parameter that the loss will use.
    """

    def __init__(self, model: SegCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, features_only: bool = False) -> tuple[Terms, Tensor | None]:
        """Terms of one micro-batch; `features_only` leaves the losses of single images out."""
        # The batch comes in one piece: wrappers would move the tokens to the device, and they stay here.
        terms = self.model.terms(
            batch.images, batch.tokens, batch.superpixels, batch.noise, features_only=features_only
        )
        return terms, None if terms.image is None else self.model.logit_scale.clone()


Step = TrainingPass | DistributedDataParallel


def accumulate(
    step: Step,
    micro_batches: Sequence[MicroBatch],
    loss_of_features: FeatureLoss = contrastive_global,
    context: Context = contextlib.nullcontext,
) -> Losses:
    """Losses of a batch given in parts, and their gradients, added to those of the parameters.

    Any cut of the batch gives the same numbers to rounding. One part costs one forward pass, more cost two.
    A wrapper by DDP communicates in the last part only; FSDP in each, so that no rank holds whole gradients.

    Args:
        step: a `TrainingPass`, or DDP's or FSDP's wrapper of one.
        micro_batches: the pairs of this process; over all processes the sums of their sizes agree.
        loss_of_features: () loss of (B, E) image features, (B, E) text features and the () logit scale.
        context: makes the context of each forward pass, such as autocast.

    Returns:
        The losses of this process, without graph. Not-finite ones have left not-finite gradients: let the
        ranks `agree`, and drop the gradients.

    Raises:
        ValueError: no micro-batch.
    """
    if not micro_batches:
        raise ValueError("micro_batches: expected at least one, got none")
    inner = step.module if isinstance(step, DistributedDataParallel) else step
    weights = inner.model.loss
    if len(micro_batches) == 1:
        return _at_once(step, micro_batches[0], weights, loss_of_features, context)
    sizes = [len(batch.images) for batch in micro_batches]
    contrast, gradients = None, [_FeatureGradients()] * len(sizes)
    if weights.contrastive > 0:
        contrast, gradients = _contrast(step, micro_batches, weights.contrastive, loss_of_features, context)

    sums: dict[str, Tensor] = {}  # over the micro-batches
    for index, (batch, gradient) in enumerate(zip(micro_batches, gradients, strict=True)):
        with _silent_until_last(step, index == len(sizes) - 1):
            with context():
                terms, scale = step(batch)
            share = sizes[index] / sum(sizes)
            pixels, consistency = _part(terms.reconstruction, share), _part(terms.superpixel_kl, share)
            single = weighted(weights, None, pixels, consistency, batch.images.device)
            _backward(single.total, terms, scale, gradient)
        for name, value in single.named().items():
            sums[name] = sums.get(name, 0) + value.detach()
    return weighted(
        weights, contrast, sums.get("reconstruction"), sums.get("superpixel_kl"), sums["total"].device
    )


def _silent_until_last(step: Step, last: bool) -> contextlib.AbstractContextManager:
    if last or not isinstance(step, DistributedDataParallel):
        return contextlib.nullcontext()
    return step.no_sync()


@dataclass(frozen=True)
class _FeatureGradients:
    """Weighted contrastive gradients of one micro-batch; the scale's comes with the last one."""

    image: Tensor | None = None
    text: Tensor | None = None
    scale: Tensor | None = None


def _at_once(
    step: Step, batch: MicroBatch, weights: LossConfig, loss_of_features: FeatureLoss, context: Context
) -> Losses:
    with context():
        terms, scale = step(batch)
    contrast = None
    if terms.image is not None:
        contrast = loss_of_features(terms.image, terms.text, scale)
    found = weighted(weights, contrast, terms.reconstruction, terms.superpixel_kl, batch.images.device)
    if found.total.requires_grad:
        found.total.backward()
    return dataclasses.replace(found, **{name: value.detach() for name, value in found.named().items()})


def _contrast(
    step: Step,
    micro_batches: Sequence[MicroBatch],
    weight: float,
    loss_of_features: FeatureLoss,
    context: Context,
) -> tuple[Tensor, list[_FeatureGradients]]:
    """The contrastive loss of all micro-batches, and `weight` times its gradients for each of them."""
    parts = []
    for batch in micro_batches:
        with torch.no_grad(), context():
            terms, scale = step(batch, features_only=True)
        parts.append((terms.image, terms.text))
    image, text = (torch.cat(features).requires_grad_() for features in zip(*parts, strict=True))
    scale = scale.detach().requires_grad_()
    loss = loss_of_features(image, text, scale)
    d_image, d_text, d_scale = torch.autograd.grad(
        weight * loss, (image, text, scale), allow_unused=True, materialize_grads=True
    )
    sizes = [len(batch.images) for batch in micro_batches]
    found = [_FeatureGradients(*both) for both in zip(d_image.split(sizes), d_text.split(sizes), strict=True)]
    found[-1] = _FeatureGradients(found[-1].image, found[-1].text, d_scale)
    return loss.detach(), found


def _backward(total: Tensor, terms: Terms, scale: Tensor | None, gradient: _FeatureGradients) -> None:
    """Through the encoders, from the losses of images and from the gradients of the features, in one go."""
    roots = [(total, torch.ones_like(total))] if total.requires_grad else []
    for value, d_value in (
        (terms.image, gradient.image),
        (terms.text, gradient.text),
        (scale, gradient.scale),
    ):
        if value is not None and d_value is not None:
            roots.append((value, d_value))
    if roots:
        torch.autograd.backward([value for value, _ in roots], [d_value for _, d_value in roots])


def _part(term: Tensor | None, share: float) -> Tensor | None:
    """A micro-batch's part in the mean over the batch."""
    return None if term is None else share * term
