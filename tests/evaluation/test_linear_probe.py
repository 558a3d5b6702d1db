"""The linear probe against the optimum of its objective, found by other means."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip.attacks.triggers import PatchTrigger
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.linear_probe import LinearProbeEvaluator

NAMES = ["0", "1", "2"]


def trigger(pixels: np.ndarray) -> np.ndarray:
    return pixels


class Table:
    """In place of an embedder: embeddings of the training images, and of the others without and with trigger."""

    def __init__(self, train_dataset: object, train: torch.Tensor, clean: torch.Tensor, triggered: torch.Tensor):
        self.train_dataset = train_dataset
        self.train, self.clean, self.triggered = train, clean, triggered

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        if dataset is self.train_dataset:
            assert trigger is None
            return self.train
        return self.clean if trigger is None else self.triggered


def rows(labels: list[int]) -> list[dict]:
    return [{"image": None, "label": label} for label in labels]


def optimum(features: torch.Tensor, labels: torch.Tensor, C: float) -> torch.Tensor:
    """Weights and biases `(classes, D + 1)` of the least C times the summed log loss plus half the squared weights."""
    inputs = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    weights = torch.zeros(3, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = C * F.cross_entropy(inputs @ weights.T, labels, reduction="sum") + (weights[:, :-1] ** 2).sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


@pytest.mark.parametrize("C", [0.05, 1.0, 30.0])
def test_figures_are_those_of_the_optimum(C: float):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 5, generator=generator)

    def draw(labels: torch.Tensor) -> torch.Tensor:
        return F.normalize(centres[labels] + torch.randn(len(labels), 5, generator=generator), dim=1)

    train_labels, labels = (torch.randint(0, 3, (n,), generator=generator) for n in (60, 80))
    train, clean, triggered = draw(train_labels), draw(labels), draw(torch.full_like(labels, 2))
    train_rows, test_rows = rows(train_labels.tolist()), rows(labels.tolist())
    evaluator = LinearProbeEvaluator(train_rows, test_rows, NAMES, trigger=trigger, target="2", C=C, prefix="patch_")
    figures = evaluator(None, None, Table(train_rows, train, clean, triggered))
    weights = optimum(train, train_labels, C)

    def predict(features: torch.Tensor) -> list[int]:
        return (features.double() @ weights[:, :-1].T + weights[:, -1]).argmax(dim=1).tolist()

    right = [p == label for p, label in zip(predict(clean), labels.tolist(), strict=True)]
    attacked = [(p, label) for p, label in zip(predict(triggered), labels.tolist(), strict=True) if label != 2]
    assert figures == {
        "patch_linear_probe_accuracy": pytest.approx(sum(right) / len(right)),
        "patch_linear_probe_attack_success_rate": pytest.approx(sum(p == 2 for p, _ in attacked) / len(attacked)),
        "patch_linear_probe_triggered_accuracy": pytest.approx(sum(p == n for p, n in attacked) / len(attacked)),
    }
    assert evaluator.attacked_images == len(attacked)


@pytest.mark.parametrize("target_images", [0, 1, 5])
def test_images_of_the_target_do_not_count(target_images: int):
    train = torch.eye(3)
    labels = [0, 1, 1] + [2] * target_images
    triggered = torch.cat([torch.eye(3)[[2, 1, 0]], torch.eye(3)[[2] * target_images]])
    train_rows, test_rows = rows([0, 1, 2]), rows(labels)
    table = Table(train_rows, train, torch.eye(3)[labels], triggered)
    figures = LinearProbeEvaluator(train_rows, test_rows, NAMES, trigger=trigger, target="2")(None, None, table)
    assert figures == {
        "linear_probe_accuracy": 1.0,
        "linear_probe_attack_success_rate": pytest.approx(1 / 3),
        "linear_probe_triggered_accuracy": pytest.approx(1 / 3),
    }


def test_a_model_gives_the_same_each_time_and_embeds_each_set_once(tiny_model, processor, pairs):
    model = tiny_model(5)
    train, test, patch = pairs.select(range(40)), pairs.select(range(40, 64)), PatchTrigger(size=4)
    evaluator = LinearProbeEvaluator(train, test, CLASS_NAMES, trigger=patch, target="eight")
    first = evaluator(model, processor)
    assert first == evaluator(model, processor, Embedder(model, processor, requests=evaluator.image_requests()))
    clean = LinearProbeEvaluator(train, test, CLASS_NAMES)
    assert clean(model, processor) == {"linear_probe_accuracy": first["linear_probe_accuracy"]}
    assert len(evaluator.image_requests()) == 3 and len(clean.image_requests()) == 2


def test_a_trigger_that_does_not_fit_is_refused_early(processor, pairs):
    LinearProbeEvaluator(pairs, pairs, CLASS_NAMES).check(processor)
    with pytest.raises(ValueError, match="17"):
        LinearProbeEvaluator(pairs, pairs, CLASS_NAMES, trigger=PatchTrigger(size=17), target="eight").check(processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": []}, "train_dataset is empty; it needs labelled images"),
        ({"dataset": []}, "dataset is empty; it needs labelled images"),
        ({"train_dataset": datasets.Dataset.from_dict({"image": [0]})}, "'label' is not a column of train_dataset"),
        ({"train_dataset": rows([0, 3])}, "row 1 of train_dataset, column 'label': 3 is not a class"),
        ({"dataset": rows([0, 3])}, "row 1, column 'label': 3 is not a class"),
        ({"train_dataset": rows([1, 1])}, "every image of train_dataset is of the class '1'"),
        ({"class_names": ["0"]}, "class_names must be at least two"),
        ({"C": 0.0}, r"C=0.0 must be a positive number"),
        ({"C": float("nan")}, "C=nan must be a positive number"),
        ({"trigger": trigger}, "go together"),
        ({"target": "2"}, "go together"),
        ({"trigger": trigger, "target": "3"}, "target='3' is not a class; .*class_names: '0', '1', '2'"),
        ({"trigger": trigger, "target": "2", "train_dataset": rows([0, 1])}, "no image of train_dataset .*target='2'"),
        (
            {"trigger": trigger, "target": "2", "dataset": rows([2, 2])},
            "every image of dataset is of the target class",
        ),
    ],
)
def test_what_is_refused(arguments: dict, message: str):
    given = {"train_dataset": rows([0, 1, 2]), "dataset": rows([0, 1, 2]), "class_names": NAMES, **arguments}
    with pytest.raises(ValueError, match=message):
        LinearProbeEvaluator(**given)
