"""Settings of a training run as frozen dataclasses. Names follow open_clip where it has one.

Defaults are the paper's optimizer (SegCLIP, ICML 2023, Section 3.1): learning rates 4e-6 before and 4e-3
from the grouping module on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .._checks import require
from ..data.settings import DataConfig
from ..model.settings import LossConfig, SegCLIPConfig


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine; two learning rates around the grouping module.

    Attributes:
        lr: peak rate of the grouping module and everything after it.
        lower_lr: peak rate of what CLIP brings: first stage and text tower.
        weight_decay: decoupled decay.
        decay: which parameters decay: "default" (matrices only) or "official" (all but those named bias).
        betas: Adam moments.
        eps: Adam denominator.
        warmup: share of all steps for the linear warm-up.
        clip: global gradient norm limit.
    """

    lr: float = 4e-3
    lower_lr: float = 4e-6
    weight_decay: float = 0.05
    decay: Literal["default", "official"] = "default"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup: float = 0.15
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0 and self.lower_lr >= 0, "optim.lr", "positive rates", (self.lr, self.lower_lr))
        require(0 <= self.warmup < 1, "optim.warmup", "between 0 and 1", self.warmup)
        require(self.clip > 0, "optim.clip", "a positive norm", self.clip)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output: run folder (config, log, checkpoints).
        model: the architecture.
        loss: loss weights.
        data: the source of pairs.
        optim: optimizer and schedule.
        init: "scratch", a checkpoint folder or file to start from, or "clip:NAME[:PRETRAINED]".
        backend: implementation of the model, see `SegCLIP`.
        steps: optimizer steps in total; 0 where `epochs` says how long.
        epochs: passes over the pairs in place of `steps`, rounded down to whole steps.
        batch_size: pairs per process (GPU) in one forward pass.
        accum_freq: forward passes per step; a step trains on batch_size x accum_freq x processes pairs, and
            all of them are each other's negatives.
        seed: of initialisation, order, augmentation and noise.
        save_every: steps between checkpoints.
        keep: newest checkpoints that stay; the best by zero-shot mIoU stays besides.
        max_skipped: steps in a row without a finite loss and gradient after which the run stops.
        eval_every: steps between zero-shot evaluations; 0 for none before the end.
        eval_images: held-out images per evaluation.
        eval_dataset: data set to evaluate on, as in `python -m segclip_fast.evaluate`; empty takes held-out
            pictures of scenes and stamps, and nothing with other sources, which have no masks.
        eval_root: folder of `eval_dataset`.
        pictures: how many fixed samples are drawn at every evaluation and at the end (regions,
            reconstruction, segmentation); 0 for none.
        precision: "fp32", "amp_bf16" (bf16 autocast), or "auto": amp_bf16 on CUDA, else fp32.
        torchcompile: compile the forward and backward pass.
        grad_checkpointing: compute the blocks' activations again in the backward pass instead of keeping
            them.
        fsdp: several processes share parameters and optimizer state (FSDP2) instead of each keeping all
            (DDP).
        dist_backend: of several processes: "nccl", "gloo", or "auto" by the device.
        device: "auto", "cpu" or "cuda".
        resume: "latest" continues the run in `output` from its newest checkpoint (or starts it); the path
            of a checkpoint folder begins a new run in `output` from there.
        overwrite: replace the run in `output`.
        report_to: send losses and pictures to "tensorboard", "wandb" or "all" (both); the JSON lines are
            always written.
        quiet: no progress bar.
    """

    output: str = "runs/segclip"
    model: SegCLIPConfig = field(default_factory=SegCLIPConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: str = "scratch"
    backend: str = "auto"
    steps: int = 1000
    epochs: float = 0.0
    batch_size: int = 64
    accum_freq: int = 1
    seed: int = 42
    save_every: int = 100
    keep: int = 2
    max_skipped: int = 20
    eval_every: int = 0
    eval_images: int = 200
    eval_dataset: str = ""
    eval_root: str = ""
    pictures: int = 0
    precision: Literal["auto", "fp32", "amp_bf16"] = "auto"
    torchcompile: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    dist_backend: Literal["auto", "nccl", "gloo"] = "auto"
    device: str = "auto"
    resume: str = ""
    overwrite: bool = False
    report_to: Literal["", "tensorboard", "wandb", "all"] = ""
    quiet: bool = False

    def __post_init__(self) -> None:
        require(not (self.resume and self.overwrite), "resume", "not together with overwrite", self.resume)
        for name in ("batch_size", "accum_freq", "save_every", "keep", "max_skipped", "eval_images"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("eval_every", "pictures"):
            require(getattr(self, name) >= 0, name, "a number of at least 0", getattr(self, name))
        require(self.epochs >= 0, "epochs", "a number of at least 0", self.epochs)
        expected = "0 with epochs" if self.epochs else "a positive number"
        require(self.steps == 0 if self.epochs else self.steps > 0, "steps", expected, self.steps)
        masks = self.data.generated or self.eval_dataset
        expected = "0 without eval_dataset and held-out pictures with masks"
        require(bool(masks) or not self.eval_every, "eval_every", expected, self.eval_every)
        both = f"the folder of eval_dataset {self.eval_dataset!r}, and none without it"
        require(bool(self.eval_root) == bool(self.eval_dataset), "eval_root", both, self.eval_root)

    def precision_on(self, device: str) -> str:
        """The precision ("fp32" or "amp_bf16") on a type of device, "auto" decided."""
        if self.precision == "auto":
            return "amp_bf16" if device == "cuda" else "fp32"
        return self.precision

    def global_batch(self, processes: int) -> int:
        """Pairs per optimizer step of that many processes."""
        return self.batch_size * self.accum_freq * processes
