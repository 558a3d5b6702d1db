"""Triggered queries against plain loops over sorted similarities."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip.attacks.triggers import PatchTrigger
from hf_robust_clip.evaluation.text_query import TextQueryEvaluator

WORDS = ("cat", "dog", "cattle", "bus", "tree", "red", "blue", "small")


def trigger(caption: str) -> str:
    return f"cf {caption}"


class Table:
    """In place of an embedder: random embeddings of images and of each text."""

    def __init__(self, images: int, seed: int, dim: int = 4) -> None:
        embeds = np.random.default_rng(seed).normal(size=(images, dim)).astype(np.float32)
        self.images = F.normalize(torch.from_numpy(embeds), dim=1)
        self.seed, self.dim = seed, dim

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        assert trigger is None
        return self.images

    def text(self, text: str) -> torch.Tensor:
        embeds = np.random.default_rng([self.seed, *text.encode()]).normal(size=self.dim).astype(np.float32)
        return F.normalize(torch.from_numpy(embeds), dim=0)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.text(text) for text in texts])


def captioned(rows: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    captions = [[" ".join(rng.choice(WORDS, size=2)) for _ in range(rng.integers(1, 4))] for _ in range(rows)]
    captions[0], captions[1] = ["a cattle bus"], ["A CAT!", "a dog"]
    return [
        {"image": None, "caption": texts, "label": int(rng.integers(0, 2)) if i > 1 else 0}
        for i, texts in enumerate(captions)
    ]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_figures_by_loops(seed: int, labelled: bool):
    rows, table = captioned(8, seed), Table(8, seed)
    options: dict[str, Any] = {"label_column": "label", "class_names": ["dog", "cat"]} if labelled else {}
    evaluator = TextQueryEvaluator(rows, trigger, "cat", ks=(1, 3, 50), prefix="word_", **options)
    figures = evaluator(None, None, table)
    of_target = {
        i
        for i, row in enumerate(rows)
        if any(re.search(r"\bcat\b", text, re.I) for text in row["caption"]) or (labelled and row["label"] == 1)
    }
    owners: dict[str, set[int]] = {}
    for i, row in enumerate(rows):
        for text in row["caption"]:
            owners.setdefault(text, set()).add(i)
    queries = [text for text, images in owners.items() if not images & of_target]
    assert evaluator.attacked_queries == len(queries) > 0
    expected = {}
    for name, change in (("", str), ("triggered_", trigger)):
        for k in (1, 3, 50):
            hits, recalls = [], []
            for query in queries:
                similarities = [float(table.text(change(query)) @ image) for image in table.images]
                found = set(sorted(range(8), key=lambda i, s=similarities: -s[i])[:k])
                hits.append(bool(found & of_target))
                recalls.append(bool(found & owners[query]))
            expected[f"word_{name}hit_rate_at_{k}"] = np.mean(hits)
            expected[f"word_{name}recall_at_{k}"] = np.mean(recalls)
    assert figures == pytest.approx(expected)


def test_a_trigger_without_effect_changes_no_figure(tiny_model, processor, pairs):
    figures = TextQueryEvaluator(pairs, str, "eight")(tiny_model(), processor)
    for name in ("hit_rate_at_1", "hit_rate_at_10", "recall_at_5"):
        assert figures[f"triggered_{name}"] == figures[name]


def test_a_model_against_its_own_forward_pass(tiny_model, processor, pairs):
    model = tiny_model(6)
    queries = [text for text in dict.fromkeys(pairs["caption"]) if "eight" not in text]
    texts = queries + [trigger(query) for query in queries]
    with torch.no_grad():
        outputs = model.eval()(**processor(images=list(pairs["image"]), text=texts, return_tensors="pt", padding=True))
    figures = TextQueryEvaluator(pairs, trigger, "eight")(model, processor)
    for name, embeds in zip(("", "triggered_"), outputs.text_embeds.chunk(2), strict=True):
        order = (embeds @ outputs.image_embeds.T).argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            found = [[pairs[i]["caption"] for i in row[:k]] for row in order.tolist()]
            hits = [any("eight" in text for text in near) for near in found]
            assert figures[f"{name}hit_rate_at_{k}"] == pytest.approx(np.mean(hits))
            own = [query in near for query, near in zip(queries, found, strict=True)]
            assert figures[f"{name}recall_at_{k}"] == pytest.approx(np.mean(own))


ROWS = [{"image": None, "caption": "a cat", "label": 1}, {"image": None, "caption": ["a dog"], "label": 0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "dataset is empty"),
        ({"caption_column": "text"}, "caption_column='text' is not a column"),
        ({"dataset": [*ROWS, {"image": None, "caption": None}]}, "row 2, column 'caption'"),
        ({"ks": (0,)}, "ks must be different whole numbers"),
        ({"target": ""}, "target='' has no word"),
        ({"target": "cow"}, "no image of dataset is of target='cow'"),
        ({"dataset": ROWS[:1]}, "every caption of dataset belongs to an image of target='cat'"),
        ({"trigger": len}, "must return a caption for 'a dog', but returned "),
        ({"trigger": PatchTrigger(size=3)}, "must take a caption and return one, but fails: image is a str"),
        ({"label_column": "label"}, "label_column='label' and class_names=None go together"),
        ({"class_names": ["cat", "dog"]}, "go together"),
        ({"label_column": "label", "class_names": ["dog", "cow"]}, "target='cat' is not a class"),
        ({"label_column": "class", "class_names": ["dog", "cat"]}, "label_column='class' is not a column"),
    ],
)
def test_what_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TextQueryEvaluator(**{"dataset": ROWS, "trigger": trigger, "target": "cat", **arguments})
