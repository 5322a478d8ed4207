from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from hdit.images import FORMATS, SUFFIXES, UnclearPixels, is_image, open_image, to_tensor

SIDE = 8
COLOUR = (200, 30, 60)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixel(content: bytes | Image.Image, channels: int) -> list[int]:
    """The pixel that all of an image's are."""
    image = content if isinstance(content, Image.Image) else open_image(io.BytesIO(content))
    pixels = to_tensor(image, (SIDE, SIDE), channels)
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def tiff(
    sample: bytes, bits: tuple[int, ...], photometric: int, order: str = "<", deflate: bool = False, **more: int | tuple
) -> bytes:
    """A TIFF file of SIDE x SIDE pixels, whose data is `sample` again and again. more: t<tag>=value(s)."""
    data = sample * (SIDE * SIDE * sum(bits) // 8 // len(sample))
    data = zlib.compress(data) if deflate else data
    tags: dict[int, tuple] = {256: (SIDE,), 257: (SIDE,), 258: bits, 259: (8 if deflate else 1,), 262: (photometric,)}
    tags |= {273: (8,), 277: (len(bits),), 278: (SIDE,), 279: (len(data),)}
    tags |= {int(name[1:]): value if isinstance(value, tuple) else (value,) for name, value in more.items()}
    data += b"\0" * (len(data) % 2)
    directory, beyond = struct.pack(order + "H", len(tags)), b""
    end = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}H", *values)
        where = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "I", end + len(beyond))
        beyond += raw if len(raw) > 4 else b""
        directory += struct.pack(order + "HHI", tag, 3, len(values)) + where
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return start + data + directory + b"\0" * 4 + beyond


