"""Arguments of another kind than those accepted: taken where it is plain what is meant, else named in an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPDataCollator,
    CLIPTrainer,
    CLIPTrainingArguments,
    FeaturePool,
    ImageAugmentation,
    LinearProbeEvaluator,
    PairSimilarityCallback,
    PatchTrigger,
    PoisonSpec,
    PoisonSuccessEvaluator,
    RetrievalEvaluator,
    TextAugmentation,
    TextQueryEvaluator,
    WordTrigger,
    ZeroShotEvaluator,
    fit_similarity_mixture,
    poison_dataset,
    poison_stream,
    prepare_dataset,
    replay_manifest,
    scan_checkpoint,
    targeted_specs,
)
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.evaluation.embedding import Embedder

PATCH = PatchTrigger(size=3)
ROWS = [{"image": None, "caption": "a cat", "label": 0}, {"image": None, "caption": "a dog", "label": 1}]
PAIRS = datasets.Dataset.from_list([{"image": b"", "caption": "a cat", "label": 0}] * 2)
NAMES = ["cat", "dog"]


def trainer(**arguments: Any) -> CLIPTrainer:
    args = CLIPTrainingArguments("unused", use_cpu=True, report_to="none")
    return CLIPTrainer(**{"model": None, "args": args, **arguments})  # type: ignore[arg-type]


#: What takes a dataset of rows, with the name of the argument.
DATASETS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "CLIPTrainer": ("train_dataset", lambda data: trainer(train_dataset=data)),
    "CLIPTrainer, to evaluate": (r"eval_dataset", lambda data: trainer(eval_dataset={"a": data})),
    "ZeroShotEvaluator": ("dataset", lambda data: ZeroShotEvaluator(data, NAMES)),
    "AttackSuccessEvaluator": ("dataset", lambda data: AttackSuccessEvaluator(data, PATCH, "cat", NAMES)),
    "PoisonSuccessEvaluator": ("dataset", lambda data: PoisonSuccessEvaluator(data, ["cat"], NAMES)),
    "scan_checkpoint": ("images", lambda data: scan_checkpoint(None, None, data, ["a", "b", "c"])),
    "RetrievalEvaluator": ("dataset", RetrievalEvaluator),
    "LinearProbeEvaluator": ("train_dataset", lambda data: LinearProbeEvaluator(data, ROWS, NAMES)),
    "TextQueryEvaluator": ("dataset", lambda data: TextQueryEvaluator(data, WordTrigger(), "cat")),
    "PairSimilarityCallback": ("dataset", PairSimilarityCallback),
    "poison_dataset": ("dataset", lambda data: poison_dataset(data, PoisonSpec(PATCH, "cat", count=1))),
    "poison_stream": ("stream", lambda data: poison_stream(data, PoisonSpec(PATCH, "cat", rate=0.5))),
    "prepare_dataset": ("dataset", lambda data: prepare_dataset(data, None, "unused")),
}
#: What is not a dataset, with what the error says to write.
NO_DATASETS: dict[str, tuple[Callable[[], Any], str]] = {
    "a DataFrame": (lambda: pd.DataFrame(ROWS), r"datasets.Dataset.from_pandas\("),
    "a table of Arrow": (lambda: pa.Table.from_pylist([{"image": b""}]), r"datasets.Dataset\("),
    "splits": (lambda: datasets.DatasetDict(train=PAIRS), r"it has 'train'; pass one of them, such as .*\['train'\]"),
    "columns": (lambda: {"image": [b""], "caption": ["a cat"]}, "datasets.Dataset.from_dict"),
    "a path": (lambda: Path("pairs.csv"), r"load_pairs\('pairs.csv'\)"),
    "a string": (lambda: "pairs.csv", r"load_pairs\('pairs.csv'\)"),
    "a generator": (lambda: (row for row in ROWS), "read only once; .*from_generator"),
    "a loader": (lambda: torch.utils.data.DataLoader(ROWS), "pass the dataset"),
    "a class": (lambda: datasets.Dataset, "the class Dataset, not an object of it"),
    "a number": (lambda: 3, "but is 3"),
}


@pytest.mark.parametrize("what", NO_DATASETS)
@pytest.mark.parametrize("where", DATASETS)
def test_what_is_not_a_dataset_is_named_with_what_to_write(where: str, what: str):
    argument, call = DATASETS[where]
    value, hint = NO_DATASETS[what]
    with pytest.raises(ValueError, match=f"^{argument}.* must be .*{hint}") as caught:
        call(value())
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize("where", sorted(DATASETS.keys() - {"poison_dataset", "poison_stream", "prepare_dataset"}))
def test_rows_must_be_mappings(where: str):
    argument, call = DATASETS[where]
    with pytest.raises(ValueError, match=f"the rows of {argument}.* must be mappings .* but row 0 is a tuple"):
        call([(None, "a cat", 0)])
    if not where.startswith("CLIPTrainer"):
        with pytest.raises(ValueError, match=f"^{argument} must be .* but is an IterableDataset: load it without"):
            call(PAIRS.to_iterable_dataset())


@pytest.mark.parametrize(
    "names",
    [tuple(NAMES), np.array(NAMES), pd.Series(NAMES), pd.Index(NAMES), datasets.ClassLabel(names=NAMES), iter(NAMES)],
    ids=lambda names: type(names).__name__,
)
def test_class_names_come_in_many_kinds(names: Any):
    assert ZeroShotEvaluator(ROWS, names).class_names == NAMES


@pytest.mark.parametrize("target", ["dog", 1, np.int64(1), torch.tensor(1)], ids=lambda target: type(target).__name__)
def test_a_target_is_a_class_by_its_name_or_number(target: Any):
    assert AttackSuccessEvaluator(ROWS, PATCH, target, NAMES).target == "dog"
    assert LinearProbeEvaluator(ROWS, ROWS, NAMES, trigger=PATCH, target=target).target == "dog"
    assert PoisonSuccessEvaluator(ROWS[:1], [target], NAMES).adversarial == [1]


#: One call for each kind of argument that is wrong, with what the error says.
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "synonyms": (lambda: ZeroShotEvaluator(ROWS, [["cat", "kitten"], ["dog"]]), r"class_names .* \['cat', 'kitten'\]"),
    "a dictionary of names": (lambda: ZeroShotEvaluator(ROWS, {0: "cat", 1: "dog"}), "class_names must be .* is {0: "),
    "a set of names": (lambda: ZeroShotEvaluator(ROWS, {"cat", "dog"}), "class_names must be .* but is {"),
    "a number of names": (lambda: ZeroShotEvaluator(ROWS, 2), "class_names must be .* but is 2"),
    "no templates": (lambda: ZeroShotEvaluator(ROWS, NAMES, templates=None), "templates must be .* but is None"),
    "a template without a place": (lambda: ZeroShotEvaluator(ROWS, NAMES, templates="a cat"), "has 'a cat'"),
    "a prefix": (lambda: ZeroShotEvaluator(ROWS, NAMES, prefix=None), "prefix must be a string, but is None"),
    "a column": (lambda: ZeroShotEvaluator(ROWS, NAMES, image_column=0), "image_column=0 is not a column"),
    "a target that is a share": (lambda: AttackSuccessEvaluator(ROWS, PATCH, 0.5, NAMES), "target=0.5 is not a class"),
    "a trigger's name": (lambda: AttackSuccessEvaluator(ROWS, "patch", "cat", NAMES), "trigger must be .* 'patch'"),
    "a class of triggers": (
        lambda: LinearProbeEvaluator(ROWS, ROWS, NAMES, trigger=PatchTrigger, target="cat"),
        "trigger must be .* the class PatchTrigger, not an object of it",
    ),
    "an image trigger": (
        lambda: TextQueryEvaluator(ROWS, PATCH, "cat"),
        "trigger=PatchTrigger.* must",
    ),
    "a word's name": (
        lambda: TextQueryEvaluator(ROWS, "cf", "cat"),
        "trigger='cf' must take a caption",
    ),
    "a caption's target": (
        lambda: RetrievalEvaluator(ROWS, trigger=PATCH, target=1),
        "target=1 has no word",
    ),
    "one adversary": (
        lambda: PoisonSuccessEvaluator(ROWS, "cat", NAMES),
        "adversarial must be a list .* 'cat'",
    ),
    "ks": (lambda: RetrievalEvaluator(ROWS, ks=None), "ks must be different whole numbers .* but is None"),
    "C": (lambda: LinearProbeEvaluator(ROWS, ROWS, NAMES, C="1"), "C='1' must be a positive number"),
    "a trigger's name to poison with": (lambda: PoisonSpec("patch", "cat", count=1), "trigger='patch'; .* Trigger"),
    "a class to poison with": (lambda: PoisonSpec(PatchTrigger, "cat", count=1), "trigger=the class PatchTrigger"),
    "a number to poison for": (lambda: PoisonSpec(PATCH, 3, count=1), "target=3; accepted is the name of a class"),
    "a template": (lambda: PoisonSpec(PATCH, "cat", count=1, templates="a {}"), "templates must be a list .* 'a {}'"),
    "a spec": (
        lambda: poison_dataset(PAIRS, {"target": "cat"}),
        "spec={'target': 'cat'}; accepted is a",
    ),
    "one target image": (lambda: targeted_specs("cat.jpg", ["cat"], count=1), "images must be a list .* 'cat.jpg'"),
    "one class": (
        lambda: targeted_specs([b""], "cat", count=1),
        "adversarial must be a list .* 'cat'",
    ),
    "a path": (
        lambda: replay_manifest(PAIRS, "manifest.json"),
        "manifest: 'manifest.json'; accepted is a dict",
    ),
    "views": (lambda: CLIPDataCollator(PROCESSOR, views=None), "views must be .* but is None"),
    "a name": (
        lambda: CLIPDataCollator(PROCESSOR, text_augmentation="eda"),
        "text_augmentation must be",
    ),
    "a preset": (lambda: ImageAugmentation(["weak"]), r"preset must be one of .* but is \['weak'\]"),
    "bytes to augment": (lambda: ImageAugmentation("weak")(torch.zeros(1, 3, 4, 4).byte()), "images must be floats"),
    "a preset for captions": (lambda: TextAugmentation.from_preset(None), "None; accepted: 'eda', 'light'"),
    "no caption": (lambda: TextAugmentation()(None, 0), "caption must be a string, but is None"),
    "a lexicon": (lambda: TextAugmentation(lexicon=["cat"]), "lexicon must be None or a mapping .* but is a list"),
    "features": (
        lambda: FeaturePool(2, 2).enqueue([[0.0, 1.0]]),
        r"features must be a tensor \(B, 2\), but is a",
    ),
    "words to split": (lambda: fit_similarity_mixture(["a", "b"]), "similarities must be numbers"),
    "flags": (
        lambda: PairSimilarityCallback(PAIRS, poisoned_column=None),
        "poisoned_column=None is not a col",
    ),
}
PROCESSOR = type("Both", (), {"image_processor": None, "tokenizer": None})()


@pytest.mark.parametrize("what", WRONG)
def test_an_argument_of_another_kind_is_named(what: str):
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize("part", ["tokenizer", "image_processor", None])
def test_a_part_of_a_processor_is_not_one(part: str | None, pairs, processor, tiny_model):
    given = getattr(processor, part) if part is not None else "clip"
    evaluator = AttackSuccessEvaluator(pairs, PATCH, "eight", CLASS_NAMES)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("processor", lambda: evaluator(tiny_model(), given)),
        ("processor", lambda: evaluator.check(given)),
        ("processor", lambda: Embedder(tiny_model(), given)),
        ("processor", lambda: CLIPDataCollator(given)),
        ("processor", lambda: prepare_dataset(pairs, given, "unused")),
        ("processing_class", lambda: trainer(model=tiny_model(), processing_class=given)),
    ]
    for argument, call in calls:
        with pytest.raises(ValueError, match=f"{argument} must have an image_processor and a tokenizer"):
            call()


def test_an_evaluator_takes_the_folder_of_a_model(pairs, processor, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    evaluate = ZeroShotEvaluator(pairs.select(range(20)), CLASS_NAMES)
    assert evaluate(str(tmp_path)) == evaluate(tiny_model().eval(), processor)
    with pytest.raises(ValueError, match="processor is None, and the model was given as an object"):
        evaluate(tiny_model())
    for other in (torch.nn.Linear(2, 2), None, {"logit_scale": 1}):
        with pytest.raises(ValueError, match="model must be a dual encoder"):
            evaluate(other, processor)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("evaluators", "clean_accuracy", "evaluators must be .* but is 'clean_accuracy'"),
        ("evaluators", ZeroShotEvaluator, "evaluators must be .* the class ZeroShotEvaluator"),
        ("evaluators", [ROWS], "evaluators must be .* but is a list"),
        ("callbacks", "similarities", "callbacks must be .* but has 'similarities'"),
        ("optimizers", None, "optimizers must be a pair .* but is None"),
        ("image_augmentation", ImageAugmentation, "image_augmentation must be .* the class ImageAugmentation"),
        ("text_augmentation", ["eda"], "text_augmentation must be .* but is a list"),
        ("data_collator", ROWS, "data_collator must be a CLIPDataCollator"),
    ],
)
def test_arguments_of_a_trainer_are_named(name: str, value: Any, message: str, processor, tiny_model):
    with pytest.raises(ValueError, match=message):
        trainer(model=tiny_model(), processing_class=processor, **{name: value})


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("max_length", "8", "a whole number or None"),
        ("max_logit_scale", "100", "a number"),
        ("contrastive_chunk_size", True, "a whole number of at least 1"),
        ("max_length", 8.5, "None or at least 2 tokens"),
        ("image_preset", 3, "a string"),
    ],
)
def test_a_training_argument_of_another_kind_is_named(tmp_path: Path, field: str, value: Any, accepted: str):
    with pytest.raises(ValueError, match=f"{field} must be {accepted}, but is {value!r}"):
        CLIPTrainingArguments(str(tmp_path), **{field: value})
