"""Reading image files: the one way for first frames, photos and folders of images.

An image comes out upright (EXIF), in RGB with 8 bits, whatever it is stored as: 1 to 32 bits of grey, a palette, CMYK.
Transparent pixels are laid over white. Of an animation or a document with pages the first picture is taken. The last
two are said in the log. Only formats that Pillow decodes itself are read: none that starts another program.
"""

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# EXIF's orientation -> what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 274  # EXIF's number for it
_SAMPLE_FORMAT = 339  # TIFF's tag: 1 unsigned, 2 signed
# A JPEG of a phone: the further pictures are previews or depth, not an animation.
_ONE_SCENE = ("MPO",)


class ImageError(ValueError):
    """An image file that cannot be read. The message is one line that names the file."""


def read_image(path: str | Path) -> torch.Tensor:
    """An image file as uint8 [height, width, 3], upright.

    Raises:
        ImageError: no such file, a folder, not permitted, not an image, truncated or damaged, more pixels than Pillow
            takes for honest (179 million), or floating-point pixels outside 0 .. 1.
    """
    _check_readable(path)
    try:
        with warnings.catch_warnings():
            # Between half of its limit and the limit Pillow warns; such photos are in use.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                return torch.from_numpy(_to_rgb(path, image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{path}: {_not_an_image(path)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: is too large to be read as an image: {error}") from None
    # Pillow's parsers raise whatever they meet in a damaged file: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: is truncated or damaged ({reason})") from error


def _check_readable(path: str | Path) -> None:
    place = Path(path)
    try:
        if place.is_dir():
            raise ImageError(f"{path}: is a folder, not an image")
        if not place.exists():
            raise ImageError(f"{path}: no such file")
        if not place.is_file():
            raise ImageError(f"{path}: is not a regular file")
        with place.open("rb"):
            pass
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened: {error.strerror}") from error


def _not_an_image(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        start = file.read(16)
    if not start:
        return "is empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "is an HEIC image, which cannot be read; convert it to JPEG or PNG"
    return f"is not an image that can be read ({', '.join(IMAGE_FORMATS)})"


def _to_rgb(path: str | Path, image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3], upright."""
    pictures = 1 if image.format in _ONE_SCENE else getattr(image, "n_frames", 1)
    if pictures > 1:
        logger.warning("%s: has %d pictures; the first is taken", path, pictures)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_deep_grey(path, image))
    if image.has_transparency_data:
        image = _over_white(path, image.convert("RGBA"))
    image = image.convert("RGB")
    return np.array(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> object:
    """EXIF's number. EXIF that cannot be parsed says nothing, as for every viewer; the pixels are decoded already."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # as for the decoders above
        return None


def _deep_grey(path: str | Path, image: Image.Image) -> np.ndarray:
    """uint8 [h, w] of grey with 16 or 32 bits: black to white is the whole range of the stored type."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1):
            raise ImageError(f"{path}: has floating-point pixels outside 0 .. 1; convert it to 8 or 16 bits")
        return np.round(values * 255).astype(np.uint8)
    white = 65535.0
    # Pillow widens 16-bit PNG and PPM to its 32-bit mode "I"; only TIFF has real 32-bit grey.
    if image.mode == "I" and image.format == "TIFF":
        is_signed = image.tag_v2.get(_SAMPLE_FORMAT, (1,)) in (2, (2,))
        white = 2.0**31 - 1 if is_signed else 2.0**32 - 1
        values = values if is_signed else values.view(np.uint32)
    return np.round(values.clip(0).astype(np.float64) * (255 / white)).clip(0, 255).astype(np.uint8)


def _over_white(path: str | Path, image: Image.Image) -> Image.Image:
    """RGBA over white."""
    if image.getextrema()[3][0] == 255:
        return image
    logger.warning("%s: has transparent pixels; they are laid over white", path)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