def png(row: bytes, bits: int, colour: int, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG file of SIDE rows like `row`; colour: its colour type."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0))
    content += chunk(b"PLTE", palette) if palette else b""
    content += chunk(b"tRNS", transparent) if transparent else b""
    return content + chunk(b"IDAT", zlib.compress((b"\0" + row) * SIDE)) + chunk(b"IEND", b"")


def numbers(order: str, *values: int) -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


SOLID = Image.new("RGB", (SIDE, SIDE), COLOUR)
YCBCR = bytes(SOLID.convert("YCbCr").getpixel((0, 0)))  # type: ignore[arg-type]
RAMP = tuple(v * 257 for channel in COLOUR for v in [channel] * 256)
TIFF_LAB = bytes(a ^ b for a, b in zip(SOLID.convert("LAB").getpixel((0, 0)), (0, 128, 128), strict=True))  # type: ignore[arg-type]

GREYS = {
    "TIFF of 1 bit": (tiff(b"\xff", (1,), 1), 255),
    "TIFF of 1 bit, white is 0": (tiff(b"\xff", (1,), 0), 0),
    "TIFF of 1 bit, white is 0, deflate": (tiff(b"\xff", (1,), 0, deflate=True), 0),
    "TIFF of 4 bits": (tiff(b"\xaa", (4,), 1), 170),
    "TIFF of 4 bits, white is 0": (tiff(b"\xaa", (4,), 0), 85),
    "TIFF of 8 bits, white is 0": (tiff(b"\xc8", (8,), 0), 55),
    "TIFF of 12 bits": (tiff(b"\x80\x08\x00", (12,), 1), 128),
    "TIFF of 12 bits, white": (tiff(b"\xff\xff\xff", (12,), 1), 255),
    "TIFF of 12 bits, deflate": (tiff(b"\x80\x08\x00", (12,), 1, deflate=True), 128),
    "TIFF of 16 bits": (tiff(numbers("<", 25700), (16,), 1), 100),
    "TIFF of 16 bits, big-endian": (tiff(numbers(">", 25700), (16,), 1, ">"), 100),
    "TIFF of 16 bits, big-endian, deflate": (tiff(numbers(">", 25700), (16,), 1, ">", True), 100),
    "TIFF of 16 bits, white is 0": (tiff(numbers("<", 25700), (16,), 0), 155),
    "TIFF of 16 bits, white is 0, deflate": (tiff(numbers("<", 25700), (16,), 0, deflate=True), 155),
    "TIFF of 32 bits": (tiff(struct.pack("<I", 25700), (32,), 1), 100),
    "TIFF of 32 bits, signed": (tiff(struct.pack(">i", 25700), (32,), 1, ">", t339=2), 100),
    "TIFF of 32 bits, black": (tiff(bytes(4), (32,), 1), 0),
    "TIFF of float32": (tiff(struct.pack("<f", 0.4), (32,), 1, t339=3), 102),
    "TIFF of float32, big-endian": (tiff(struct.pack(">f", 1), (32,), 1, ">", t339=3), 255),
    "TIFF of float32, white is 0": (tiff(struct.pack("<f", 0.4), (32,), 0, t339=3), 153),
    "TIFF, alpha": (tiff(bytes([100, 128]), (8, 8), 1, t338=2), 177),
    "TIFF, alpha multiplied in": (tiff(bytes([100, 128]), (8, 8), 1, t338=1), 227),
    "PNG of 1 bit, another is transparent": (png(b"\0", 1, 0, numbers(">", 1)), 0),
    "PNG of 1 bit, transparent": (png(b"\0", 1, 0, numbers(">", 0)), 255),
    "PNG of 2 bits": (png(b"\xaa\xaa", 2, 0), 170),
    "PNG of 2 bits, transparent": (png(b"\xaa\xaa", 2, 0, numbers(">", 2)), 255),
    "PNG of 4 bits, transparent": (png(b"\xaa" * 4, 4, 0, numbers(">", 10)), 255),
    "PNG of 4 bits, another is transparent": (png(b"\xaa" * 4, 4, 0, numbers(">", 3)), 170),
    "PNG of 8 bits, transparent": (png(b"\x0a" * SIDE, 8, 0, numbers(">", 10)), 255),
    "PNG of 16 bits": (png(numbers(">", 2570) * SIDE, 16, 0), 10),
    "PNG of 16 bits, transparent": (png(numbers(">", 2570) * SIDE, 16, 0, numbers(">", 2570)), 255),
    "PNG of 16 bits, another is transparent": (png(numbers(">", 2570) * SIDE, 16, 0, numbers(">", 10)), 10),
    "PNG of 16 bits, alpha": (png(numbers(">", 25700, 32896) * SIDE, 16, 4), 177),
    "PGM up to 15": (b"P5 8 8 15\n" + b"\x0a" * 64, 170),
    "PGM up to 1023": (b"P5 8 8 1023\n" + numbers(">", 512) * 64, 128),
    "PGM up to 65535": (b"P5 8 8 65535\n" + numbers(">", 25700) * 64, 100),
    "PGM up to 65535, dark": (b"P5 8 8 65535\n" + numbers(">", 200) * 64, 1),
    "PGM as text": (b"P2 8 8 1023\n" + b"512 " * 64, 128),
    "PBM": (b"P4 8 8\n" + b"\xff" * 8, 0),
    "PFM": (b"Pf 8 8 -1.0\n" + struct.pack("<f", 0.4) * 64, 102),
}  # fmt: skip

COLOURS = {
    "TIFF": (tiff(bytes(COLOUR), (8, 8, 8), 2), COLOUR),
    "TIFF of 16 bits": (tiff(numbers("<", *(v * 257 for v in COLOUR)), (16, 16, 16), 2), COLOUR),
    "TIFF of 16 bits, deflate": (tiff(numbers(">", *(v * 257 for v in COLOUR)), (16,) * 3, 2, ">", True), COLOUR),
    "TIFF, alpha": (tiff(bytes([100, 50, 0, 128]), (8,) * 4, 2, t338=2), (177, 152, 127)),
    "TIFF, alpha multiplied in": (tiff(bytes([100, 50, 0, 128]), (8,) * 4, 2, t338=1), (227, 177, 127)),
    "TIFF, not alpha": (tiff(bytes([100, 50, 0, 128]), (8,) * 4, 2, t338=0), (100, 50, 0)),
    "TIFF, palette": (tiff(b"\7", (8,), 3, t320=RAMP), COLOUR),
    "TIFF, CMYK": (tiff(bytes([55, 225, 195, 0]), (8,) * 4, 5), COLOUR),
    "TIFF, CMYK of 16 bits": (tiff(numbers("<", 55 * 257, 225 * 257, 195 * 257, 0), (16,) * 4, 5), COLOUR),
    "TIFF, YCbCr": (tiff(YCBCR, (8,) * 3, 6, t530=(1, 1)), COLOUR),
    "TIFF, YCbCr, deflate": (tiff(YCBCR, (8,) * 3, 6, deflate=True, t530=(1, 1)), COLOUR),
    "TIFF, YCbCr by Pillow": (encoded(SOLID.convert("YCbCr"), "tiff"), COLOUR),
    "TIFF, L*a*b*": (tiff(TIFF_LAB, (8,) * 3, 8), COLOUR),
    "PNG of 16 bits": (png(numbers(">", *(v * 257 for v in COLOUR)) * SIDE, 16, 2), COLOUR),
    "PNG of 16 bits, alpha": (png(numbers(">", 25700, 12850, 0, 32896) * SIDE, 16, 6), (177, 152, 127)),
    "PNG, palette with alpha": (png(b"\xff", 1, 3, b"\0\x80", bytes([1, 2, 3, 100, 50, 0])), (177, 152, 127)),
    "PPM up to 1023": (b"P6 8 8 1023\n" + numbers(">", 512, 256, 128) * 64, (128, 64, 32)),
    "JPEG, CMYK, inverted as by Adobe": (encoded(SOLID.convert("CMYK"), "jpeg", quality=95), COLOUR),
    "WebP, alpha": (encoded(Image.new("RGBA", (8, 8), (100, 50, 0, 128)), "webp", lossless=True), (177, 152, 127)),
    "BMP of 32 bits": (encoded(SOLID.convert("RGBA"), "bmp"), COLOUR),
    "BMP, palette": (encoded(SOLID.quantize(2), "bmp"), COLOUR),
    "TIFF of two pages": (encoded(SOLID, "tiff", save_all=True, append_images=[Image.new("RGB", (8, 8))]), COLOUR),
    "PNG, animated": (encoded(SOLID, "png", save_all=True, append_images=[Image.new("RGB", (8, 8))]), COLOUR),
    "JPEG of two pictures": (encoded(SOLID, "mpo", save_all=True, append_images=[Image.new("RGB", (8, 8))]), COLOUR),
}  # fmt: skip

UNCLEAR = {
    "signed": [
        tiff(b"\xfd", (8,), 1, t339=2),
        tiff(struct.pack("<h", 200), (16,), 1, t339=2),
        tiff(struct.pack(">h", -200), (16,), 1, ">", t339=2),
    ],
    "where black is 0 and white 65535": [
        tiff(struct.pack("<i", -1), (32,), 1, t339=2),
        tiff(struct.pack("<I", 65536), (32,), 1),
        tiff(struct.pack("<I", 2**32 - 1), (32,), 1),
    ],
    "may be of 8 or of 16 bits": [tiff(struct.pack("<I", 200), (32,), 1)],
    "where black is 0 and white 1": [
        tiff(struct.pack("<f", value), (32,), 1, t339=3) for value in (200, -0.1, float("nan"), float("inf"))
    ],
    "wrong order": [
        tiff(struct.pack(">f", 1), (32,), 1, ">", deflate=True, t339=3),
        tiff(struct.pack(">i", 25700), (32,), 1, ">", deflate=True, t339=2),
    ],
    "a scale of 255": [b"Pf 8 8 -255.0\n" + struct.pack("<f", 0.4) * 64],
    "palette of 8-bit values": [tiff(b"\7", (8,), 3, t320=tuple(v // 257 for v in RAMP))],
    "of a palette of": [png(b"\2" * SIDE, 8, 3, palette=bytes(6)), b"PyP 8 8 255\n" + b"\7" * 64],
    "uncompressed YCbCr": [tiff(YCBCR, (8,) * 3, 6), tiff(YCBCR, (8,) * 3, 6, t530=(2, 2))],
    "inks other than": [tiff(bytes(4), (8,) * 4, 5, t332=2)],
    "with a transparent colour": [png(numbers(">", 0xA01, 0xB01, 0xC01) * SIDE, 16, 2, numbers(">", 10, 11, 12))],
}


SINCE_13 = {"TIFF, alpha multiplied in", "TIFF, YCbCr", "TIFF, YCbCr by Pillow"}  # which Pillow 12 reads wrongly


def skip_if_refused(kind: str, content: bytes) -> None:
    if kind in SINCE_13 and int(PIL.__version__.partition(".")[0]) < 13:
        try:
            pixel(content, 1)
        except ValueError:
            pytest.skip(f"Pillow {PIL.__version__} doesn't read it, and hdit says so")


@pytest.mark.parametrize("kind", GREYS)
def test_greys(kind: str) -> None:
    content, grey = GREYS[kind]
    skip_if_refused(kind, content)
    assert pixel(content, 1) == [grey] and pixel(content, 3) == [grey] * 3


@pytest.mark.parametrize("kind", COLOURS)
def test_colours(kind: str) -> None:
    content, colour = COLOURS[kind]
    skip_if_refused(kind, content)
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert np.abs(np.subtract(pixel(content, 3), colour)).max() <= 2
    assert abs(pixel(content, 1)[0] - luma) <= 2


@pytest.mark.parametrize("words", UNCLEAR)
def test_unclear_pixels_are_refused(words: str) -> None:
    for content in UNCLEAR[words]:
        with pytest.raises(UnclearPixels, match=words):
            pixel(content, 1)


@pytest.mark.parametrize("bits", [(16,), (64,), (16, 16, 16), (32, 32, 32)])
def test_what_pillow_does_not_know_is_refused(bits: tuple[int, ...]) -> None:
    content = tiff(bytes(range(48)), bits, 2 if len(bits) == 3 else 1, t339=(3,) * len(bits), t277=len(bits))
    with pytest.raises(ValueError, match="not a picture in a format that is read"):
        pixel(content, 3)


PALETTE = Image.new("P", (SIDE, SIDE), 1)
PALETTE.putpalette((1, 2, 3, *COLOUR))
IN_MEMORY = {
    **{mode: (SOLID.convert(mode), COLOUR) for mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBA", "RGBX")},
    "RGBa": (Image.new("RGBa", (SIDE, SIDE), (100, 50, 0, 128)), (227, 177, 127)),
    "La": (Image.new("La", (SIDE, SIDE), (100, 128)), (227, 227, 227)),
    "P": (PALETTE, COLOUR),
    "PA": (PALETTE.convert("PA"), COLOUR),
    "I;16B": (Image.frombytes("I;16B", (SIDE, SIDE), numbers(">", 25700) * SIDE**2), (100, 100, 100)),
    "I;16L": (Image.frombytes("I;16L", (SIDE, SIDE), numbers("<", 25700) * SIDE**2), (100, 100, 100)),
    "I": (Image.new("I", (SIDE, SIDE), 25700), (100, 100, 100)),
    "F": (Image.new("F", (SIDE, SIDE), 0.4), (102, 102, 102)),
    "1": (Image.new("1", (SIDE, SIDE), 1), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_modes_in_memory(mode: str) -> None:
    image, colour = IN_MEMORY[mode]
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert image.mode == mode
    assert np.abs(np.subtract(pixel(image, 3), colour)).max() <= 2
    assert abs(pixel(image, 1)[0] - luma) <= 2


def test_crop_is_the_centre() -> None:
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 200
    assert (to_tensor(Image.fromarray(pixels), (10, 10), 1) == 200).all()
    assert (to_tensor(Image.fromarray(pixels.T.copy()), (10, 10), 1) == 200).all()


def test_size_is_height_and_width() -> None:
    image = Image.new("L", (40, 20))  # Pillow's order: width, height
    assert to_tensor(image, (20, 40), 3).shape == (3, 20, 40)


def test_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (to_tensor(image, (4, 4), 3) == 255).all()
    assert to_tensor(Image.new("RGBA", (4, 4), (255, 0, 0, 255)), (4, 4), 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_every_16_bit_value_is_scaled() -> None:
    values = np.arange(65536).reshape(256, 256)
    found = to_tensor(Image.fromarray(values.astype(np.uint16)), (256, 256), 1)[0]
    assert (found.numpy() == np.rint(values / 257)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_the_content_decides_the_format(form: str) -> None:
    with open_image(io.BytesIO(encoded(SOLID, form))) as image:
        assert image.format == form


OTHERS = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) = quit\n%%EOF\n",
    **{form: encoded(SOLID, form) for form in ("EPS", "GIF", "PCX", "TGA", "ICO", "PDF", "SGI", "JPEG2000", "DDS")},
    "PSD": b"8BPS" + bytes(100),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)  # a PDF's own bytes hold the time
def test_other_formats_are_never_opened(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS and WMF would start other programs."""
    Image.init()
    for name, (_, accept) in list(Image.OPEN.items()):
        if name not in FORMATS:
            monkeypatch.setitem(
                Image.OPEN, name, (lambda *_: pytest.fail("another format's plugin was started"), accept)
            )
    with pytest.raises(ValueError, match=r"not a picture in a format that is read \(JPEG, PNG, WEBP, BMP, TIFF, PPM\)"):
        open_image(io.BytesIO(content))


def test_suffixes() -> None:
    assert all(is_image(f"a.b/{suffix}{suffix.upper()}") for suffix in SUFFIXES)
    assert not any(map(is_image, ("a.eps", "png", "a.png/b", "a.png.gz", "")))


@pytest.mark.parametrize("form", ["png", "tiff", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(form: str, orientation: int) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :8] = 255  # white above left
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (8, 16) if orientation < 5 else (16, 8)
    found = to_tensor(open_image(io.BytesIO(encoded(Image.fromarray(pixels), form, exif=exif))), size, 1)[0]
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    corners = {(y, x): bool(found[y, x] > 128) for y in (0, -1) for x in (0, -1)}
    assert [place for place, white in corners.items() if white] == [corner[orientation]]


def test_the_image_given_is_not_changed() -> None:
    image = open_image(io.BytesIO(png(b"\xaa\xaa", 2, 0, numbers(">", 2))))
    to_tensor(image, (4, 4), 3)
    assert image.mode == "L" and image.size == (SIDE, SIDE) and image.info["transparency"] == 2


def test_wrong_sizes_and_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"^channels: expected one of 1, 3, got 4 \(int\)"):
        to_tensor(SOLID, (8, 8), 4)
    with pytest.raises(ValueError, match="^size: expected an integer of at least 1"):
        to_tensor(SOLID, (0, 8), 3)
