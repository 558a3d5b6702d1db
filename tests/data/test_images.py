"""Images of any origin come out upright, RGB and right to the pixel, or fail with the reason."""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps
from support.bad_data import POSTSCRIPT, claiming
from transformers import BatchFeature, CLIPImageProcessor, SiglipImageProcessor

from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.imaging import decode_image

HEIGHT, WIDTH = 6, 9


def colours(seed: int = 0, height: int = HEIGHT, width: int = WIDTH, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def decoded(value) -> np.ndarray:
    image = decode_image(value)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    return share * rgb + (1 - share) * 255


# ---- Where an image comes from ----


def test_every_kind_of_value_gives_the_same_pixels(tmp_path: Path):
    pixels = colours()
    image = Image.fromarray(pixels)
    data = encode(image)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    values = [
        image,
        Image.open(path),
        str(path),
        path,
        data,
        bytearray(data),
        memoryview(data),
        {"bytes": data, "path": None},
        {"bytes": data},
        {"bytes": data, "path": "a name that is no file"},
        {"bytes": None, "path": str(path)},
        {"path": str(path)},
        pixels,
        pixels[:, ::-1][:, ::-1],
        pixels.astype(np.int64),
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        pixels.astype(np.float32),
        channels_first,
        torch.from_numpy(pixels),
        torch.from_numpy(channels_first),
        torch.from_numpy(channels_first / 255).requires_grad_(),
        pixels.tolist(),
        (pixels / 255).tolist(),
    ]
    for value in values:
        np.testing.assert_array_equal(decoded(value), pixels)


def test_a_streamed_path_is_opened_as_datasets_would(tmp_path: Path):
    pixels = colours()
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("folder/image.png", encode(Image.fromarray(pixels)))
        file.writestr("bomb.png", claiming(12_000, 12_000))
        file.writestr("program", POSTSCRIPT)
    value = {"path": f"zip://folder/image.png::{archive}", "bytes": None}
    np.testing.assert_array_equal(decoded(value), pixels)
    for name, reason in (("bomb.png", "claims 12000 x 12000 pixels"), ("program", "not read, EPS")):
        with pytest.raises(ValueError, match=reason):
            decode_image(f"zip://{name}::{archive}")


def test_a_path_is_shown_without_what_a_terminal_would_carry_out(tmp_path: Path):
    path = tmp_path / "a\x1b[2J\nb.png"
    path.write_bytes(b"no image")
    for value in (path, str(path), {"path": str(path), "bytes": None}, str(path) + "c"):
        with pytest.raises(ValueError) as error:
            decode_image(value)
        assert str(error.value).isprintable()


def test_decoding_again_changes_nothing():
    rotated = Image.fromarray(colours())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for value in (encode(rotated, exif=exif), encode(Image.fromarray(colours(channels=4))), colours()):
        once = decode_image(value)
        np.testing.assert_array_equal(decoded(once), np.asarray(once))


def test_a_pil_image_is_left_as_it_was():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(io.BytesIO(encode(Image.fromarray(colours()), exif=exif)))
    before = np.asarray(image).copy()
    decode_image(image)
    np.testing.assert_array_equal(np.asarray(image), before)
    assert image.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize("format", ["PNG", "TIFF", "GIF", "BMP", "WEBP"])
def test_an_image_loaded_before_its_file_was_closed_decodes(tmp_path: Path, format: str):
    path = tmp_path / "image"
    Image.fromarray(colours()).save(path, format=format)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decoded(image), expected)


