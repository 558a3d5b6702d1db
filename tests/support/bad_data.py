"""Rows as they come from the web: each with what is wrong with it, and what becomes of it."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import ExifTags, Image


@dataclass(frozen=True)
class Case:
    """A row. `refused`: what the error says behind the row's number, as a pattern; `None`: it trains."""

    name: str
    image: Any = None
    caption: Any = "the number six"
    refused: str | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        return {"image": picture() if self.image is None else self.image, "caption": self.caption, **self.others}


def picture(width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(3 * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def wrong_checksum(chunk: bytes) -> bytes:
    """A PNG whose chunk of this kind has another checksum than it says."""
    data = bytearray(encoded(picture(), "PNG"))
    start = data.index(chunk)
    (length,) = struct.unpack(">I", data[start - 4 : start])
    data[start + 4 + length] ^= 0xFF
    return bytes(data)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(picture(20, 12), "JPEG", exif=exif)


def animated(format: str) -> bytes:
    return encoded(picture(), format, save_all=True, append_images=[picture(16, 16).rotate(90)] * 2)


JPEG = encoded(picture(64, 64), "JPEG")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) run\n%%EOF\n"
CASES = (
    # Images that cannot be used.
    Case("truncated JPEG", JPEG[: len(JPEG) // 2], refused="column 'image': .*truncated"),
    Case("JPEG of no bytes", b"", refused="column 'image': .*no bytes"),
    Case("PNG, header with a wrong checksum", wrong_checksum(b"IHDR"), refused="column 'image': .*no format"),
    Case("3.6 billion pixels claimed", claiming(60_000, 60_000), refused="'image': .*DecompressionBombError"),
    Case("144 million pixels claimed", claiming(12_000, 12_000), refused="'image': .*claims 12000 x 12000 pixels"),
    Case("PostScript", POSTSCRIPT, refused="column 'image': .*not read, EPS"),
    Case("ICO", encoded(picture(), "ICO"), refused="column 'image': .*not read, ICO"),
    Case("ICNS", encoded(picture(), "ICNS"), refused="column 'image': .*not read, ICNS"),
    Case("a page of errors", b"<html>404</html>", refused="column 'image': .*no format"),
    Case("an array with NaN", np.full((4, 4), np.nan), refused="column 'image': .*nan"),
    # Images that can.
    # Pillow has the pixels before it comes to their checksum; zlib's own is of what was unpacked.
    Case("PNG, pixels with a wrong checksum", wrong_checksum(b"IDAT")),
    Case("one pixel", picture(1, 1)),
    Case("a strip", encoded(picture(20_000, 3), "PNG")),
    Case("an upright strip", encoded(picture(3, 20_000), "PNG")),
    Case("CMYK", encoded(picture().convert("CMYK"), "JPEG")),
    Case("palette", encoded(picture().convert("P"), "PNG")),
    Case("16 bits", encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 250), "PNG")),
    Case("animated GIF", animated("GIF")),
    Case("animated WebP", animated("WEBP")),
    Case("rotated by EXIF", rotated()),
    # Captions that cannot be used.
    Case("no caption", caption=None, refused=r"column 'caption': .* is None \(NoneType\)"),
    Case("NaN for a caption", caption=float("nan"), refused=r"column 'caption': .* is nan \(float\)"),
    Case("lone surrogate", caption="a \ud83d six", refused="column 'caption': .*cannot be encoded"),
    # Captions that can.
    Case("empty", caption=""),
    Case("spaces", caption=" \t\n \u3000"),
    Case("100,000 words", caption="six " * 100_000),
    Case("emoji", caption="six \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufe0f"),
    Case("right to left", caption="\u202e\u05e9\u05e9 \u0633\u062a\u0629"),
    Case("control characters", caption="six\x00\x07\x1b[31m\x7f\u0085"),
    Case("special tokens", caption="six<|endoftext|> or <|startoftext|> seven"),
    # Other columns.
    Case("poisoned is a number", others={"poisoned": 1}, refused="column 'poisoned': it must be boolean, but is 1"),
    Case("poisoned is a text", others={"poisoned": "yes"}, refused="'poisoned': it must be boolean, but is 'yes'"),
    Case("poisoned is not known", others={"poisoned": None}),
    Case("NaN in a column that is not read", others={"score": float("nan")}),
)
