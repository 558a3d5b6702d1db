"""Bad rows are named, or skipped and listed; odd ones train."""

from __future__ import annotations

import json
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.bad_data import CASES, Case, claiming, encoded, picture
from support.training import make_trainer
from transformers import CLIPImageProcessor

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer
from hf_robust_clip.data.collator import CLIPDataCollator
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.data.rows import BadRowError, IndexedDataset
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.imaging import decode_image
from hf_robust_clip.record import RunRecord, Skipped
from hf_robust_clip.telling.tables import summary
from hf_robust_clip.wording import listed

COLUMNS = ("image", "caption")
GOOD = {"image": picture(), "caption": "the number two"}
BAD = [number for number, case in enumerate(CASES) if case.refused]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_row_trains_or_is_named_or_skipped(case: Case, processor) -> None:
    rows = [GOOD, case.row, GOOD]
    collator = CLIPDataCollator(processor)
    if case.refused is None:
        batch = collator(IndexedDataset(rows, *COLUMNS).__getitems__([0, 1, 2]))
        assert batch["pixel_values"].shape == (3, 3, 16, 16)
        # A start and an end, and no end before it.
        ids, kept = batch["input_ids"][1], int(batch["attention_mask"][1].sum())
        end = processor.tokenizer.eos_token_id
        assert 2 <= kept <= 16 and ids[:kept].tolist().count(end) == 1 and ids[kept - 1] == end
        return
    with pytest.raises(BadRowError, match=f"row 1, (column )?{case.refused}"):
        collator(IndexedDataset(rows, *COLUMNS).__getitems__([0, 1]))
    batch = collator(IndexedDataset(rows, *COLUMNS, on_bad_row="skip").__getitems__([0, 1]))
    assert batch["row_index"].tolist() == [0, 2] and batch["bad_rows"].tolist() == [1]


@pytest.mark.training
def test_training_over_all_of_them_lists_those_that_it_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        CleanCLIPTrainer,
        tmp_path,
        train_dataset=[*(case.row for case in CASES), *[GOOD] * (-len(CASES) % 8)],
        on_bad_row="skip",
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    rows = listed(BAD)
    assert trainer.skipped_rows == BAD
    assert f"Unusable rows of train_dataset were skipped, {len(BAD)}: {rows}" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    trainer.save_model()
    trainer.create_model_card()
    record = RunRecord.load(tmp_path)
    assert record.skipped == Skipped(count=len(BAD), rows=BAD, streamed=False)
    assert RunRecord.load(tmp_path / "checkpoint-4").skipped == record.skipped
    assert f"- Unusable rows left out, {len(BAD)}: {rows}" in (tmp_path / "README.md").read_text()
    assert ("Unusable rows left out", f"{len(BAD)}: {rows}") in summary(record)


@pytest.mark.training
def test_record_of_a_stream_says_what_its_numbers_are(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([GOOD, *(case.row for case in CASES)])

    trainer = make_trainer(CLIPTrainer, tmp_path, train_dataset=Stream(), on_bad_row="skip", max_steps=2)
    trainer.train()
    expected = [number + 1 for number in BAD]
    skipped = json.loads(trainer.record().to_json())["skipped"]
    assert skipped["streamed"] and set(skipped["rows"]) <= set(expected) and skipped["count"] > 0


@pytest.mark.training
def test_repeated_rows_train(tmp_path: Path, pairs) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, train_dataset=pairs.select([3] * 8 + [5, 5]), max_steps=1)
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


# ---- Images that would take more memory than they are worth ----


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_claimed_pixels_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((60_000, 60_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(ValueError, match="DecompressionBombError"):
            decode_image(claiming(*size))
    # Behind the header of an icon, which Pillow decodes before one sees what it claims.
    content = encoded(Image.new("L", (9_500, 9_500)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for icon in (
        struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content,
        b"icns" + struct.pack(">I4sI", 16 + len(content), b"ic07", 8 + len(content)) + content,
    ):
        with pytest.raises(ValueError, match="in a format that is not read"):
            decode_image(icon)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_whoever_lifts_the_guard_has_large_images_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(20, 20), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(ValueError, match="claims 20 x 20 pixels, more than the 399"):
        decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(data).size == (20, 20)


@pytest.mark.parametrize("upright", [False, True])
def test_of_a_long_strip_the_middle_is_resized_and_no_more(upright: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noting(image: Image.Image, *args: Any, **options: Any) -> Image.Image:
        sizes.append(image.size)
        return resize(image, *args, **options)

    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    strip, ordinary = picture(20_000, 4), picture(4 * 64, 4)
    if upright:
        strip, ordinary = (image.transpose(Image.Transpose.TRANSPOSE) for image in (strip, ordinary))
    preprocess = ImagePreprocessor(image_processor)
    whole = image_processor([strip], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(Image.Image, "resize", noting)
    difference = (preprocess([strip]).int() - whole.int()).abs()
    assert sizes == [(4, 256) if upright else (256, 4)]
    assert difference.max() <= 1
    sizes.clear()
    preprocess([ordinary])
    assert sizes == [ordinary.size]


# ---- Special tokens as text ----


def test_a_caption_does_not_end_where_it_says_so(processor, tiny_model) -> None:
    model, tokenizer = tiny_model().eval(), processor.tokenizer
    captions = ["six<|endoftext|> cats", "six<|endoftext|> dogs", "six"]
    with torch.no_grad():
        cut = model.get_text_features(**tokenizer(captions, padding=True, return_tensors="pt")).pooler_output
    # What the tokenizer does by itself: a reader of the captions sees cats and dogs, the model sees neither.
    torch.testing.assert_close(cut[0], cut[2])
    torch.testing.assert_close(cut[1], cut[2])
    embeds = Embedder(model, processor).embed_texts(captions)
    assert not torch.allclose(embeds[0], embeds[2]) and not torch.allclose(embeds[1], embeds[2])


def test_training_and_evaluation_agree_on_it(processor, tiny_model, monkeypatch) -> None:
    caption = "1<|endoftext|>2"
    batch = CLIPDataCollator(processor)([{**GOOD, "caption": caption}])
    seen = []
    model = tiny_model().eval()
    features = model.get_text_features
    monkeypatch.setattr(model, "get_text_features", lambda **tokens: (seen.append(tokens), features(**tokens))[1])
    Embedder(model, processor, check=False).embed_texts([caption])
    assert torch.equal(seen[0]["input_ids"], batch["input_ids"])
    # With the tokens themselves around it, and none within.
    ids = batch["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_token_id and ids.index(processor.tokenizer.eos_token_id) == len(ids) - 1
