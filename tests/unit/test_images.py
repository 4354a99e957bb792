"""The one reader of images: upright, any depth, transparency over white; what cannot be read is one line."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_fsvideo.data.images import ImageError, read_image

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [90, 90, 90], [200, 200, 200]]], np.uint8)
# EXIF's orientation -> how the stored pixels come about from the upright picture.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def saved(folder, image, name="a.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_every_orientation_comes_out_upright(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](CORNERS)))
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, stored, name, exif=exif, **options)
    assert np.array_equal(read_image(path), CORNERS)


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    grey = np.array([[0, 1000, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        assert read_image(saved(tmp_path, Image.fromarray(grey), name))[0, :, 0].tolist() == [0, 4, 128, 255]
    wide = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], np.int32))
    assert read_image(saved(tmp_path, wide, "b.tif"))[0, :, 1].tolist() == [0, 128, 255]
    real = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert read_image(saved(tmp_path, real, "c.tif"))[0, :, 2].tolist() == [0, 128, 255]
    with pytest.raises(ImageError, match="d.tif: has floating-point pixels outside"):
        read_image(saved(tmp_path, Image.fromarray(np.array([[0.0, 255.0]], np.float32)), "d.tif"))


def test_transparency_lies_over_white_and_is_said(tmp_path, caplog):
    hidden_black = np.zeros((1, 3, 4), np.uint8)
    hidden_black[0, :, 3] = 0, 255, 128
    expected = [[255, 255, 255], [0, 0, 0], [127, 127, 127]]
    assert read_image(saved(tmp_path, Image.fromarray(hidden_black)))[0].tolist() == expected
    assert "a.png: has transparent pixels; they are laid over white" in caplog.text
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read_image(saved(tmp_path, palette, "p.png", transparency=0))[0].tolist() == [[255] * 3, [10, 20, 30]]
    caplog.clear()
    opaque = np.full((1, 1, 4), 255, np.uint8)
    assert read_image(saved(tmp_path, Image.fromarray(opaque), "o.png"))[0, 0].tolist() == [255, 255, 255]
    assert not caplog.text


def test_palette_cmyk_one_bit_and_the_first_of_an_animation(tmp_path, caplog):
    image = Image.fromarray(CORNERS)
    assert np.array_equal(
        read_image(saved(tmp_path, image.convert("P", palette=Image.Palette.ADAPTIVE), "p.png")), CORNERS
    )
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = read_image(saved(tmp_path, cmyk, "c.jpg"))[4, 4].tolist()
    assert red[0] > 240 and max(red[1:]) < 20
    assert read_image(saved(tmp_path, Image.new("1", (2, 2), 1), "bit.png"))[0, 0].tolist() == [255, 255, 255]
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], "m.gif", save_all=True, append_images=frames[1:])
    assert read_image(path)[0, 0].tolist() == [255, 0, 0]
    assert "m.gif: has 3 pictures; the first is taken" in caplog.text


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height):
    """A PNG that promises this size in a few bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_what_cannot_be_read_is_one_line(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    files = {
        "truncated.jpg": (whole[: len(whole) // 2], "truncated or damaged"),
        "giant.png": (png_of(20000, 20000), "too large"),
        "promised.png": (png_of(4000, 4000), "truncated or damaged"),
        "text.png": (b"hello", "not an image that can be read"),
        "empty.png": (b"", "is empty"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    wanted = {name: words for name, (_, words) in files.items()}
    wanted |= {"pipe.png": "not a regular file", "folder.png": "is a folder", "none.png": "no such file"}
    for name, words in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError) as error:
                read_image(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_large_photo_is_read_without_a_warning(tmp_path):
    path = saved(tmp_path, Image.new("1", (10000, 10000), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == (10000, 10000, 3)
    assert read_image(path).dtype == torch.uint8
