"""Zero-shot figures against figures worked out by hand, and the embeddings that evaluators share."""

from collections.abc import Callable

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Value
from PIL import Image
from transformers import CLIPModel

from hf_robust_clip.attacks.triggers import PatchTrigger
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShotEvaluator, class_embeddings

TEMPLATES = ("a photo of the digit {}", "the number {} written by hand")


class Table:
    """In place of an embedder: image embeddings as given, and one-hot embeddings of classes named "0", "1", ..."""

    def __init__(self, images: list[list[float]]) -> None:
        self.images = F.normalize(torch.tensor(images, dtype=torch.float32), dim=-1)

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        return self.images

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(self.images.shape[1])[[int(text) for text in texts]]


def evaluate(images: list[list[float]], labels: list, **options) -> dict[str, float]:
    names = [str(i) for i in range(len(images[0]))]
    rows = [{"image": None, "label": label} for label in labels]
    evaluator = ZeroShotEvaluator(rows, names, templates=("{}",), **options)
    return evaluator(None, None, Table(images))


# ---- Figures by hand ----


def test_accuracy_and_balanced_accuracy():
    # Class 0: three of four right. Class 1: none of one. Class 2 has no image.
    images = [[3, 1, 0], [3, 0, 1], [2, 0, 0], [0, 1, 0], [1, 0, 0]]
    figures = evaluate(images, [0, 0, 0, 0, 1])
    assert figures == {
        "clean_accuracy": pytest.approx(3 / 5),
        "clean_balanced_accuracy": pytest.approx((3 / 4 + 0 / 1) / 2),
    }


def test_top5_counts_the_five_nearest_and_exists_with_more_than_five_classes_only():
    descending = [[6.0, 5, 4, 3, 2, 1]]
    figures = evaluate(descending * 6, [0, 1, 2, 3, 4, 5])
    assert figures["clean_top5_accuracy"] == pytest.approx(5 / 6)
    assert figures["clean_accuracy"] == pytest.approx(1 / 6)
    assert "clean_top5_accuracy" not in evaluate([[5.0, 4, 3, 2, 1]], [0])


def test_prefix():
    assert set(evaluate([[1, 0]], [0], prefix="shifted")) == {"shifted_accuracy", "shifted_balanced_accuracy"}


