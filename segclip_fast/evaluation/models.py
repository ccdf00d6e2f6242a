"""Models by name, for the command lines: SegCLIP checkpoints and the baselines.

runs/mine/model               a folder of ours, or a checkpoint file of the authors
maskclip:NAME[:PRETRAINED]    plain CLIP by open_clip's names, dense features of its last block's values
groupvit:PATH_OR_ID           GroupViT as Hugging Face stores it
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from .segmenter import Segmenter

WEIGHTS = "model.safetensors"


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one.

    Raises:
        ValueError: a GPU asked for and none available.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not available:
        raise ValueError(f"--device: expected a device of this machine, got {name!r} but no GPU is available")
    return device


def load_segmenter(spec: str, device: str | torch.device = "auto") -> Segmenter:
    """The model that `spec` names, in evaluation mode.

    Args:
        spec: see above.
        device: where it goes; "auto" takes a GPU if there is one.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a checkpoint or name that cannot be used, or no such device.
        ImportError: a package that the model needs is missing; the message names it.
    """
    target = pick_device(device) if isinstance(device, str) else device
    kind, _, rest = spec.partition(":")
    model: nn.Module
    if kind == "maskclip":
        from ..baselines.maskclip import MaskCLIP

        name, _, pretrained = rest.partition(":")
        model = MaskCLIP.from_open_clip(name, pretrained or None)
    elif kind == "groupvit":
        from ..baselines.groupvit import GroupViT

        model = GroupViT.from_pretrained(rest)
    else:
        from ..model.segclip import SegCLIP

        model = SegCLIP.from_pretrained(spec)
    return model.to(target).eval()


def fingerprint(spec: str, model: Segmenter) -> dict[str, str]:
    """What tells one set of weights from another: SHA-256 of the checkpoint file, or of the values in memory.

    Returns:
        {"sha256": hex digits, "of": what was hashed}.
    """
    kind, _, rest = spec.partition(":")
    named = {"groupvit": rest, "maskclip": rest.partition(":")[2]}.get(kind, spec)
    path = Path(named)
    file = path / WEIGHTS if path.is_dir() else path
    digest = hashlib.sha256()
    if file.is_file():
        with file.open("rb") as stream:
            while chunk := stream.read(2**24):
                digest.update(chunk)
        return {"sha256": digest.hexdigest(), "of": file.name}
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"sha256": digest.hexdigest(), "of": "the values in memory, by name"}
