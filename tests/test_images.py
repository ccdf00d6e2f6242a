import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from segclip_fast.data.images import load_image, resize_bilinear_tensor, resize_bilinear_uint8


def _rgb(h=5, w=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def _smooth(h=120, w=160):
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, (x + y) * 255 // (h + w)], axis=-1).astype(np.uint8)


# ---- every accepted source gives the same picture ----


def test_path_as_str_and_path(tmp_path):
    image = _rgb()
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), image)
    assert np.array_equal(load_image(str(tmp_path / "a.png")), image)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: Image.fromarray(a),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: a.astype(np.float32) / 255,
        lambda a: a.astype(np.float64) / 255,
        lambda a: np.asfortranarray(a),
        lambda a: np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1).float().div(255).requires_grad_(),
    ],
    ids=["uint8", "pil", "uint16", "float32", "float64", "fortran", "rgba", "tensor-uint8", "tensor-float"],
)
def test_rgb_sources_agree(convert):
    image = _rgb()
    out = load_image(convert(image))
    assert out.dtype == np.uint8
    assert out.flags.c_contiguous
    assert np.array_equal(out, image)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: a[:, :, None],
        lambda a: Image.fromarray(a),
        lambda a: Image.fromarray(a).convert("LA"),
        lambda a: Image.fromarray(a).convert("LA").convert("La"),
        lambda a: Image.fromarray(a).convert("RGBA"),
        lambda a: Image.fromarray(a.astype(np.uint16) * 257),
        lambda a: Image.fromarray(a.astype(np.int32) * 257),
        lambda a: Image.fromarray(a.astype(np.float32) / 255),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a)[None],
    ],
    ids=["HW", "HW1", "L", "LA", "La", "RGBA", "I;16", "I", "F", "tensor-HW", "tensor-1HW"],
)
def test_gray_sources_agree(convert):
    gray = _rgb()[:, :, 0]
    assert np.array_equal(load_image(convert(gray)), np.repeat(gray[:, :, None], 3, axis=2))


def test_bool_array_and_one_bit_image():
    values = _rgb()[:, :, 0] > 127
    expected = np.repeat(values[:, :, None], 3, axis=2).astype(np.uint8) * 255
    assert np.array_equal(load_image(values), expected)
    assert np.array_equal(load_image(Image.fromarray(values)), expected)


def test_half_and_bfloat16():
    image = _rgb()
    scaled = image.astype(np.float32) / 255
    assert np.abs(load_image(scaled.astype(np.float16)).astype(int) - image).max() <= 1
    tensor = torch.from_numpy(scaled).permute(2, 0, 1).to(torch.bfloat16)
    assert np.abs(load_image(tensor).astype(int) - image).max() <= 1


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert load_image(values)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_big_endian_sixteen_bit_tiff(tmp_path):
    Image.frombytes("I;16B", (2, 1), b"\x80\x00\xff\xff").save(tmp_path / "be.tif")
    assert load_image(tmp_path / "be.tif")[0, :, 0].tolist() == [128, 255]


def test_palette_with_and_without_transparency(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    picture.putpixel((1, 0), 1)
    assert load_image(picture)[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    picture.save(tmp_path / "p.png", transparency=1)
    assert load_image(tmp_path / "p.png")[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_alpha_is_composited_over_white():
    pixel = np.array([[[0, 100, 200, 0], [0, 100, 200, 255], [0, 100, 200, 51]]], dtype=np.uint8)
    expected = [[255, 255, 255], [0, 100, 200], [204, 224, 244]]
    assert load_image(pixel)[0].tolist() == expected
    assert load_image(Image.fromarray(pixel))[0].tolist() == expected


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 60)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert np.abs(load_image(tmp_path / "c.jpg").astype(int) - [200, 40, 60]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0, 0], upright[0, 2], upright[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "e.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "e.png"), upright)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_sizes(tmp_path, size):
    image = _rgb(*size)
    Image.fromarray(image).save(tmp_path / "x.png")
    assert np.array_equal(load_image(tmp_path / "x.png"), image)
    assert np.array_equal(load_image(image), image)


def test_animation_gives_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_result_never_shares_memory():
    image = _rgb()
    out = load_image(image)
    out[:] = 0
    assert image.any()


def test_float_rounding_noise_is_tolerated():
    values = np.full((2, 2), np.float32(1 + 5e-7))
    assert (load_image(values) == 255).all()


# ---- refusals ----


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"photo: expected an existing image file, got '.*none.jpg'"):
        load_image(tmp_path / "none.jpg", name="photo")


def test_directory_and_text_file(tmp_path):
    with pytest.raises(ValueError, match="image: expected an image file, got the directory"):
        load_image(tmp_path)
    (tmp_path / "note.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"image: expected an image file, got .*note\.jpg"):
        load_image(tmp_path / "note.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image: expected an image file, got .*empty\.png"):
        load_image(tmp_path / "empty.png")


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("lenient_pillow", [False, True])
def test_truncated_file_is_refused(tmp_path, monkeypatch, fraction, suffix, lenient_pillow):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient_pillow)
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(_rgb(120, 160)).save(whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=r"image: expected a (complete|readable) image"):
        load_image(cut)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient_pillow
    with Image.open(cut) as picture, pytest.raises(ValueError, match="image: expected a complete image"):
        load_image(picture)


@pytest.mark.parametrize(
    "empty",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.uint8),
        Image.new("RGB", (0, 4)),
        torch.zeros(3, 0, 5),
    ],
    ids=["rows", "columns", "pil", "tensor"],
)
def test_no_pixels(empty):
    with pytest.raises(ValueError, match="image: expected at least one pixel, got"):
        load_image(empty)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_floats(bad):
    values = np.zeros((3, 4, 3), np.float32)
    values[1, 2, 0] = bad
    with pytest.raises(ValueError, match="image: expected finite floats, got 1 NaN or infinite of 36"):
        load_image(values)
    with pytest.raises(ValueError, match="image: expected finite floats"):
        load_image(torch.from_numpy(values).permute(2, 0, 1))
    with pytest.raises(ValueError, match="image: expected finite floats"):
        load_image(Image.fromarray(values[:, :, 0]))


