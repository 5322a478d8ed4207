"""Pictures: which files are opened, and how every kind of pixel becomes 8 bits of grey or of red, green and blue."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from hdit._extras import require
from hdit_kernels import checks

FORMATS = {  # Pillow's names of the formats that are read, and no others: for some it would start other programs
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
SUFFIXES = {suffix for suffixes in FORMATS.values() for suffix in suffixes}
MODES = {1: "L", 3: "RGB"}  # Pillow's name for an image of so many channels
STEPS = {"L;2": 85, "L;4": 17}  # Pillow scales pixels of 2 and 4 bits by so much, but not the one that is transparent

# Tags of a TIFF file, and values of PHOTOMETRIC
BITS, PHOTOMETRIC, COLOUR_MAP, INK_SET, SAMPLE_FORMAT, YCBCR_SUBSAMPLING = 258, 262, 320, 332, 339, 530
WHITE_IS_ZERO, CMYK, YCBCR = 0, 5, 6


class UnclearPixels(ValueError):
    """A file doesn't say which grey or colour its pixels are."""


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's that is read."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def open_image(file: IO[bytes]) -> Any:
    """The Pillow image in a file of one of FORMATS, whatever the file's name. ValueError if it is of another format."""
    pillow = require("PIL.Image", "train")
    try:
        return pillow.open(file, formats=tuple(FORMATS))
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"not a picture in a format that is read ({', '.join(FORMATS)})") from error


def to_tensor(image: Any, size: tuple[int, int], channels: int) -> Tensor:
    """A Pillow image, upright, on white where transparent, cropped (centre) and resized: uint8 [channels, H, W].

    size: (height, width). channels: 1 or 3. White is 255 for every depth and mode: integers of 12 and 16 bits are
    scaled, those of 32 bits are taken for 16-bit values, floating-point numbers for 0 (black) to 1 (white). Of an
    animation or several pages it is the first. Raises UnclearPixels where the grey or colour can't be known: integers
    beyond 16 bits, or of 32 bits and all below 256, numbers outside [0, 1], signed pixels of 8 and 16 bits, and a few
    rarities of TIFF, PNG and PFM files.

    image: as open_image returns it, not yet loaded, since Pillow then forgets how a PNG file stored transparency.
    """
    numpy, pillow, ops = require("numpy", "train"), require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    (height, width), mode = checks.pair("size", size), MODES[checks.choice("channels", channels, MODES.keys())]
    stored, tags = _stored_as(image), getattr(image, "tag_v2", {})
    _refuse_unclear(image, stored, tags)
    upright = ops.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        inverted = bool(tags) and tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO
        upright = _eight_bits(upright, _white(image, tags), inverted)
    elif stored in STEPS and "transparency" in image.info:
        upright.info["transparency"] *= STEPS[stored]
    if upright.mode in ("La", "LAB"):  # which Pillow converts to one mode only
        upright = upright.convert("LA" if upright.mode == "La" else "RGB")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = pillow.alpha_composite(pillow.new("RGBA", upright.size, "white"), upright)
    fitted = ops.fit(upright.convert(mode), (width, height), pillow.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(fitted))
    return (pixels[:, :, None] if channels == 1 else pixels).permute(2, 0, 1).contiguous()


def _white(image: Any, tags: Any) -> int:
    """The value of white in a grey image of more than 8 bits."""
    if image.mode == "F":
        return 1
    bits = tags.get(BITS, (16,))[0]
    return 2 ** min(bits, 16) - 1


def _eight_bits(image: Any, white: int, inverted: bool) -> Any:
    """A grey image of more than 8 bits in mode L, or LA if a value is transparent."""
    numpy, pillow = require("numpy", "train"), require("PIL.Image", "train")
    values = numpy.asarray(image)
    low, high = values.min(), values.max()
    if not (0 <= low and high <= white):  # NaN too
        raise UnclearPixels(f"pixels from {low:g} to {high:g}, where black is 0 and white {white}")
    scaled = (values * numpy.float32(255 / white)).round().astype("uint8")
    grey = pillow.fromarray(255 - scaled if inverted else scaled)
    if "transparency" in image.info:
        grey.putalpha(pillow.fromarray(numpy.where(values == image.info["transparency"], 0, 255).astype("uint8")))
    return grey


def _stored_as(image: Any) -> str:
    """How the samples lie in the file, by Pillow's "raw mode"; empty if the image isn't of a file or is loaded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _refuse_unclear(image: Any, stored: str, tags: Any) -> None:
    """UnclearPixels where Pillow would give another grey or colour than the file's, or a guess, without a word."""
    if 2 in tags.get(SAMPLE_FORMAT, ()) and tags.get(BITS, (1,))[0] <= 16:
        raise UnclearPixels("signed pixels, whose white is not known")
    photometric = tags.get(PHOTOMETRIC)
    if photometric == CMYK and tags.get(INK_SET, 1) != 1:
        raise UnclearPixels("inks other than cyan, magenta, yellow and black")
    if photometric == YCBCR and image.info.get("compression") == "raw":
        if stored != "YCbCr" or tags.get(YCBCR_SUBSAMPLING) != (1, 1):  # Pillow 12 reads none of them
            raise UnclearPixels("uncompressed YCbCr that Pillow doesn't read")
    if image.mode in ("P", "PA"):
        if COLOUR_MAP in tags and max(tags[COLOUR_MAP]) < 256:
            raise UnclearPixels("a palette of 8-bit values in place of 16-bit ones")
        image.load()
        used = image.getextrema() if image.mode == "P" else image.getextrema()[0]
        colours = len(image.getpalette() or ()) // 3
        if used[1] >= colours:
            raise UnclearPixels(f"colour {used[1]} of a palette of {colours}")
    if stored == "RGB;16B" and "transparency" in image.info:
        raise UnclearPixels("16-bit colour with a transparent colour, which Pillow reads with 8 bits")
    if stored in ("F;32BF", "I;32BS") and image.info.get("compression", "raw") != "raw":
        raise UnclearPixels("compressed big-endian numbers, whose bytes Pillow puts in the wrong order")
    if image.mode == "F" and image.info.get("scale", 1) != 1:
        raise UnclearPixels(f"a scale of {image.info['scale']:g}")
    if image.mode == "I" and image.format != "PPM" and 0 < image.getextrema()[1] < 256:
        raise UnclearPixels("32-bit integers up to 255, which may be of 8 or of 16 bits")
