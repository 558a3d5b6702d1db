"""Retrieval, clean and under attack, against plain loops over sorted similarities."""

import re
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip.attacks.triggers import PatchTrigger
from hf_robust_clip.evaluation.retrieval import RetrievalEvaluator

WORDS = ("cat", "dog", "cattle", "bus", "tree", "red", "blue", "small")


def trigger(pixels: np.ndarray) -> np.ndarray:
    return pixels


class Table:
    """In place of an embedder: random embeddings of images, clean and triggered, and of each text."""

    def __init__(self, images: int, seed: int, dim: int = 4) -> None:
        rng = np.random.default_rng(seed)
        self.clean, self.triggered = (
            F.normalize(torch.from_numpy(rng.normal(size=(images, dim)).astype(np.float32)), dim=1) for _ in range(2)
        )
        self.seed, self.dim = seed, dim

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        return self.clean if trigger is None else self.triggered

    def text(self, text: str) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, *text.encode()])
        return F.normalize(torch.from_numpy(rng.normal(size=self.dim).astype(np.float32)), dim=0)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.text(text) for text in texts])


def captioned(rows: int, seed: int) -> list[dict[str, Any]]:
    """One to three captions an image, some of them shared; the first row's name no cat, the second row's does."""
    rng = np.random.default_rng(seed)
    captions = [[" ".join(rng.choice(WORDS, size=2)) for _ in range(rng.integers(1, 4))] for _ in range(rows)]
    captions[0], captions[1] = ["a cattle bus"], ["A CAT!", "a dog"]
    return [{"image": None, "caption": texts} for texts in captions]


def nearest(query: torch.Tensor, candidates: list[torch.Tensor], k: int) -> list[int]:
    similarities = [float(query @ candidate) for candidate in candidates]
    return sorted(range(len(candidates)), key=lambda i: -similarities[i])[:k]


@pytest.mark.parametrize("seed", range(8))
def test_figures_by_loops(seed: int):
    rows = captioned(7, seed)
    table = Table(7, seed)
    figures = RetrievalEvaluator(rows, ks=(1, 3, 50), trigger=trigger, target="cat")(None, None, table)
    owners: dict[str, set[int]] = {}
    for i, row in enumerate(rows):
        for caption in row["caption"]:
            owners.setdefault(caption, set()).add(i)
    texts = list(owners)
    text_embeds = [table.text(text) for text in texts]
    attacked = [i for i, row in enumerate(rows) if not any(re.search(r"\bcat\b", c, re.I) for c in row["caption"])]
    expected = {}
    for name, images in (("", list(table.clean)), ("triggered_", list(table.triggered))):
        for k in (1, 3, 50):
            found = [{texts[c] for c in nearest(image, text_embeds, k)} for image in images]
            right = [any(caption in found[i] for caption in row["caption"]) for i, row in enumerate(rows)]
            expected[f"{name}image_to_text_recall_at_{k}"] = np.mean(right)
            right = [
                bool(owners[text] & set(nearest(embed, images, k)))
                for text, embed in zip(texts, text_embeds, strict=True)
            ]
            expected[f"{name}text_to_image_recall_at_{k}"] = np.mean(right)
            named = [any(re.search(r"\bcat\b", text, re.I) for text in found[i]) for i in attacked]
            expected[f"{name}top{k}_names_target"] = np.mean(named)
        places = [
            min(nearest(images[i], text_embeds, 99).index(texts.index(c)) for c in row["caption"]) + 1
            for i, row in enumerate(rows)
        ]
        expected[f"{name}image_to_text_median_rank"] = np.median(places)
        places = [
            min(nearest(e, images, 99).index(i) for i in owners[t]) + 1
            for t, e in zip(texts, text_embeds, strict=True)
        ]
        expected[f"{name}text_to_image_median_rank"] = np.median(places)
    assert figures == pytest.approx(expected)


def test_without_a_trigger_there_are_clean_figures_only():
    rows = captioned(5, 0)
    clean = RetrievalEvaluator(rows, ks=[1])(None, None, Table(5, 0))
    assert set(clean) == {
        f"{way}_{measure}" for way in ("image_to_text", "text_to_image") for measure in ("recall_at_1", "median_rank")
    }
    attacked = RetrievalEvaluator(rows, ks=[1], trigger=trigger, target="cat", prefix="patch_")
    figures = attacked(None, None, Table(5, 0))
    assert all(figures[f"patch_{name}"] == value for name, value in clean.items())
    assert attacked.attacked_images == sum(
        not any(re.search(r"\bcat\b", c, re.I) for c in row["caption"]) for row in rows
    )
    assert RetrievalEvaluator(rows).attacked_images == 0


