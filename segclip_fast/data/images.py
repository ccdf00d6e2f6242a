"""One way in for pictures: anything a user may hold becomes (H, W, 3) uint8 RGB, or one clear error.

Shapes: H, W pixels, C channels.
"""

from __future__ import annotations

import functools
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_TOLERANCE = 1e-5  # float images may leave [0, 1] by rounding only
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_LABEL_MODES = ("1", "L", "P", "I;16", "I;16B", "I", "RGB")
_truncated_lock = threading.Lock()
_decoding: list[bool] = []  # one entry for each decoding that goes on
_before: list[bool] = []  # LOAD_TRUNCATED_IMAGES as it was

# cv2.resize's fixed point: weights have 11 bits; 4 + 16 + 2 bits are shifted out again on the way to 8 bits.
_WEIGHT_ONE = 2048


def load_image(source: Any, *, name: str = "image") -> np.ndarray:
    """Read a picture from wherever it is and return it as 8-bit RGB.

    The rules, the same for every kind of source:
    - gray is repeated over the three channels; palette, CMYK, YCbCr, LAB and HSV are converted to RGB;
    - transparency (alpha channel or a transparent palette entry) is composited over white;
    - 16-bit values (`uint16`, Pillow modes `I;16*` and `I`) are scaled, 65535 -> 255; mode `I` (32 bits)
      is how Pillow holds some 16-bit files, so its values must lie in [0, 65535];
    - floats must lie in [0, 1] (up to 1e-5 of rounding), are scaled to 255 and rounded; False is 0, True 255;
    - EXIF orientation is applied (unreadable EXIF is ignored); of an animation the first frame is taken.

    Args:
        source: a path (str or Path), a PIL image, a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, bool, uint16 or floats, or a torch tensor (H, W), (1, H, W) or (3, H, W) of uint8 or
            floats.
        name: what error messages call the argument.

    Returns:
        (H, W, 3) uint8 RGB, contiguous, never sharing memory with the source.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not an image, a truncated or broken file, no pixels, a wrong shape or dtype, NaN, infinity
            or floats outside [0, 1].
    """
    torch = sys.modules.get("torch")  # a tensor can only come from a torch that is already imported
    if isinstance(source, (str, Path)):
        return _from_path(Path(source), name)
    if isinstance(source, Image.Image):
        return _from_pil(source, name, "the given PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if torch is not None and isinstance(source, torch.Tensor):
        return _from_tensor(source, name)
    raise ValueError(
        f"{name}: expected a path, a PIL image, a NumPy array or a torch tensor, got {type(source).__name__}"
    )


def load_segments(path: str | Path, *, name: str = "segments") -> np.ndarray:
    """Read a label map from a PNG file: pixels of one value belong together, what the values are is free.

    Palette files give their indices; of RGB files each colour is a label of its own.

    Args:
        path: an 8-bit or 16-bit grey, palette, or 8-bit RGB PNG file.
        name: what error messages call the argument.

    Returns:
        (H, W) int32.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not a PNG file, a broken one, or another kind of PNG (such as one with an alpha channel).
    """
    path = Path(path)
    with _opened(path, name) as picture:
        # JPEG's losses would make labels up, and Pillow cuts 16-bit colours to 8 bits, which merges labels.
        deep_colour = picture.mode == "RGB" and ";16" in str(getattr(picture, "tile", ""))
        if picture.format != "PNG" or picture.mode not in _LABEL_MODES or deep_colour:
            kind = f"{picture.format} of mode {picture.mode}{' with 16 bits' if deep_colour else ''}"
            expected = "a PNG file, grey (8 or 16 bits), palette or RGB (8 bits)"
            raise ValueError(f"{name}: expected {expected}, got {str(path)!r}, {kind}")
        try:
            with _truncation_is_an_error():
                picture.load()
        except _DECODE_ERRORS as error:
            raise ValueError(f"{name}: expected a complete PNG file, got {str(path)!r} ({error})") from error
        values = np.asarray(picture).astype(np.int32)
    return values @ np.array([65536, 256, 1], dtype=np.int32) if values.ndim == 3 else values


def resize_bilinear_uint8(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize with OpenCV's INTER_LINEAR, bit for bit, without OpenCV.

    Half-pixel centres, no antialiasing, 11-bit integer weights and cv2's own truncations; equal to
    `cv2.resize(image, (W, H), interpolation=cv2.INTER_LINEAR)` on uint8.

    Args:
        image: (H, W) or (H, W, C) uint8.
        size_hw: target (height, width), both at least 1.

    Returns:
        (height, width) or (height, width, C) uint8.

    Raises:
        ValueError: wrong dtype, shape or target size.
    """
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or not image.size
    ):
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image: expected a non-empty (H, W) or (H, W, C) uint8 array, got {got}")
    height, width = size_hw
    if int(height) != height or int(width) != width or height < 1 or width < 1:
        raise ValueError(f"size_hw: expected two integers of at least 1, got {size_hw}")
    height, width = int(height), int(width)
    pixels = image if image.ndim == 3 else image[:, :, None]  # (H, W, C)
    left, right, weight_left, weight_right = _linear_taps(pixels.shape[1], width, snap_border=True)
    upper, lower, weight_upper, weight_lower = _linear_taps(pixels.shape[0], height, snap_border=False)
    rows_used, position = np.unique(np.concatenate([upper, lower]), return_inverse=True)
    source = pixels[rows_used].astype(np.int32)
    across = source[:, left] * weight_left[:, None] + source[:, right] * weight_right[:, None]
    across >>= 4  # (rows used, width, C), 15 bits
    top = (across[position[:height]] * weight_upper[:, None, None]) >> 16
    bottom = (across[position[height:]] * weight_lower[:, None, None]) >> 16
    out = ((top + bottom + 2) >> 2).astype(np.uint8)  # (height, width, C)
    return out if image.ndim == 3 else out[:, :, 0]


def resize_bilinear_tensor(image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """`resize_bilinear_uint8` of a (H, W, C) uint8 tensor, on its device, with the same bits."""
    import torch

    height, width = size_hw
    left, right, weight_left, weight_right = _taps_on(image.device, image.shape[1], width, True)
    upper, lower, weight_upper, weight_lower = _taps_on(image.device, image.shape[0], height, False)
    pixels = image.to(torch.int32)
    across = pixels[:, left] * weight_left[:, None] + pixels[:, right] * weight_right[:, None]
    across >>= 4  # (H, width, C), 15 bits
    top = (across[upper] * weight_upper[:, None, None]) >> 16
    bottom = (across[lower] * weight_lower[:, None, None]) >> 16
    return ((top + bottom + 2) >> 2).to(torch.uint8)


@functools.lru_cache(maxsize=256)
def _taps_on(device: Any, n_in: int, n_out: int, snap_border: bool) -> tuple[Tensor, ...]:
    """`_linear_taps` as tensors on a device, kept: photos of a data set have few sizes."""
    import torch

    taps = _linear_taps(n_in, n_out, snap_border=snap_border)
    return tuple(torch.from_numpy(values).to(device) for values in taps)


def _linear_taps(
    n_in: int, n_out: int, *, snap_border: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Source indices and 11-bit weights, (n_out,) each, in cv2's own precision (float32 once centred).

    cv2 gives border columns the full weight of one pixel but lets border rows keep both weights on the same
    row; the two differ in the last bit, hence `snap_border`.
    """
    scale = 1.0 / (n_out / n_in)
    centre = ((np.arange(n_out) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    fraction = centre - first.astype(np.float32)
    if snap_border:
        fraction[(first < 0) | (first >= n_in - 1)] = 0.0
    weight_second = np.rint(fraction * np.float32(_WEIGHT_ONE)).astype(np.int32)
    weight_first = np.rint((np.float32(1) - fraction) * np.float32(_WEIGHT_ONE)).astype(np.int32)
    return np.clip(first, 0, n_in - 1), np.clip(first + 1, 0, n_in - 1), weight_first, weight_second


def _from_path(path: Path, name: str) -> np.ndarray:
    with _opened(path, name) as picture:
        return _from_pil(picture, name, repr(str(path)))


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """The file as Pillow opens it; failures to open or read it become one clear error."""
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected an existing image file, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{name}: expected an image file, got the directory {str(path)!r}")
    try:
        with Image.open(path) as picture:
            yield picture
    except UnidentifiedImageError:
        raise ValueError(f"{name}: expected an image file, got {str(path)!r}, not a known format") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: expected a smaller picture, got {str(path)!r} ({error})") from error
    except OSError as error:
        raise ValueError(f"{name}: expected a readable image file, got {str(path)!r} ({error})") from error


def _from_pil(picture: Image.Image, name: str, what: str) -> np.ndarray:
    if 0 in picture.size:
        raise ValueError(f"{name}: expected at least one pixel, got {what} of size {picture.size}")
    try:
        with _truncation_is_an_error():
            picture.load()
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name}: expected a complete image, got {what}, not decodable ({error})") from error
    picture = _upright(picture)
    if picture.mode.startswith("I;16"):
        return _from_array(np.asarray(picture).astype(np.uint16), name)
    if picture.mode == "I":
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"{name}: expected 16-bit values in [0, 65535] in {what} of mode I, "
                f"got [{values.min()}, {values.max()}]"
            )
        return _from_array(values.astype(np.uint16), name)
    if picture.mode == "F":
        return _from_array(np.asarray(picture), name)
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        straight = picture.convert("LA") if picture.mode == "La" else picture  # Pillow knows no La -> RGBA
        return _over_white(np.asarray(straight.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a picture with unreadable EXIF keeps the orientation of its pixels."""
    try:
        return ImageOps.exif_transpose(picture)
    except _DECODE_ERRORS:
        return picture


@contextmanager
def _truncation_is_an_error() -> Iterator[None]:
    """Hold Pillow's global LOAD_TRUNCATED_IMAGES at False: when set, missing rows are silently gray.

    Threads may decode together: the first sets it, the last puts back what was there.
    """
    with _truncated_lock:
        if not _decoding:
            _before[:] = [ImageFile.LOAD_TRUNCATED_IMAGES]
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _decoding.append(True)
    try:
        yield
    finally:
        with _truncated_lock:
            _decoding.pop()
            if not _decoding:
                ImageFile.LOAD_TRUNCATED_IMAGES = _before[0]


def _from_tensor(tensor: Any, name: str) -> np.ndarray:
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 3)):
        raise ValueError(
            f"{name}: expected a tensor (H, W), (1, H, W) or (3, H, W), got shape {tuple(tensor.shape)}"
        )
    if not (tensor.is_floating_point() or str(tensor.dtype) == "torch.uint8"):
        raise ValueError(f"{name}: expected a tensor of uint8 or of floats in [0, 1], got {tensor.dtype}")
    tensor = tensor.detach().cpu()
    values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return _from_array(values if values.ndim == 2 else values.transpose(1, 2, 0), name)


def _from_array(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"{name}: expected an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got shape {values.shape}"
        )
    if 0 in values.shape:
        raise ValueError(f"{name}: expected at least one pixel, got shape {values.shape}")
    pixels = _to_uint8(values, name)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 4:
        return _over_white(pixels)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name}: expected uint8, bool, uint16 or floats in [0, 1], got {values.dtype}")
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise ValueError(f"{name}: expected finite floats, got {bad} NaN or infinite of {values.size} values")
    low, high = float(values.min()), float(values.max())
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        raise ValueError(f"{name}: expected floats in [0, 1], got values from {low:g} to {high:g}")
    return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3) uint8: straight alpha over a white page."""
    colour = rgba[:, :, :3].astype(np.uint16)
    alpha = rgba[:, :, 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
