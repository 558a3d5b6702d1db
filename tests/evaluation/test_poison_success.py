"""Poison success against figures worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip.evaluation.poison_success import PoisonSuccessEvaluator

NAMES = ["0", "1", "2"]


class Table:
    """In place of an embedder: image i is of class `predicted[i]`, and classes named "0", "1", ... are one-hot."""

    def __init__(self, predicted: list[int]) -> None:
        self.predicted = predicted

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        assert len(dataset) == len(self.predicted) and trigger is None
        return F.one_hot(torch.tensor(self.predicted), len(NAMES)).float()

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(len(NAMES))[[int(text) for text in texts]]


def evaluate(predicted: list[int], adversarial: list[str], **options) -> dict[str, float]:
    rows = [{"image": None}] * len(predicted)
    return PoisonSuccessEvaluator(rows, adversarial, NAMES, templates=("{}",), **options)(None, None, Table(predicted))


def test_each_image_counts_against_its_own_class():
    figures = evaluate([0, 1, 2, 2], ["0", "2", "2", "1"], prefix="targeted_")
    assert figures["targeted_poison_success_rate"] == 0.5


@pytest.mark.parametrize("hits, n", [(0, 8), (3, 8), (16, 16)])
def test_the_interval_is_wilsons(hits, n):
    figures = evaluate([1] * hits + [0] * (n - hits), ["1"] * n)
    z, share = 1.959963984540054, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert figures["poison_success_rate"] == share
    assert figures["poison_success_rate_low"] == pytest.approx(centre - half)
    assert figures["poison_success_rate_high"] == pytest.approx(centre + half)


@pytest.mark.parametrize(
    "count, adversarial, message",
    [
        (0, [], "dataset is empty; it needs the chosen images"),
        (2, ["1"], r"one class for each of the 2 images of dataset, but is \['1'\]"),
        (2, "12", "each of the 2 images of dataset, but is '12'"),
        (1, ["9"], "adversarial='9' is not a class; .*class_names: '0', '1', '2'"),
    ],
)
def test_what_makes_no_sense_is_refused(count, adversarial, message):
    with pytest.raises(ValueError, match=message):
        PoisonSuccessEvaluator([{"image": None}] * count, adversarial, NAMES)
