"""One pass over a dataset serves every evaluator: each image decoded once, in order, whatever the threads."""

import io
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.training import make_trainer

from hf_robust_clip import CLIPTrainer
from hf_robust_clip.attacks.triggers import BlendedTrigger, PatchTrigger
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.evaluation import pixels
from hf_robust_clip.evaluation.attack_success import AttackSuccessEvaluator
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.pixels import ImageRequest, apply_trigger, pixel_batches
from hf_robust_clip.evaluation.zero_shot import ZeroShotEvaluator


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were decoded so far, as the length of a list."""
    calls: list[int] = []
    decode_image = pixels.decode_image

    def counting(value) -> Image.Image:
        calls.append(1)
        return decode_image(value)

    monkeypatch.setattr(pixels, "decode_image", counting)
    return calls


def evaluators(dataset) -> list:
    return [
        ZeroShotEvaluator(dataset, CLASS_NAMES),
        AttackSuccessEvaluator(dataset, PatchTrigger(size=3), "eight", CLASS_NAMES),
        AttackSuccessEvaluator(dataset, BlendedTrigger(), "eight", CLASS_NAMES, prefix="blended_"),
    ]


def test_evaluators_together_decode_each_image_once(tiny_model, processor, pairs, decoded: list[int]):
    model, together = tiny_model(1), evaluators(pairs)
    requests = [request for evaluator in together for request in evaluator.image_requests()]
    embedder = Embedder(model, processor, batch_size=7, requests=requests)
    shared = [evaluator(model, processor, embedder) for evaluator in together]
    assert len(decoded) == 64
    alone = []
    for evaluator in together:
        alone.append(evaluator(model, processor, Embedder(model, processor, batch_size=7)))
    assert len(decoded) == 64 + 64 * (1 + 2 + 2)
    assert shared == alone


def test_a_trainer_decodes_each_image_once_for_all_its_evaluators(pairs, decoded: list[int], tmp_path: Path):
    def plain(model, processor, embedder) -> dict[str, float]:  # names no requests of its own
        return {"mean": embedder.embed_images(pairs).mean().item()}

    trainer = make_trainer(CLIPTrainer, tmp_path, evaluators=[plain, *evaluators(pairs)])
    figures = trainer.run_evaluators()
    assert len(decoded) == 64
    assert {"mean", "clean_accuracy", "attack_success_rate", "blended_attack_success_rate"} <= figures.keys()


def test_an_evaluator_called_alone_decodes_each_image_once(tiny_model, processor, pairs, decoded: list[int]):
    evaluators(pairs)[1](tiny_model(), processor)
    assert len(decoded) == 64


def test_only_what_was_asked_for_or_requested_of_a_dataset_is_embedded(tiny_model, processor, pairs, decoded):
    first, second, patch = pairs.select(range(5)), pairs.select(range(5, 9)), PatchTrigger(size=3)
    requests = [ImageRequest(first, "image", patch), (second, "image", None), (second, "image", patch)]
    embedder = Embedder(tiny_model(), processor, requests=requests)
    clean = embedder.embed_images(first)
    assert len(decoded) == 5
    triggered = embedder.embed_images(first, trigger=PatchTrigger(size=3))
    assert len(decoded) == 5 and not torch.equal(clean, triggered)
    embedder.embed_images(first, trigger=PatchTrigger(size=4))
    assert len(decoded) == 10  # not requested
    embedder.embed_images(second)
    embedder.embed_images(second, trigger=patch)
    assert len(decoded) == 14


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_come_in_order_whatever_the_threads(processor, pairs, monkeypatch, threads: int, batch_size: int):
    monkeypatch.setattr(pixels, "_MOST_THREADS", threads)
    monkeypatch.setattr(pixels.os, "cpu_count", lambda: threads)
    decode_image, delays = pixels.decode_image, iter(np.random.default_rng(0).random(64) / 1000)

    def uneven(value) -> Image.Image:
        time.sleep(next(delays))
        return decode_image(value)

    monkeypatch.setattr(pixels, "decode_image", uneven)
    preprocess, patch = ImagePreprocessor(processor.image_processor), PatchTrigger(size=3)
    dataset = pairs.select(range(22))
    batches = [range(start, min(start + batch_size, 22)) for start in range(0, 22, batch_size)]
    found = list(pixel_batches(dataset, "image", preprocess, [None, patch], batches))
    assert [len(variant) for batch in found for variant in batch] == [len(b) for b in batches for _ in range(2)]
    clean = preprocess([image.convert("RGB") for image in dataset["image"]])
    assert torch.equal(torch.cat([batch[0] for batch in found]), clean)
    assert torch.equal(torch.cat([batch[1] for batch in found]), apply_trigger(patch, clean))


def test_rows_are_read_by_the_caller_and_decoded_elsewhere(tiny_model, processor, pairs, monkeypatch):
    readers, decoders = set(), set()

    class Rows:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, row: int) -> dict:
            readers.add(threading.current_thread())
            return pairs[row]

    decode_image = pixels.decode_image
    monkeypatch.setattr(
        pixels, "decode_image", lambda value: decoders.add(threading.current_thread()) or decode_image(value)
    )
    Embedder(tiny_model(), processor, batch_size=3).embed_images(Rows())
    assert readers == {threading.current_thread()} and threading.current_thread() not in decoders
    assert not decoders & set(threading.enumerate())


def test_rows_may_share_one_image_that_is_not_loaded_yet(tiny_model, processor, pairs):
    buffer = io.BytesIO()
    pairs[0]["image"].save(buffer, format="PNG")
    shared = Image.open(io.BytesIO(buffer.getvalue()))
    embeds = Embedder(tiny_model(), processor, batch_size=20).embed_images([{"image": shared}] * 40)
    expected = Embedder(tiny_model(), processor, batch_size=20).embed_images([{"image": buffer.getvalue()}] * 40)
    assert torch.equal(embeds, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_error_names_the_first_bad_row(tiny_model, processor, pairs, batch_size: int):
    rows = [{"image": b"broken" if i in (5, 9) else pairs[i]["image"]} for i in range(12)]
    with pytest.raises(ValueError, match="row 5 of the evaluation images, column 'image'"):
        Embedder(tiny_model(), processor, batch_size=batch_size).embed_images(rows)


def test_a_transform_of_the_datasets_own_sees_its_rows_one_by_one(tiny_model, processor, pairs):
    seen = []

    def transform(batch: dict) -> dict:
        seen.append(len(batch["image"]))
        return batch

    dataset = pairs.select(range(5)).with_transform(transform)
    expected = Embedder(tiny_model(), processor).embed_images(pairs.select(range(5)))
    assert torch.equal(Embedder(tiny_model(), processor).embed_images(dataset), expected)
    assert seen == [1] * 5


def test_an_evaluator_that_requests_images_of_another_column(tiny_model, processor, pairs, decoded):
    photos = datasets.Dataset.from_dict(
        {"photo": pairs["image"][:6], "label": pairs["label"][:6]},
        features=datasets.Features({"photo": datasets.Image(), "label": pairs.features["label"]}),
    )
    evaluator = AttackSuccessEvaluator(photos, PatchTrigger(size=3), "eight", CLASS_NAMES, image_column="photo")
    renamed = AttackSuccessEvaluator(pairs.select(range(6)), PatchTrigger(size=3), "eight", CLASS_NAMES)
    assert evaluator(tiny_model(), processor) == renamed(tiny_model(), processor)
    assert len(decoded) == 12
