"""JPEGs decoded at a reduced size stay large enough, upright and nearly alike; what is small stays as it is."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, CLIPProcessor, SiglipImageProcessor

from hf_robust_clip.data.collator import CLIPDataCollator
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.data.rows import IndexedDataset
from hf_robust_clip.data.streams import Stream, StreamCollator
from hf_robust_clip.imaging import decode_image

COLUMNS = ("image", "caption")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes: what a photo is at a scale that is finer than its details."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def pairs_of(*sizes: tuple[int, int]) -> datasets.Dataset:
    images = [{"bytes": encode(photo(*size, seed)), "path": None} for seed, size in enumerate(sizes)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "caption": ["a photo"] * len(sizes)}, features=features)


def difference(one: Image.Image, two: Image.Image) -> float:
    """The mean between the pixels of two images of any size, both made small."""
    pixels = [np.asarray(image.resize((20, 20), Image.Resampling.BOX), dtype=np.int16) for image in (one, two)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (401, 333), (1000, 160)])
@pytest.mark.parametrize("least", [20, 25, 40, 41, 99, 100, 101, 500])
def test_the_shorter_side_is_the_smallest_that_is_at_least_the_one_asked_for(size: tuple[int, int], least: int):
    found = decode_image(encode(photo(*size)), least).size
    scales = [scale for scale in (8, 4, 2) if min(size) >= scale * least] or [1]
    assert found == (-(-size[0] // scales[0]), -(-size[1] // scales[0]))
    assert min(found) >= min(least, *size)


def test_an_image_below_twice_the_side_is_the_same_to_the_bit():
    data = encode(photo(199, 300))
    np.testing.assert_array_equal(decode_image(data, 100), decode_image(data))


def test_other_formats_and_opened_images_keep_their_size():
    image = photo(300, 200)
    for value in (encode(image, "PNG"), encode(image, "PPM"), image, Image.open(io.BytesIO(encode(image)))):
        assert decode_image(value, 20).size == (300, 200)


def test_files_are_drafted_as_their_bytes_are(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(photo(300, 200)))
    drafted = decode_image(path.read_bytes(), 50)
    for value in (path, str(path), {"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": None}):
        np.testing.assert_array_equal(decode_image(value, 50), drafted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_to_what_was_drafted(orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = photo(320, 200)
    turned = decode_image(encode(image, exif=exif.tobytes()), 50)
    upright = decode_image(encode(image), 50)
    assert upright.size == (80, 50)
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(turned, ImageOps.exif_transpose(upright))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_keeps_its_colours(mode: str, progressive: bool):
    data = encode(photo(320, 240).convert(mode), quality=95, progressive=progressive)
    whole, drafted = decode_image(data), decode_image(data, 60)
    assert drafted.size == (80, 60) and drafted.mode == "RGB"
    assert difference(whole, drafted) < 2


def test_a_broken_jpeg_is_refused_all_the_same():
    with pytest.raises(ValueError, match="does not decode"):
        decode_image(encode(photo(320, 240))[:700], 20)


def test_the_side_that_an_image_processor_resizes_to():
    for image_processor, side in (
        (CLIPImageProcessor(), 224),
        (CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=224), 256),
        (SiglipImageProcessor(size={"height": 20, "width": 30}), 30),
        (CLIPImageProcessor(do_resize=False), None),
    ):
        assert ImagePreprocessor(image_processor).resized_side == side


def test_a_batch_changes_only_where_images_are_large(processor):
    pairs = pairs_of((63, 90), (64, 90), (500, 400), (40, 30))  # the model takes 16 x 16
    rows = IndexedDataset(pairs, *COLUMNS).__getitems__(range(4))
    whole = CLIPDataCollator(processor)(rows)["pixel_values"].int()
    drafted = CLIPDataCollator(processor, draft_decoding=True)(rows)["pixel_values"].int()
    changed = (whole - drafted).abs().float().mean(dim=(1, 2, 3))
    assert changed[[0, 3]].tolist() == [0, 0]
    # Another image would differ by tens of levels. What drafting does to photos is measured in the documentation.
    assert 0 < changed[1] < 8 and 0 < changed[2] < 8


def test_rows_are_drafted_alike_wherever_they_are_decoded(processor):
    pairs = pairs_of(*[(150, 100), (90, 200)] * 2)
    collator = CLIPDataCollator(processor, draft_decoding=True)
    side = collator.least_side
    expected = collator(IndexedDataset(pairs, *COLUMNS).__getitems__(range(4)))["pixel_values"]
    stream = Stream(
        pairs.to_iterable_dataset(), *COLUMNS, batch_size=4, least_rows=1, on_bad_row="skip", least_side=side
    )
    for loader in (
        DataLoader(IndexedDataset(pairs, *COLUMNS, "skip", side), batch_size=4, collate_fn=collator),
        DataLoader(stream, batch_size=None, collate_fn=StreamCollator(collator)),
    ):
        assert torch.equal(next(iter(loader))["pixel_values"], expected)


def test_an_image_processor_that_does_not_resize_is_refused(processor):
    cropping = CLIPProcessor(CLIPImageProcessor(do_resize=False, crop_size=16), processor.tokenizer)
    with pytest.raises(ValueError, match=r"draft_decoding=True needs an image processor .* has .*'do_resize': False"):
        CLIPDataCollator(cropping, draft_decoding=True)