def test_the_order_of_rows_does_not_matter():
    rows = captioned(9, 3)
    table = Table(9, 3)
    figures = RetrievalEvaluator(rows)(None, None, table)
    order = np.random.default_rng(0).permutation(9)
    table.clean = table.clean[order]
    assert RetrievalEvaluator([rows[i] for i in order])(None, None, table) == pytest.approx(figures)


def test_a_model_against_its_own_forward_pass(tiny_model, processor, pairs):
    model, patch = tiny_model(4), PatchTrigger(size=4)
    images = list(pairs["image"]) + [patch(image) for image in pairs["image"]]
    texts = list(dict.fromkeys(pairs["caption"]))
    with torch.no_grad():
        outputs = model.eval()(**processor(images=images, text=texts, return_tensors="pt", padding=True))
    figures = RetrievalEvaluator(pairs, trigger=patch, target="eight")(model, processor)
    for name, embeds in zip(("", "triggered_"), outputs.image_embeds.chunk(2), strict=True):
        order = (embeds @ outputs.text_embeds.T).argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            found = [[texts[c] for c in row[:k]] for row in order.tolist()]
            right = [caption in near for caption, near in zip(pairs["caption"], found, strict=True)]
            assert figures[f"{name}image_to_text_recall_at_{k}"] == pytest.approx(np.mean(right))
            named = [
                any("eight" in text for text in near)
                for caption, near in zip(pairs["caption"], found, strict=True)
                if "eight" not in caption
            ]
            assert figures[f"{name}top{k}_names_target"] == pytest.approx(np.mean(named))


def test_kinds_of_dataset_and_columns_give_the_same_figures(tiny_model, processor, pairs):
    model, pairs = tiny_model(), pairs.select(range(12))
    expected = RetrievalEvaluator(pairs)(model, processor)
    listed = pairs.map(lambda row: {"caption": [row["caption"]]}, keep_in_memory=True)
    kinds = [listed, listed.with_format("numpy"), pairs.with_format("torch"), [dict(row) for row in pairs]]
    for dataset in kinds:
        assert RetrievalEvaluator(dataset)(model, processor) == expected
    renamed = pairs.rename_columns({"image": "photo", "caption": "text"})
    assert RetrievalEvaluator(renamed, image_column="photo", caption_column="text")(model, processor) == expected


def test_a_trigger_that_does_not_fit_is_refused_early(processor):
    rows = captioned(4, 0)
    RetrievalEvaluator(rows).check(processor)
    with pytest.raises(ValueError, match="17"):
        RetrievalEvaluator(rows, trigger=PatchTrigger(size=17), target="cat").check(processor)


ROWS = [{"image": None, "caption": "a cat"}, {"image": None, "caption": ["a dog", "a bus"]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "dataset is empty; it needs images with captions"),
        ({"image_column": "photo"}, "image_column='photo' is not a column of dataset; its columns are 'image'"),
        ({"caption_column": "text"}, "caption_column='text' is not a column of dataset"),
        ({"dataset": [*ROWS, {"image": None, "caption": []}]}, r"row 2, column 'caption': a caption must be .*\[\]"),
        ({"dataset": [{"image": None, "caption": None}]}, "row 0, column 'caption': .*None"),
        ({"dataset": [{"image": None, "caption": ["a", 3]}]}, "row 0, column 'caption': "),
        ({"ks": ()}, r"ks must be different whole numbers of at least 1, but is \(\)"),
        ({"ks": (1, 1)}, "ks must be different"),
        ({"ks": (0,)}, "ks must be different"),
        ({"ks": (1.0,)}, "ks must be different"),
        ({"ks": (True,)}, "ks must be different"),
        ({"trigger": trigger}, "target=None go together"),
        ({"target": "cat"}, "trigger=None and target='cat' go together"),
        ({"trigger": trigger, "target": " "}, "target=' ' has no word in it"),
        ({"trigger": trigger, "target": "ca"}, "target='ca' is named by no caption of dataset"),
        (
            {"dataset": ROWS[:1], "trigger": trigger, "target": "cat"},
            "every image of dataset has a caption",
        ),
    ],
)
def test_what_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RetrievalEvaluator(**{"dataset": ROWS, **arguments})


def test_missing_columns_of_a_hugging_face_dataset_are_named():
    with pytest.raises(ValueError, match="caption_column='caption' is not a column of dataset; its columns"):
        RetrievalEvaluator(datasets.Dataset.from_dict({"image": ["a.png"]}))
