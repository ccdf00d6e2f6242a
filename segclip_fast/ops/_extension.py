"""The compiled extension, for the ops that need it."""

from __future__ import annotations

from types import ModuleType


def extension() -> ModuleType:
    """`segclip_fast._C`, loaded on first use.

    Raises:
        ImportError: it is missing or does not load.
    """
    try:
        from .. import _C
    except ImportError as error:
        raise ImportError(
            "segclip_fast._C: the compiled extension is missing or does not load; build it with "
            f"`pip install -e .` in the repository (needs a C++17 compiler): {error}"
        ) from error
    return _C