@pytest.mark.parametrize("bad", [255.0, 1.01, -0.01])
def test_floats_outside_unit_interval(bad):
    values = np.zeros((3, 4), np.float64)
    values[0, 0] = bad
    with pytest.raises(ValueError, match=r"image: expected floats in \[0, 1\], got values from"):
        load_image(values)


@pytest.mark.parametrize("shape", [(), (4,), (4, 5, 2), (3, 4, 5), (1, 4, 5, 3), (4, 5, 0)])
def test_wrong_array_shape(shape):
    with pytest.raises(ValueError, match=r"image: expected an array \(H, W\)"):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(4,), (4, 5, 3), (2, 4, 5), (1, 3, 4, 5)])
def test_wrong_tensor_shape(shape):
    with pytest.raises(ValueError, match=r"image: expected a tensor \(H, W\)"):
        load_image(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.complex64, object, "U1"])
def test_wrong_array_dtype(dtype):
    with pytest.raises(ValueError, match="image: expected uint8, bool, uint16 or floats"):
        load_image(np.zeros((2, 2), dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_tensor_dtype(dtype):
    with pytest.raises(ValueError, match="image: expected a tensor of uint8 or of floats"):
        load_image(torch.zeros(2, 2, dtype=dtype))


def test_mode_i_outside_sixteen_bits():
    with pytest.raises(ValueError, match=r"image: expected 16-bit values in \[0, 65535\]"):
        load_image(Image.fromarray(np.array([[70000]], np.int32)))


@pytest.mark.parametrize("source", [None, 3, b"bytes", [[1, 2]]])
def test_wrong_type(source):
    with pytest.raises(ValueError, match="image: expected a path, a PIL image, a NumPy array or a torch"):
        load_image(source)


# ---- resizing ----

RESIZES = [
    ((37, 53), (64, 64)),
    ((480, 640), (224, 224)),
    ((100, 100), (50, 50)),
    ((64, 64), (224, 299)),
    ((33, 65), (33, 65)),
    ((7, 5), (3, 2)),
    ((1, 4000), (8, 224)),
    ((1, 1), (4, 4)),
    ((2, 2), (448, 1)),
]


@pytest.mark.parametrize(("source", "target"), RESIZES, ids=str)
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_resize_equals_opencv(source, target, channels):
    cv2 = pytest.importorskip("cv2")
    shape = source if channels is None else (*source, channels)
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    expected = cv2.resize(image, target[::-1], interpolation=cv2.INTER_LINEAR).reshape(*target, *shape[2:])
    out = resize_bilinear_uint8(image, target)
    assert out.dtype == np.uint8
    assert out.shape == expected.shape
    assert np.abs(out.astype(int) - expected).max() <= 1
    assert (out != expected).mean() < 1e-3


def test_resize_by_hand():
    out = resize_bilinear_uint8(np.array([[0, 100]], np.uint8), (1, 4))
    assert out.tolist() == [[0, 25, 75, 100]]
    assert (resize_bilinear_uint8(np.full((9, 5, 3), 255, np.uint8), (31, 2)) == 255).all()
    image = _smooth()
    assert np.array_equal(resize_bilinear_uint8(image, image.shape[:2]), image)


def test_resize_refuses():
    image = _rgb()
    with pytest.raises(ValueError, match="image: expected a non-empty"):
        resize_bilinear_uint8(image.astype(np.float32), (2, 2))
    with pytest.raises(ValueError, match="image: expected a non-empty"):
        resize_bilinear_uint8(image[:0], (2, 2))
    for size in ((0, 4), (4, -1), (2.5, 2)):
        with pytest.raises(ValueError, match="size_hw: expected two integers"):
            resize_bilinear_uint8(image, size)


def test_importing_the_data_package_does_not_import_torch():
    code = "import sys, segclip_fast.data, segclip_fast.data.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("size", [(375, 500), (31, 47), (224, 224), (1, 900), (700, 300)], ids=str)
@pytest.mark.parametrize("target", [(224, 299), (1, 1), (500, 640), (47, 3)], ids=str)
def test_resize_of_a_tensor_has_the_same_bits(size, target):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = resize_bilinear_tensor(torch.from_numpy(image), target)
    np.testing.assert_array_equal(found.numpy(), resize_bilinear_uint8(image, target))
