"""The templates, and how a page carries pictures and files within itself."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import jinja2

#: Smaller pictures are enlarged to about this width, pixel by pixel.
WIDTH = 96


def templates(**options: Any) -> jinja2.Environment:
    """The package's templates, in which a missing value is an error; `options` say how values are escaped."""
    import jinja2

    return jinja2.Environment(  # nosec B701 # by `options`
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def picture(image: Image.Image) -> str:
    """An image as a data URI: a PNG, without loss, so that a faint trigger stays in it."""
    factor = max(1, round(WIDTH / image.width))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def data_uri(content: bytes, media_type: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
