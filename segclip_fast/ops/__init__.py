"""The fast operations and their plain-PyTorch twins (`<op>_ref`): tensors in, tensors out, no model."""

from .attention import attention, attention_ref
from .attention_packed import attention_packed, attention_packed_ref
from .felzenszwalb import felzenszwalb, felzenszwalb_ref
from .group_assign import GroupAssignment, group_assign, group_assign_ref
from .linear import linear, linear_ref
from .patch_labels import patch_labels, patch_labels_ref
from .superpixel_kl import superpixel_kl, superpixel_kl_ref

__all__ = [
    "GroupAssignment",
    "attention",
    "attention_packed",
    "attention_packed_ref",
    "attention_ref",
    "felzenszwalb",
    "felzenszwalb_ref",
    "group_assign",
    "group_assign_ref",
    "linear",
    "linear_ref",
    "patch_labels",
    "patch_labels_ref",
    "superpixel_kl",
    "superpixel_kl_ref",
]
