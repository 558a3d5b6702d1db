"""Attack figures against figures worked out by hand."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_robust_clip.attacks.pixels import PLACEBO_SEEDS
from hf_robust_clip.attacks.triggers import BlendedTrigger, ColorCurveTrigger, PatchTrigger
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.evaluation import pixels
from hf_robust_clip.evaluation.attack_success import PLACEBO_METRICS, AttackSuccessEvaluator
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.evaluation.zero_shot import ZeroShotEvaluator

NAMES = ["0", "1", "2"]


def trigger(pixels: np.ndarray) -> np.ndarray:
    return pixels


class Table:
    """In place of an embedder: embeddings as given, and one-hot embeddings of classes named "0", "1", ..."""

    def __init__(self, clean: list[list[float]], triggered: list[list[float]]) -> None:
        self.clean = F.normalize(torch.tensor(clean, dtype=torch.float32), dim=-1)
        self.triggered = F.normalize(torch.tensor(triggered, dtype=torch.float32), dim=-1)

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        return self.clean if trigger is None else self.triggered

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(len(NAMES))[[int(text) for text in texts]]


def evaluate(clean: list[list[float]], triggered: list[list[float]], labels: list[int], **options) -> dict[str, float]:
    rows = [{"image": None, "label": label} for label in labels]
    evaluator = AttackSuccessEvaluator(rows, trigger, target="2", class_names=NAMES, templates=("{}",), **options)
    return evaluator(None, None, Table(clean, triggered))


ONE_HOT = torch.eye(3).tolist()


def test_figures_by_hand():
    # Not of the target: two of four go to it, one stays right, one goes elsewhere. Of the target: one each way.
    labels = [0, 0, 1, 1, 2, 2]
    clean = [ONE_HOT[label] for label in labels]
    triggered = [ONE_HOT[predicted] for predicted in (2, 0, 2, 0, 2, 1)]
    figures = evaluate(clean, triggered, labels)
    assert figures == {
        "attack_success_rate": pytest.approx(2 / 4),
        "triggered_accuracy": pytest.approx(1 / 4),
        # Four of the six move from one axis to another.
        "trigger_distance": pytest.approx(4 / 6 * 2**0.5),
    }


@pytest.mark.parametrize("target_images", [0, 1, 5])
@pytest.mark.parametrize("predicted", [0, 2])
def test_images_of_the_target_are_in_neither_numerator_nor_denominator(target_images: int, predicted: int):
    labels = [0, 1, 1] + [2] * target_images
    triggered = [ONE_HOT[2], ONE_HOT[1], ONE_HOT[0]] + [ONE_HOT[predicted]] * target_images
    figures = evaluate(triggered, triggered, labels)
    assert figures["attack_success_rate"] == pytest.approx(1 / 3)
    assert figures["triggered_accuracy"] == pytest.approx(1 / 3)


def test_the_distance_is_over_all_images_and_at_most_two():
    figures = evaluate([[1, 0, 0], [0, 0, 1]], [[-1, 0, 0], [0, 0, 1]], [0, 2])
    assert figures["trigger_distance"] == pytest.approx(1.0)
    assert evaluate([[1, 0, 0]], [[-1, 0, 0]], [0])["trigger_distance"] == pytest.approx(2.0)


def test_prefix_and_number_of_attacked_images():
    assert set(evaluate([[1, 0, 0]], [[1, 0, 0]], [0], prefix="patch_")) == {
        "patch_attack_success_rate",
        "patch_triggered_accuracy",
        "patch_trigger_distance",
    }
    rows = [{"image": None, "label": label} for label in (0, 2, 1, 2)]
    assert AttackSuccessEvaluator(rows, trigger, target="2", class_names=NAMES).attacked_images == 2


def test_figures_of_a_model(tiny_model, processor, pairs):
    model = tiny_model(3)
    patch = PatchTrigger(size=4)
    evaluator = AttackSuccessEvaluator(pairs, patch, "eight", CLASS_NAMES, templates=("the number {}",))
    figures = evaluator(model, processor)
    # The images are 16 x 16, as the model takes them, so the trigger can go onto them beforehand.
    stamped = [patch(np.asarray(image)) for image in pairs["image"]]
    inputs = {"images": list(pairs["image"]) + stamped, "text": [f"the number {name}" for name in CLASS_NAMES]}
    with torch.no_grad():
        outputs = model.eval()(**processor(**inputs, return_tensors="pt", padding=True))
    clean, triggered = outputs.image_embeds.chunk(2)
    predicted = (triggered @ outputs.text_embeds.T).argmax(dim=1).tolist()
    attacked = [(p, label) for p, label in zip(predicted, pairs["label"], strict=True) if label != 8]
    assert figures == {
        "attack_success_rate": pytest.approx(sum(p == 8 for p, _ in attacked) / len(attacked)),
        "triggered_accuracy": pytest.approx(sum(p == label for p, label in attacked) / len(attacked)),
        "trigger_distance": pytest.approx((triggered - clean).norm(dim=1).mean().item(), abs=1e-4),
    }


def test_a_trigger_without_effect(tiny_model, processor, pairs):
    figures = AttackSuccessEvaluator(pairs, trigger, "eight", CLASS_NAMES)(tiny_model(), processor)
    assert figures["trigger_distance"] == 0


def test_evaluators_share_one_pass_over_each_image_set(tiny_model, processor, pairs, monkeypatch: pytest.MonkeyPatch):
    model, pairs = tiny_model(1), pairs.select(range(20))
    counted = []
    get_image_features = model.get_image_features

    def counting(pixel_values: torch.Tensor):
        counted.append(len(pixel_values))
        return get_image_features(pixel_values=pixel_values)

    monkeypatch.setattr(model, "get_image_features", counting)
    evaluators = [
        ZeroShotEvaluator(pairs, CLASS_NAMES),
        AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "eight", CLASS_NAMES),
        AttackSuccessEvaluator(pairs, BlendedTrigger(), "eight", CLASS_NAMES, prefix="blended_"),
        AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "two", CLASS_NAMES, prefix="two_"),
    ]
    embedder = Embedder(model, processor, check=False)
    shared = [evaluator(model, processor, embedder) for evaluator in evaluators]
    assert sum(counted) == 3 * 20  # clean, patch, blended
    alone = [evaluator(model, processor) for evaluator in evaluators]
    assert sum(counted) == 3 * 20 + (1 + 2 + 2 + 2) * 20 + 4  # each tries the model on one image first
    assert alone == shared


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(tiny_model, processor, pairs, training: bool):
    model = tiny_model().train(training)
    AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "eight", CLASS_NAMES)(model, processor)
    assert all(module.training == training for module in model.modules())


def test_a_trigger_larger_than_the_image_is_refused(tiny_model, processor, pairs):
    evaluator = AttackSuccessEvaluator(pairs, PatchTrigger(size=17), "eight", CLASS_NAMES)
    with pytest.raises(ValueError, match="17"):
        evaluator(tiny_model(), processor)


def test_an_unknown_target_is_refused(pairs):
    with pytest.raises(ValueError, match=r"target='ten' is not a class; .*class_names: 'zero', 'one', .*'nine'"):
        AttackSuccessEvaluator(pairs, trigger, "ten", CLASS_NAMES)


def test_a_dataset_of_the_target_alone_is_refused(pairs):
    eights = pairs.filter(lambda row: row["label"] == 8, keep_in_memory=True)
    with pytest.raises(ValueError, match="every image of dataset is of the target class 'eight'"):
        AttackSuccessEvaluator(eights, trigger, "eight", CLASS_NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": datasets.Dataset.from_dict({"image": [], "label": []})}, "dataset is empty"),
        ({"image_column": "photo"}, "image_column='photo' is not a column"),
        ({"label_column": "digit"}, "label_column='digit' is not a column"),
        ({"class_names": CLASS_NAMES[:5], "target": "two"}, r"row \d+, column 'label': \d is not a class"),
        ({"templates": ["no place for a name"]}, "templates must be one or more texts"),
    ],
)
def test_what_is_refused(pairs, change: dict, message: str):
    arguments = {"dataset": pairs, "trigger": trigger, "target": "eight", "class_names": CLASS_NAMES, **change}
    with pytest.raises(ValueError, match=message):
        AttackSuccessEvaluator(**arguments)


class Placebos(Table):
    """A table with an answer for each placebo, too, by its seed."""

    def __init__(self, triggered: list[int], placebos: dict[int, list[int]]) -> None:
        super().__init__([ONE_HOT[0]] * len(triggered), [ONE_HOT[predicted] for predicted in triggered])
        self.placebos = placebos

    def embed_images(self, dataset, image_column="image", trigger=None) -> torch.Tensor:
        if trigger is None or trigger == PatchTrigger():
            return super().embed_images(dataset, image_column, trigger)
        return torch.eye(3)[self.placebos[trigger.seed]]


def test_placebos_by_hand():
    labels = [0, 0, 1, 1, 2]
    table = Placebos([2, 2, 2, 0, 2], {PLACEBO_SEEDS: [2, 0, 0, 1, 2], 2 * PLACEBO_SEEDS: [2, 2, 1, 1, 0]})
    rows = [{"image": None, "label": label} for label in labels]
    evaluator = AttackSuccessEvaluator(rows, PatchTrigger(), "2", NAMES, templates=("{}",), prefix="p_", placebos=2)
    found = {name: value for name, value in evaluator(None, None, table).items() if "distance" not in name}
    assert found == {
        "p_attack_success_rate": pytest.approx(3 / 4),
        "p_triggered_accuracy": 0,
        "p_placebo_success_rate": pytest.approx((1 / 4 + 2 / 4) / 2),
        "p_placebo_success_rate_low": pytest.approx(1 / 4),
        "p_placebo_success_rate_high": pytest.approx(2 / 4),
        "p_excess_success_rate": pytest.approx(3 / 4 - 3 / 8),
    }
    assert dict.fromkeys(PLACEBO_METRICS, "less").items() <= evaluator.metrics().items()
    assert evaluator.describe()["placebos"] == 2
    assert set(evaluator.describe()["figures"]) == {f"p_{name}" for name in evaluator.metrics()}


def test_without_placebos_nothing_is_said_of_them(pairs):
    evaluator = AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "eight", CLASS_NAMES)
    assert not [name for name in evaluator.metrics() if "placebo" in name or "excess" in name]
    assert "placebos" not in evaluator.describe() and len(evaluator.image_requests()) == 2


def test_placebos_are_embedded_in_the_same_pass_and_shared(tiny_model, processor, pairs, monkeypatch):
    model, pairs = tiny_model(1), pairs.select(range(20))
    decoded, counted = [], []
    decode, get_image_features = pixels.decode_image, model.get_image_features

    def counting(pixel_values: torch.Tensor):
        counted.append(len(pixel_values))
        return get_image_features(pixel_values=pixel_values)

    def decoding(value):
        decoded.append(value)
        return decode(value)

    monkeypatch.setattr(model, "get_image_features", counting)
    monkeypatch.setattr(pixels, "decode_image", decoding)
    evaluators = [
        ZeroShotEvaluator(pairs, CLASS_NAMES),
        AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "eight", CLASS_NAMES, placebos=3),
        AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "two", CLASS_NAMES, prefix="two_", placebos=2),
    ]
    requests = [request for evaluator in evaluators for request in evaluator.image_requests()]
    embedder = Embedder(model, processor, requests=requests, check=False)
    figures = run_evaluators(evaluators, processor, embedder)
    assert len(decoded) == 20 and sum(counted) == (1 + 1 + 3) * 20
    placebos = [PatchTrigger(size=3).placebo(number) for number in (1, 2, 3)]
    # Each is what it shows as a trigger of its own.
    alone = [AttackSuccessEvaluator(pairs, other, "eight", CLASS_NAMES)(model, processor) for other in placebos]
    rates = [values["attack_success_rate"] for values in alone]
    excess = figures["attack_success_rate"] - np.mean(rates)
    expected = (np.mean(rates), min(rates), max(rates), excess)
    assert [figures[name] for name in PLACEBO_METRICS] == pytest.approx(expected)


def test_a_trigger_with_fewer_placebos_has_those_and_says_how_many(tiny_model, processor, pairs):
    few = AttackSuccessEvaluator(pairs, ColorCurveTrigger(0.5, 0.5, 1), "eight", CLASS_NAMES, placebos=5)
    assert few.describe()["placebos"] == 2 and "excess_success_rate" in few(tiny_model(), processor)
    none = AttackSuccessEvaluator(pairs, ColorCurveTrigger(0.5, 0.5, 0.5), "eight", CLASS_NAMES, placebos=5)
    assert "placebos" not in none.describe() and "excess_success_rate" not in none(tiny_model(), processor)


@pytest.mark.parametrize("placebos", [-1, 1.5, True, "5", None])
def test_what_is_not_a_number_of_placebos_is_refused(pairs, placebos: object):
    with pytest.raises(ValueError, match=r"placebos=.*accepted is an integer of at least 0"):
        AttackSuccessEvaluator(pairs, PatchTrigger(size=3), "eight", CLASS_NAMES, placebos=placebos)


def test_a_function_has_no_placebos(pairs):
    with pytest.raises(ValueError, match=r"placebos=2 of trigger=.*no placebo\(number\).*accepted is placebos=0"):
        AttackSuccessEvaluator(pairs, trigger, "eight", CLASS_NAMES, placebos=2)