def test_labels_as_names_and_numbers_of_any_library_are_the_same():
    images = [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    expected = evaluate(images, [0, 1, 2])
    for labels in (["0", "1", "2"], list(np.arange(3)), list(torch.arange(3)), [np.int8(0), "1", 2]):
        assert evaluate(images, labels) == expected


def test_a_class_is_the_normalised_mean_of_its_prompts():
    class Prompts:
        def embed_texts(self, texts: list[str]) -> torch.Tensor:
            table = {"a cat": [1, 0], "the cat": [0, 1], "a dog": [0, -1], "the dog": [0, -1]}
            return torch.tensor([table[text] for text in texts], dtype=torch.float32)

    classes = class_embeddings(Prompts(), ["cat", "dog"], ["a {}", "the {}"])  # type: ignore[arg-type]
    torch.testing.assert_close(classes, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_names_and_templates_may_hold_braces():
    class Echo:
        texts: list[str]

        def embed_texts(self, texts: list[str]) -> torch.Tensor:
            self.texts = texts
            return torch.eye(len(texts))

    echo = Echo()
    class_embeddings(echo, ["{x}", "{}"], ["a {} in { braces"])  # type: ignore[arg-type]
    assert echo.texts == ["a {x} in { braces", "a {} in { braces"]


# ---- A real model ----


def by_hand(model: CLIPModel, processor, rows: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings `(N, D)` and class embeddings `(C, D)`, from the model's own forward pass."""
    prompts = [template.format(name) for name in CLASS_NAMES for template in TEMPLATES]
    inputs = processor(text=prompts, images=list(rows["image"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    classes = outputs.text_embeds.view(len(CLASS_NAMES), len(TEMPLATES), -1).mean(dim=1)
    return outputs.image_embeds, F.normalize(classes, dim=-1)


def test_embeddings_are_the_normalised_ones_of_the_forward_pass(tiny_model, processor, pairs):
    model = tiny_model(1)
    images, classes = by_hand(model, processor, pairs)
    embedder = Embedder(model, processor, batch_size=7)
    torch.testing.assert_close(embedder.embed_images(pairs), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(class_embeddings(embedder, CLASS_NAMES, TEMPLATES), classes, atol=1e-5, rtol=1e-5)
    captions = list(pairs["caption"])
    inputs = processor(text=captions, images=[Image.new("RGB", (16, 16))], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).text_embeds
    torch.testing.assert_close(embedder.embed_texts(captions), expected, atol=1e-5, rtol=1e-5)


def test_figures_of_a_model(tiny_model, processor, pairs):
    model = tiny_model(2)
    images, classes = by_hand(model, processor, pairs)
    scores, labels = images @ classes.T, torch.tensor(list(pairs["label"]))
    correct = (scores.argmax(dim=1) == labels).float()
    recalls = [correct[labels == label].mean().item() for label in range(10)]
    nearest = scores.argsort(dim=1, descending=True)[:, :5]
    evaluator = ZeroShotEvaluator(pairs, CLASS_NAMES, templates=TEMPLATES)
    assert evaluator(model, processor) == {
        "clean_accuracy": pytest.approx(correct.mean().item()),
        "clean_balanced_accuracy": pytest.approx(sum(recalls) / 10),
        "clean_top5_accuracy": pytest.approx((nearest == labels[:, None]).any(dim=1).float().mean().item()),
    }


def test_kinds_of_dataset_and_columns_give_the_same_embeddings(tiny_model, processor, pairs):
    model, pairs = tiny_model(), pairs.select(range(20))
    expected = Embedder(model, processor).embed_images(pairs)
    kinds: list = [
        pairs.with_format("torch"),
        pairs.with_format("numpy"),
        pairs.cast_column("image", datasets.Image(decode=False)),
        pairs.with_transform(lambda batch: {name: list(batch[name]) for name in batch}),
        [dict(row) for row in pairs],
    ]
    for dataset in kinds:
        assert torch.equal(Embedder(model, processor).embed_images(dataset), expected)
        labels = ZeroShotEvaluator(dataset, CLASS_NAMES).labels
        assert labels.tolist() == list(pairs["label"]) and labels.dtype == torch.int64
    renamed = pairs.rename_columns({"image": "photo", "label": "digit"})
    evaluator = ZeroShotEvaluator(
        renamed, CLASS_NAMES, templates=TEMPLATES, image_column="photo", label_column="digit"
    )
    assert evaluator(model, processor) == ZeroShotEvaluator(pairs, CLASS_NAMES, templates=TEMPLATES)(model, processor)


def test_the_batch_size_does_not_matter(tiny_model, processor, pairs):
    model, pairs = tiny_model(), pairs.select(range(20))
    expected = Embedder(model, processor, batch_size=20).embed_images(pairs)
    for batch_size in (1, 7, 1000):
        embeds = Embedder(model, processor, batch_size=batch_size).embed_images(pairs)
        torch.testing.assert_close(embeds, expected, atol=1e-6, rtol=1e-5)


def test_long_prompts_are_cut_to_what_the_model_takes(tiny_model, processor):
    embeds = Embedder(tiny_model(), processor).embed_texts(["the number eight written by hand " * 20, ""])
    assert embeds.shape == (2, 16) and embeds.isfinite().all()


def test_a_model_of_lower_precision_gives_float32(tiny_model, processor, pairs):
    embedder = Embedder(tiny_model().to(torch.bfloat16), processor)
    for embeds in (embedder.embed_images(pairs), embedder.embed_texts(["a", "b"])):
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)))


# ---- What an evaluation leaves behind ----


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_is_restored(tiny_model, processor, pairs, training: bool):
    model = tiny_model().train(training)
    model.vision_model.eval()
    before = modes(model)
    evaluator = ZeroShotEvaluator(pairs, CLASS_NAMES)
    evaluator(model, processor)
    assert modes(model) == before
    with pytest.raises(ValueError, match="row 1 of the evaluation images"):
        Embedder(model, processor).embed_images([{"image": pairs[0]["image"]}, {"image": b"broken"}])
    assert modes(model) == before


def test_an_evaluation_draws_no_random_numbers_and_leaves_no_gradients(tiny_model, processor, pairs):
    model = tiny_model().train()
    state = torch.get_rng_state()
    ZeroShotEvaluator(pairs, CLASS_NAMES)(model, processor)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def count_images(model: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    counted: list[int] = []
    get_image_features = model.get_image_features

    def counting(pixel_values: torch.Tensor, **kwargs):
        counted.append(len(pixel_values))
        return get_image_features(pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(model, "get_image_features", counting)
    return lambda: sum(counted)


def test_an_embedder_embeds_each_set_once(tiny_model, processor, pairs, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model()
    embedded = count_images(model, monkeypatch)
    embedder = Embedder(model, processor, check=False)
    first = embedder.embed_images(pairs)
    assert embedder.embed_images(pairs) is first and embedded() == 64
    triggered = embedder.embed_images(pairs, trigger=PatchTrigger(size=3))
    # Triggers that are equal are the same.
    assert embedder.embed_images(pairs, trigger=PatchTrigger(size=3)) is triggered and embedded() == 128
    embedder.embed_images(pairs, trigger=PatchTrigger(size=4))
    assert embedded() == 192
    embedder.embed_images(pairs.select(range(10)))
    assert embedded() == 202


def test_embedding_sets_that_are_gone_are_not_taken_for_new_ones(tiny_model, processor, pairs):
    embedder = Embedder(tiny_model(), processor)
    for i in range(8):
        # Each may get the address of the one before it.
        rows = [{"image": pairs[i]["image"]}]
        expected = Embedder(embedder.model, processor).embed_images(rows)
        assert torch.equal(embedder.embed_images(rows), expected)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return 255 - pixels


def test_a_trigger_may_be_any_callable(tiny_model, processor, pairs):
    embedder = Embedder(tiny_model(), processor)
    negative = [{"image": 255 - np.asarray(image)} for image in pairs["image"]]
    expected = embedder.embed_images(negative)
    for trigger in (Unhashable(), lambda pixels: 255 - pixels):
        assert torch.equal(embedder.embed_images(pairs, trigger=trigger), expected)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("trigger", "found"),
    [
        (lambda pixels: pixels / 255, "float64 of shape"),
        (lambda pixels: pixels[:8], r"uint8 of shape \(8, 16, 3\)"),
        (lambda pixels: None, "NoneType"),
        (Image.fromarray, "Image"),
    ],
)
def test_a_trigger_that_returns_something_else_is_refused(tiny_model, processor, pairs, trigger, found: str):
    with pytest.raises(ValueError, match=rf"trigger must return a uint8 array of shape \(16, 16, 3\).*{found}"):
        Embedder(tiny_model(), processor).embed_images(pairs, trigger=trigger)


ROWS = [{"image": Image.new("RGB", (16, 16)), "label": label} for label in (0, 1, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "dataset is empty"),
        ({"image_column": "photo"}, "image_column='photo' is not a column of dataset.*'image', 'label'"),
        ({"label_column": "digit"}, "label_column='digit' is not a column of dataset.*'image', 'label'"),
        (
            {"dataset": [*ROWS, {"image": None, "label": 2}]},
            "row 3, column 'label': 2 is not a class; accepted are the numbers 0 to 1 and class_names: 'cat', 'dog'",
        ),
        ({"dataset": [{"image": None, "label": -1}]}, "row 0, column 'label': -1 is not a class"),
        ({"dataset": [{"image": None, "label": "cow"}]}, "row 0, column 'label': 'cow' is not a class.*'cat', 'dog'"),
        ({"dataset": [{"image": None, "label": None}]}, "None is not a class"),
        ({"dataset": [{"image": None, "label": 0.0}]}, "0.0 is not a class"),
        ({"dataset": [{"image": None, "label": True}]}, "True is not a class"),
        ({"dataset": [{"image": None, "label": [0]}]}, r"\[0\] is not a class"),
        ({"class_names": ["cat"]}, r"class_names must be at least two different names, .* numbers, but is 'cat'"),
        ({"class_names": ["cat", "cat"]}, "class_names must be at least two different"),
        ({"class_names": "cat"}, "class_names must be at least two different"),
        ({"class_names": ["cat", 3]}, "class_names must be at least two different"),
        ({"class_names": ["cat", "d\ud800g"]}, r"class_names: 'd\\ud800g' cannot be encoded"),
        ({"templates": ["\ud800 {}"]}, r"templates: '\\ud800 \{\}' cannot be encoded"),
        ({"templates": []}, r"templates must be one or more texts, each with one '\{\}'"),
        ({"templates": ["a photo"]}, "templates must be one or more texts"),
        ({"templates": ["a {} and a {}"]}, "templates must be one or more texts"),
        ({"templates": ["a {name}"]}, "templates must be one or more texts"),
        ({"templates": [None]}, "templates must be one or more texts"),
    ],
)
def test_what_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ZeroShotEvaluator(**{"dataset": ROWS, "class_names": ["cat", "dog"], **arguments})


def test_class_names_in_another_order_than_the_column_has_them_are_refused(pairs):
    with pytest.raises(
        ValueError, match=r"class_names has the classes of column 'label' in another order.*'zero', 'one'"
    ):
        ZeroShotEvaluator(pairs, CLASS_NAMES[::-1])
    # Other names for the same numbers are fine, and so is the order of names where labels are names.
    ZeroShotEvaluator(pairs, [str(i) for i in range(10)])
    named = pairs.map(lambda row: {"name": CLASS_NAMES[row["label"]]}, keep_in_memory=True)
    named = named.cast_column("name", Value("string"))
    labels = ZeroShotEvaluator(named, CLASS_NAMES[::-1], label_column="name").labels
    assert labels.tolist() == [9 - label for label in pairs["label"]]
    assert isinstance(pairs.features["label"], ClassLabel)


def test_one_template_may_be_a_text(pairs):
    assert ZeroShotEvaluator(pairs, CLASS_NAMES, templates="a {}").templates == ["a {}"]
    assert all(template.count("{}") == 1 for template in DEFAULT_TEMPLATES)