def test_an_image_that_was_not_loaded_before_its_file_was_closed_is_refused(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.fromarray(colours()).save(path)
    with Image.open(path) as image:
        pass
    with pytest.raises(ValueError, match="does not decode"):
        decode_image(image)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_paths_are_closed_again(tmp_path: Path):
    path = tmp_path / "image.png"
    Image.fromarray(colours()).save(path)
    before = len(os.listdir("/proc/self/fd"))
    images = [decode_image(path) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before and len(images) == 5


# ---- Modes ----


def test_greyscale_repeats_its_channel():
    grey = colours()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for value in (Image.fromarray(grey), encode(Image.fromarray(grey)), grey, grey[..., None], grey[None]):
        np.testing.assert_array_equal(decoded(value), expected)


def test_bilevel_is_black_and_white():
    mask = colours()[..., 0] > 127
    expected = np.repeat(np.where(mask, 255, 0)[..., None], 3, axis=2)
    for value in (Image.fromarray(mask), encode(Image.fromarray(mask)), mask, torch.from_numpy(mask)):
        np.testing.assert_array_equal(decoded(value), expected)


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A palette image of 7 colours, its indices and its palette `(7, 3)`."""
    rng = np.random.default_rng(1)
    indices, palette = rng.integers(0, 7, (HEIGHT, WIDTH), dtype=np.uint8), rng.integers(0, 256, (7, 3))
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image, indices, palette


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette(format: str):
    image, indices, palette = palette_image()
    for value in (image, encode(image, format)):
        np.testing.assert_array_equal(decoded(value), palette[indices])


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour_lies_over_white(format: str):
    image, indices, palette = palette_image()
    palette = palette.copy()
    palette[3] = 255
    np.testing.assert_array_equal(decoded(encode(image, format, transparency=3)), palette[indices])


def test_palette_with_an_alpha_for_each_colour_lies_over_white():
    image, indices, palette = palette_image()
    alpha = np.array([0, 40, 80, 120, 160, 200, 255], dtype=np.uint8)
    data = encode(image, transparency=alpha.tobytes())
    np.testing.assert_allclose(decoded(data), over_white(palette[indices], alpha[indices]), atol=1)


def test_palette_of_rgba_colours_lies_over_white():
    rgba = colours(channels=4, height=1, width=4).repeat(3, axis=0)
    image = Image.fromarray(rgba).quantize(method=Image.Quantize.FASTOCTREE)
    expected = image.convert("RGBA")
    flat = over_white(np.asarray(expected)[..., :3], np.asarray(expected)[..., 3])
    np.testing.assert_allclose(decoded(image), flat, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_key_lies_over_white(mode: str):
    pixels = colours()[..., 0] if mode == "L" else colours()
    key = int(pixels[0, 0]) if mode == "L" else tuple(pixels[0, 0].tolist())
    expected = np.repeat(pixels[..., None], 3, axis=2) if mode == "L" else pixels.copy()
    expected[(pixels == pixels[0, 0]) if mode == "L" else (pixels == pixels[0, 0]).all(axis=2)] = 255
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(pixels), transparency=key)), expected)


def test_rgba_lies_over_white():
    pixels = colours(channels=4)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    expected = over_white(pixels[..., :3], pixels[..., 3])
    for value in (Image.fromarray(pixels), encode(Image.fromarray(pixels)), pixels, pixels / 255):
        result = decoded(value)
        np.testing.assert_allclose(result, expected, atol=1)
        assert result[0, 0].tolist() == [255, 255, 255]
        assert result[0, 1].tolist() == pixels[0, 1, :3].tolist()


def test_grey_with_alpha_lies_over_white():
    pixels = colours(channels=2)
    image = Image.merge("LA", [Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 1])])
    expected = over_white(np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1])
    for value in (image, encode(image)):
        np.testing.assert_allclose(decoded(value), expected, atol=1)


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_other_modes_with_alpha_lie_over_white(mode: str):
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:, :3] = 0
    grey = colours()[..., 0]
    plain = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    image = plain.convert({"RGBa": "RGBA", "La": "LA", "PA": "PA"}[mode]).convert(mode)
    if mode == "PA":
        image.putalpha(Image.fromarray(alpha))  # Pillow's conversion from LA drops it
    expected = over_white(np.repeat(grey[..., None], 3, axis=2), alpha)
    np.testing.assert_array_equal(decoded(image), expected)


def test_cmyk():
    cmyk = colours(channels=4)
    image = Image.frombytes("CMYK", (WIDTH, HEIGHT), cmyk.tobytes())
    ink = cmyk.astype(np.float64) / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    np.testing.assert_allclose(decoded(image), expected, atol=1)
    np.testing.assert_allclose(decoded(encode(image, "TIFF")), expected, atol=1)
    # JPEG files of CMYK hold inverted values; Pillow knows.
    flat = Image.new("CMYK", (16, 16), (200, 30, 60, 10))
    np.testing.assert_allclose(decoded(encode(flat, "JPEG", quality=100)), decoded(flat), atol=3)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX"])
def test_other_colour_spaces(mode: str):
    image = Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50))
    np.testing.assert_allclose(decoded(image.convert(mode)), np.asarray(image), atol=3)


def test_lab():
    image = Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50))
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    try:
        result = decoded(converted)
    except ValueError as error:
        assert "LAB" in str(error)  # Pillow converts it with a profile only; never to wrong colours
    else:
        np.testing.assert_allclose(result, np.asarray(image), atol=8)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format: str):
    deep = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    expected = np.repeat(np.rint(deep / 257)[..., None], 3, axis=2)
    for value in (image, encode(image, format), deep, torch.from_numpy(deep)):
        np.testing.assert_array_equal(decoded(value), expected)


def test_16_bit_grey_is_scaled_when_it_is_dark_too():
    dark = np.full((HEIGHT, WIDTH), 200, dtype=np.uint16)
    for value in (dark, encode(Image.fromarray(dark)), dark.astype(">u2")):
        assert decoded(value).max() == 1


def test_big_endian_16_bit_grey():
    deep = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 1000).astype(np.uint16)
    header = struct.pack(">2sHI", b"MM", 42, 8)
    pixels = deep.astype(">u2").tobytes()
    tags = [
        (256, 3, WIDTH << 16),
        (257, 3, HEIGHT << 16),
        (258, 3, 16 << 16),
        (259, 3, 1 << 16),
        (262, 3, 1 << 16),
        (273, 4, 8 + 2 + 12 * 8 + 4),
        (278, 3, HEIGHT << 16),
        (279, 4, len(pixels)),
    ]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", t, k, 1, v) for t, k, v in tags)
    data = header + directory + struct.pack(">I", 0) + pixels
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    expected = np.repeat(np.rint(deep / 257)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decoded(data), expected)
    np.testing.assert_array_equal(decoded(deep.astype(">u2")), expected)


def test_32_bit_grey_is_scaled_where_it_exceeds_8_bits():
    bright = np.array([[0, 300], [30000, 65535]], dtype=np.int32)
    dim = np.array([[0, 3], [128, 255]], dtype=np.int32)
    for value in (Image.fromarray(bright), bright, bright.astype(np.int64)):
        np.testing.assert_array_equal(decoded(value)[..., 0], np.rint(bright / 257))
    for value in (Image.fromarray(dim), dim, dim.astype(np.int64)):
        np.testing.assert_array_equal(decoded(value)[..., 0], dim)


def test_float_grey_of_either_range():
    grey = colours()[..., 0]
    grey[0, 0] = 255
    for scale in (1, 255):
        values = (grey / 255 * scale).astype(np.float32)
        for value in (Image.fromarray(values), encode(Image.fromarray(values), "TIFF"), values, values.tolist()):
            np.testing.assert_array_equal(decoded(value)[..., 0], grey)


def test_the_overshoot_of_resampling_is_clipped():
    values = np.array([[-5e-4, 0.5], [1 + 5e-4, 1.0]])
    assert decoded(values)[..., 0].tolist() == [[0, 128], [255, 255]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_precision(dtype: torch.dtype):
    assert decoded(torch.tensor([[0.0, 0.5], [1.0, 0.25]], dtype=dtype))[..., 0].tolist() == [[0, 128], [255, 64]]


def test_which_axis_holds_the_channels_of_an_ambiguous_array():
    array = colours(height=3, width=3)
    wide = colours(height=3, width=4, channels=3)
    np.testing.assert_array_equal(decoded(array), array)
    np.testing.assert_array_equal(decoded(array.tolist()), array)
    np.testing.assert_array_equal(decoded(torch.from_numpy(array)), array.transpose(1, 2, 0))
    np.testing.assert_array_equal(decoded(wide), wide)
    # A tensor of 3 x 4 pixels, channels first as a "torch" formatted dataset gives it.
    np.testing.assert_array_equal(decoded(torch.from_numpy(wide.transpose(2, 0, 1).copy())), wide)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), channels=st.sampled_from([1, 3]), seed=st.integers(0, 1000))
def test_arrays_of_any_small_size(height: int, width: int, channels: int, seed: int):
    pixels = colours(seed, height, width, channels)
    expected = np.broadcast_to(pixels, (height, width, 3))
    np.testing.assert_array_equal(decoded(pixels), expected)
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    np.testing.assert_array_equal(decoded(tensor), expected)


def test_animated_files_give_their_first_frame():
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **_lossless(format))
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
        np.testing.assert_array_equal(decoded(data), np.asarray(frames[0]))


def _lossless(format: str) -> dict:
    return {"lossless": True} if format == "WEBP" else {}


# ---- Orientation ----


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What the EXIF standard says of where row 0 and column 0 of the stored pixels belong."""
    return {
        1: pixels,
        2: pixels[:, ::-1],  # row 0 top, column 0 right
        3: pixels[::-1, ::-1],  # bottom, right
        4: pixels[::-1],  # bottom, left
        5: pixels.transpose(1, 0, 2),  # left, top
        6: pixels.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: pixels.transpose(1, 0, 2)[::-1],  # left, bottom
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int):
    pixels = colours()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(pixels)
    for format in ("PNG", "WEBP", "TIFF"):
        data = encode(image, format, exif=exif, **_lossless(format))
        np.testing.assert_array_equal(decoded(data), upright(pixels, orientation))
        np.testing.assert_array_equal(decoded(Image.open(io.BytesIO(data))), upright(pixels, orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_exif_orientation_of_every_mode(mode: str, orientation: int):
    if mode == "I;16":
        image = Image.fromarray(colours()[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(colours(channels=4)).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    format = "TIFF" if mode == "CMYK" else "PNG"
    plain, tagged = encode(image, format), encode(image, format, exif=exif)
    np.testing.assert_array_equal(decoded(tagged), upright(decoded(plain), orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_orientation_agrees_with_pillow(orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(colours()), "JPEG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = colours()
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(pixels), exif=exif)), pixels)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_data_that_cannot_be_read_count_as_none():
    pixels = colours()
    image = Image.fromarray(pixels)
    for exif in (b"Exif\0\0 not a directory", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        np.testing.assert_array_equal(decoded(encode(image, exif=exif)), pixels)


# ---- What does not decode ----


def truncated_jpeg() -> bytes:
    data = encode(Image.fromarray(colours(height=64, width=64)), "JPEG")
    return data[: len(data) // 2]


def png_with_a_broken_chunk() -> bytes:
    data = bytearray(encode(Image.fromarray(colours())))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "None"),
        (b"", "no bytes"),
        ({"bytes": b"", "path": None}, "no bytes"),
        (b"<html>not found</html>", "22 bytes are in no format"),
        ({"bytes": b"<html>", "path": "a/photo.jpg"}, "'a/photo.jpg' .* no format"),
        ({"bytes": None, "path": None}, "without 'bytes' and 'path'"),
        ({"url": "x"}, "without 'bytes' and 'path'"),
        (truncated_jpeg(), "truncated"),
        (png_with_a_broken_chunk(), "broken|truncated|checksum"),
        ("no/such/file.jpg", "no/such/file.jpg"),
        ("", "FileNotFoundError|IsADirectoryError"),
        (os.curdir, "IsADirectoryError|PermissionError"),
        (3, "int; accepted"),
        (2.5, "float; accepted"),
        (object(), "object; accepted"),
        ({1, 2}, "set; accepted"),
        ([], "shape"),
        ([[1, 2], [3]], "inhomogeneous"),
        (["a", "b"], "shape"),
        ([["a", "b"]], "not <U1"),
        (np.array([[None, 1]], dtype=object), "not object"),
        (np.zeros((4, 4), dtype=complex), "not complex"),
        (np.zeros(4), "shape"),
        (np.zeros((5, 5, 2)), r"not \(5, 5, 2\)"),
        (np.zeros((5, 4, 4, 3)), "shape"),
        (np.zeros((0, 4, 3)), "shape"),
        (np.zeros((4, 0)), "shape"),
        (torch.zeros(2, 5, 5), "shape"),
        (np.full((4, 4), np.nan), "nan"),
        (np.array([[0.5, np.nan]]), "nan"),
        (np.full((4, 4), np.inf), "inf"),
        (np.array([[-0.5, 0.5]]), "-0.5 to 0.5"),
        (np.array([[0.0, 1.3]]), "0 to 1.3"),
        (np.array([[0.0, 300.0]]), "0 to 300"),
        (np.array([[-1, 5]]), "-1 to 5"),
        (np.array([[0, 70000]]), "0 to 70000"),
        (Image.new("RGB", (0, 5)), "0 x 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_does_not_decode_says_why(value, reason: str):
    with pytest.raises(ValueError, match=reason):
        decode_image(value)


def test_messages_are_the_same_in_every_run():
    with pytest.raises(ValueError) as caught:
        decode_image(b"no image")
    assert "0x" not in str(caught.value)


def test_a_decompression_bomb_is_a_value_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="DecompressionBomb"):
        decode_image(encode(Image.fromarray(colours())))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tampered_files_decode_or_raise_value_errors(data: st.DataObject):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = bytearray(
        encode(Image.fromarray(colours()), format, **({} if format in ("GIF", "BMP") else {"exif": exif}))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(file[: data.draw(st.integers(0, len(file)))]))
    except ValueError:
        return
    assert image.mode == "RGB" and 0 not in image.size


# ---- The image processor ----


def test_preprocessing_keeps_bytes_and_crops_as_the_image_processor_does(processor):
    images = [Image.fromarray(colours(i, 20 + i, 40 - i)) for i in range(4)]
    pixels = ImagePreprocessor(processor.image_processor)(images)
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, 3, 16, 16)
    whole = processor.image_processor(images, do_normalize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels / 255, whole, atol=1e-6, rtol=0)
    square = Image.fromarray(colours(height=16, width=16))
    np.testing.assert_array_equal(
        ImagePreprocessor(processor.image_processor)([square])[0].permute(1, 2, 0), np.asarray(square)
    )


@pytest.mark.parametrize(
    ("image_processor", "shape"),
    [
        (CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), (16, 16)),
        (CLIPImageProcessor(size={"shortest_edge": 12}, do_center_crop=False), (12, 12)),
        (SiglipImageProcessor(size={"height": 8, "width": 8}), (8, 8)),
        (SiglipImageProcessor(size={"height": 16, "width": 8}), (16, 8)),
    ],
)
def test_the_size_of_the_models_images(image_processor, shape: tuple[int, int]):
    preprocess = ImagePreprocessor(image_processor)
    assert preprocess.image_shape == shape
    if shape[0] == shape[1]:
        assert preprocess.image_size == shape[0]
    else:
        with pytest.raises(ValueError, match="image_processor makes images of 16 x 8 pixels"):
            preprocess.image_size  # noqa: B018


def test_an_image_processor_that_returns_floats_is_refused():
    class Floats:
        def __call__(self, images, **kwargs):
            return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    with pytest.raises(TypeError, match=r"Floats returns torch.float32"):
        ImagePreprocessor(Floats())([Image.new("RGB", (4, 4))])


SIXTEEN = {"height": 16, "width": 16}


class Swapping(CLIPImageProcessor):
    """Makes no other size, but blue of red."""

    def __call__(self, images, **kwargs):
        batch = super().__call__(images, **kwargs)
        batch["pixel_values"] = [np.asarray(image)[::-1] for image in batch["pixel_values"]]
        return BatchFeature(batch, tensor_type=kwargs["return_tensors"])


@pytest.mark.parametrize("sizes", [[(16, 16)] * 2, [(16, 40), (41, 17)], [(5, 7), (7, 300)], [(16, 16), (33, 16)]])
@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIXTEEN),
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIXTEEN, resample=Image.Resampling.BILINEAR),
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 12, "width": 12}),
        CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=SIXTEEN),
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIXTEEN, do_resize=False),
        CLIPImageProcessor(size=SIXTEEN, crop_size=SIXTEEN, do_center_crop=False),
        SiglipImageProcessor(size=SIXTEEN),
        SiglipImageProcessor(size={"height": 16, "width": 8}),
        Swapping(size={"shortest_edge": 16}, crop_size=SIXTEEN),
    ],
)
def test_images_are_what_the_image_processor_makes_of_them(image_processor, sizes: list[tuple[int, int]]):
    images = [Image.fromarray(colours(i, height, width)) for i, (width, height) in enumerate(sizes)]
    expected = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels = ImagePreprocessor(image_processor)(images)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert torch.equal(pixels, expected["pixel_values"])
