"""What every trainer does: losses, the logit scale, logging, evaluation, bad rows, and errors before any step."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.training import ARGUMENTS, broken, digits, make_trainer, small_model, training_log
from transformers import BertConfig, BertModel

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CleanCLIPTrainer,
    CLIPDataCollator,
    CLIPTrainer,
    CLIPTrainingArguments,
    PatchTrigger,
    RoCLIPTrainer,
    SafeCLIPTrainer,
    TextAugmentation,
    ZeroShotEvaluator,
)
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor

BOTH = pytest.mark.parametrize("cls", [CLIPTrainer, CleanCLIPTrainer])


def evaluators(test: datasets.Dataset) -> list[Any]:
    return [
        ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES),
        AttackSuccessEvaluator(test, PatchTrigger(size=3), "eight", CLASS_NAMES, templates=CAPTION_TEMPLATES),
    ]


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_no_epochs_train_nothing(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(cls, tmp_path, num_train_epochs=0)
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.train().global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@BOTH
def test_every_parameter_is_trained(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(cls, tmp_path, max_steps=2)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    unchanged = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    # CLIP's key biases have no effect: softmax is blind to what it adds to a whole row.
    assert [name for name in unchanged if not name.endswith("k_proj.bias")] == []


def test_loss_is_the_models_own(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path)
    model = trainer.model.eval()
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    inputs = trainer._prepare_inputs(batch)
    ours = trainer.compute_loss(model, inputs)
    theirs = model(**inputs.inputs, return_loss=True).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    # Never below where it began: released models of SigLIP have 117.
    "start, end, trained",
    [(math.log(200), math.log(200), True), (-0.5, 0.0, True), (5.3, 5.3, False)],
)
def test_logit_scale_is_clamped_where_it_is_trained(start: float, end: float, trained: bool, tmp_path: Path) -> None:
    model = small_model()
    model.logit_scale.data.fill_(start)
    model.logit_scale.requires_grad_(trained)
    trainer = make_trainer(CLIPTrainer, tmp_path, model=model, max_steps=1, learning_rate=1e-8)
    trainer.train()
    assert model.logit_scale.item() == pytest.approx(end, abs=1e-6)


def test_logit_scale_is_not_decayed(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, weight_decay=0.5)
    trainer.create_optimizer()
    groups = [group for group in trainer.optimizer.param_groups if group["weight_decay"] > 0]
    assert groups
    assert all(parameter is not trainer.model.logit_scale for group in groups for parameter in group["params"])


@pytest.mark.parametrize(
    "cls, terms",
    [(CLIPTrainer, ["clip_loss"]), (CleanCLIPTrainer, ["clip_loss", "unimodal_image_loss", "unimodal_text_loss"])],
)
def test_each_term_is_logged_and_their_sum_is_the_loss(
    cls: type[CLIPTrainer], terms: list[str], tmp_path: Path
) -> None:
    trainer = make_trainer(cls, tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    for entry in training_log(trainer):
        assert sum(entry[term] for term in terms) == pytest.approx(entry["loss"], rel=1e-5)
        assert {"logit_scale", "pair_similarity"} <= entry.keys()
    assert all(entry["pairs_per_second"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_weight_of_zero_leaves_plain_finetuning(tmp_path: Path) -> None:
    trainer = make_trainer(CleanCLIPTrainer, tmp_path, max_steps=1, unimodal_weight=0.0)
    trainer.train()
    assert training_log(trainer)[0]["loss"] == pytest.approx(training_log(trainer)[0]["clip_loss"])


def test_accumulation_averages_the_small_batches(tmp_path: Path) -> None:
    # One step of SGD at rate 1 over four batches of 8 moves the weights by the mean of the four batches' gradients.
    sgd = (torch.optim.SGD, {"lr": 1.0})
    options: dict[str, Any] = {"rows": 32, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "learning_rate": 1.0}
    trainer = make_trainer(
        CLIPTrainer, tmp_path, max_steps=1, gradient_accumulation_steps=4, optimizer_cls_and_kwargs=sgd, **options
    )
    for module in trainer.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    start = copy.deepcopy(trainer.model)
    trainer.train()
    losses = []
    start.train()
    for batch in trainer.get_train_dataloader():
        losses.append(trainer.compute_loss(start, trainer._prepare_inputs(batch)))
    assert len(losses) == 4
    torch.stack(losses).mean().backward()
    for (name, moved), (_, parameter) in zip(trainer.model.named_parameters(), start.named_parameters(), strict=True):
        if name != "logit_scale":  # clamped after the step
            torch.testing.assert_close(parameter - moved, parameter.grad, rtol=1e-3, atol=1e-5)


def test_evaluators_report_as_eval_metrics_and_choose_the_best_checkpoint(tmp_path: Path) -> None:
    test = digits("test").select(range(40))
    trainer = make_trainer(
        CleanCLIPTrainer,
        tmp_path,
        evaluators=evaluators(test),
        eval_dataset={"first": test, "second": test.select(range(5))},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="attack_success_rate",
        greater_is_better=False,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_attack_success_rate" in entry]
    assert len(evaluations) == 3  # once an epoch, not once a dataset
    assert trainer.state.best_metric == min(entry["eval_attack_success_rate"] for entry in evaluations)
    metrics = trainer.evaluate()
    names = ("clean_accuracy", "attack_success_rate", "triggered_accuracy", "trigger_distance")
    assert {f"eval_{name}" for name in names} | {"eval_first_loss", "eval_second_loss"} <= metrics.keys()
    assert metrics["eval_attack_success_rate"] == pytest.approx(trainer.state.best_metric)


def test_evaluators_need_no_eval_dataset(tmp_path: Path) -> None:
    test = digits("test").select(range(20))
    trainer = make_trainer(
        CLIPTrainer, tmp_path, evaluators=evaluators(test), eval_strategy="steps", eval_steps=4, max_steps=4
    )
    trainer.train()
    assert "eval_clean_accuracy" in trainer.evaluate(metric_key_prefix="eval")
    assert "test_clean_accuracy" in trainer.evaluate(metric_key_prefix="test")


def test_evaluating_during_training_changes_nothing(tmp_path: Path) -> None:
    test = digits("test").select(range(20))
    plain = make_trainer(CleanCLIPTrainer, tmp_path, max_steps=4)
    plain.train()
    watched = make_trainer(
        CleanCLIPTrainer,
        tmp_path,
        max_steps=4,
        evaluators=evaluators(test),
        eval_dataset=test,
        eval_strategy="steps",
        eval_steps=1,
    )
    watched.train()
    assert training_log(plain) == training_log(watched)


def test_eval_loss_covers_every_row_un_augmented(tmp_path: Path) -> None:
    test = digits("test").select(range(11))
    trainer = make_trainer(CleanCLIPTrainer, tmp_path, eval_dataset=test, per_device_eval_batch_size=16)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    whole = next(iter(trainer.get_eval_dataloader()))
    assert whole["pixel_values"].shape[0] == whole["input_ids"].shape[0] == 11


def test_bfloat16_autocast_keeps_the_loss_in_float32(tmp_path: Path) -> None:
    full = make_trainer(CleanCLIPTrainer, tmp_path, max_steps=2)
    full.train()
    half = make_trainer(CleanCLIPTrainer, tmp_path, max_steps=2, bf16=True)
    half.train()
    assert half.model.logit_scale.dtype == torch.float32
    for one, two in zip(training_log(full), training_log(half), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)
        assert one["loss"] != two["loss"]


def test_iterable_dataset(tmp_path: Path) -> None:
    stream = digits().select(range(40)).to_iterable_dataset(num_shards=2)
    trainer = make_trainer(CleanCLIPTrainer, tmp_path, train_dataset=stream, max_steps=12, dataloader_num_workers=2)
    trainer.train()
    assert trainer.state.global_step == 12


def test_any_columns_and_several_captions(tmp_path: Path) -> None:
    rows = digits().select(range(32))
    captions = [[caption, caption.upper()] for caption in rows["caption"]]
    data = rows.remove_columns("caption").add_column("texts", captions).rename_column("image", "picture")
    trainer = make_trainer(
        CleanCLIPTrainer, tmp_path, train_dataset=data, image_column="picture", caption_column="texts", max_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_custom_and_no_augmentation(tmp_path: Path) -> None:
    seen: list[torch.Size] = []

    def augment(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape)
        return images.flip(-1)

    make_trainer(CleanCLIPTrainer, tmp_path, image_augmentation=augment, max_steps=1).train()
    assert seen == [torch.Size([8, 3, 16, 16])]
    trainer = make_trainer(
        CleanCLIPTrainer, tmp_path, image_augmentation="identity", text_augmentation="identity", max_steps=1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    first, second = trainer._prepare_inputs(batch).inputs["pixel_values"].chunk(2)
    assert torch.equal(first, second)
    assert torch.equal(*batch["input_ids"].chunk(2))


def test_bad_row_raises_and_names_it(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, train_dataset=broken())
    with pytest.raises(ValueError, match=r"row (3|17), column 'image': the image does not decode"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_skipped_and_listed(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(
        CLIPTrainer,
        tmp_path,
        train_dataset=broken(),
        on_bad_row="skip",
        num_train_epochs=1,
        dataloader_num_workers=workers,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.skipped_rows == [3, 17]
    assert "Unusable rows of train_dataset were skipped, 2: 3, 17" in caplog.text


def test_bad_rows_of_an_eval_dataset_are_no_rows_of_the_training_set(tmp_path: Path) -> None:
    trainer = make_trainer(CLIPTrainer, tmp_path, eval_dataset=broken(), on_bad_row="skip", max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert trainer.skipped_rows == []


def test_stream_drops_the_batch_that_falls_short(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Watched(CLIPTrainer):
        def loss_components(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
            sizes.append(len(batch.inputs["pixel_values"]))
            return super().loss_components(views, scale, batch)

    stream = digits().select(range(19)).to_iterable_dataset()
    make_trainer(Watched, tmp_path, train_dataset=stream, max_steps=5).train()
    assert sizes == [8] * 5


def test_stream_without_a_batch_is_an_error(tmp_path: Path) -> None:
    stream = digits().select(range(5)).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset yielded no full batch"):
        make_trainer(CLIPTrainer, tmp_path, train_dataset=stream, max_steps=2).train()


def test_half_precision_checkpoint_is_loaded_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    digit_processor().save_pretrained(tmp_path / "half")
    trainer = make_trainer(CLIPTrainer, tmp_path, model=str(tmp_path / "half"), processing_class=None)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    make_trainer(CLIPTrainer, tmp_path, model=small_model().to(torch.bfloat16))
    assert "trained parameters are torch.bfloat16" in caplog.text


def test_weights_that_an_evaluation_left_in_half_precision_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "rows": 8,
        "max_steps": 1,
        "bf16_full_eval": True,
        "eval_dataset": digits().select(range(2)),
    }
    for evaluated_before in (False, True):
        trainer = make_trainer(CLIPTrainer, tmp_path, **options)
        if evaluated_before:
            trainer.evaluate()
        assert "trained parameters are" not in caplog.text
        trainer.train()
    assert "trained parameters are torch.bfloat16" in caplog.text and "leave out bf16_full_eval" in caplog.text


def test_evaluators_that_report_the_same_name_are_refused(tmp_path: Path) -> None:
    test = digits("test").select(range(20))
    trainer = make_trainer(CLIPTrainer, tmp_path, evaluators=[*evaluators(test), evaluators(test)[1]])
    with pytest.raises(ValueError, match="two evaluators report 'attack_success_rate'"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_column": "picture"}, r"image_column='picture' is not a column of train_dataset.*'image'"),
        ({"caption_column": "label"}, r"caption_column='label' of train_dataset must hold strings"),
        ({"train_dataset": datasets.Dataset.from_dict({"image": [], "caption": []})}, "train_dataset is empty"),
        ({"rows": 5}, "train_dataset has 5 rows, fewer than one batch of 8"),
        ({"model": BertModel(BertConfig(num_hidden_layers=1))}, "BertModel has no get_image_features"),
        ({"processing_class": None}, "processing_class is None"),
        ({"image_augmentation": "cubist"}, "preset must be one of 'identity'.*'cubist'"),
        ({"text_augmentation": "poem"}, "text augmentation preset 'poem'"),
        ({"image_preset": "cubist"}, "image_preset must be one of.*'cubist'"),
        ({"text_preset": "poem"}, "text_preset must be one of.*'poem'"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy must be one of 'random', 'sequential', but is 'group_by_length'",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, "but is 'batch_rebalance'"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None, but is 5.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0, but is 0.1"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be one of 'raise', 'skip', but is 'ignore'"),
        ({"max_logit_scale": 0.5}, "max_logit_scale must be at least 1"),
        ({"max_logit_scale": math.nan}, "max_logit_scale must be at least 1, but is nan"),
        ({"max_length": 1}, "max_length must be None or at least 2"),
        ({"unimodal_weight": -1.0}, "unimodal_weight must be at least 0"),
        ({"processing_class": digit_processor().image_processor}, "processing_class must have an image_processor and"),
        ({"data_collator": print}, "data_collator must be a CLIPDataCollator"),
        (
            {"data_collator": CLIPDataCollator(digit_processor(), caption_column="text")},
            "caption_column is 'caption' in args, but 'text' in data_collator",
        ),
        (
            {"data_collator": CLIPDataCollator(digit_processor(), views=("original", "augmented"))},
            "text_augmentation is TextAugmentation.*but None in data_collator.*None of data_collator is 'identity'",
        ),
        (
            {"train_dataset": datasets.Dataset.from_dict({"image": [b""] * 9, "caption": ["a"] * 4 + [None] * 5})},
            "row 4 of train_dataset, column 'caption': a caption must be a string, but is None",
        ),
        (
            {"evaluators": [AttackSuccessEvaluator(digits("test"), PatchTrigger(size=64), "eight", CLASS_NAMES)]},
            "64",
        ),
    ],
)
def test_bad_arguments_are_refused_before_training(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(CleanCLIPTrainer, tmp_path, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches=True .* set it to"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches=True .* set it to False"),
        (
            {"accelerator_config": {"even_batches": False}, "dataloader_drop_last": False},
            "even_batches=False and dataloader_drop_last=False leave 2 processes .* set one of them to True",
        ),
    ],
)
def test_what_deals_unequal_batches_is_refused_above_one_process(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(CLIPTrainer, tmp_path, **change)
    monkeypatch.setattr(CLIPTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=message):
        make_trainer(CLIPTrainer, tmp_path, **change)


def shout(caption: str, seed: int) -> str:
    return caption.upper()


def collator(*views: str, **given: Any) -> CLIPDataCollator:
    return CLIPDataCollator(digit_processor(), views=views, **given)


@pytest.mark.parametrize(
    "cls, own, change, message",
    [
        (CleanCLIPTrainer, collator("original"), {}, r"give it views=\('original', 'augmented'\)"),
        (
            CleanCLIPTrainer,
            collator("augmented", "original", text_augmentation=TextAugmentation()),
            {},
            r"give it views=\('original', 'augmented'\)",
        ),
        (SafeCLIPTrainer, collator("original", "b", text_augmentation=TextAugmentation()), {}, "give it views="),
        (RoCLIPTrainer, collator("original"), {"text_augmentation": "eda"}, r"give it views=\('augmented',\)"),
        (CLIPTrainer, collator("original"), {"text_augmentation": "light"}, "give it views="),
        (
            RoCLIPTrainer,
            collator("b", text_augmentation=TextAugmentation()),
            {"text_augmentation": "light"},
            "but TextAugmentation.* in data_collator, which augments captions",
        ),
        (CLIPTrainer, collator("b", text_augmentation=TextAugmentation()), {"text_augmentation": "identity"}, "None"),
        (CLIPTrainer, collator("original"), {"max_length": 4}, "max_length is 4 in args, but 16 in data_collator"),
    ],
)
def test_own_collator_that_is_not_what_the_trainer_needs_is_refused(
    cls: type[CLIPTrainer], own: CLIPDataCollator, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(cls, tmp_path, data_collator=own, **change)
    assert len(str(caught.value)) <= 600


def test_own_collator_that_only_evaluates_needs_no_views_of_training(tmp_path: Path) -> None:
    rows = digits().select(range(8))
    trainer = make_trainer(
        CleanCLIPTrainer, tmp_path, train_dataset=None, eval_dataset=rows, data_collator=collator("original")
    )
    assert trainer.evaluate()["eval_loss"] > 0


def test_own_collator_of_one_view_leaves_captions_as_they_are_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for cls, change in ((RoCLIPTrainer, {}), (CLIPTrainer, {"text_preset": "light"})):
        caplog.clear()
        trainer = make_trainer(cls, tmp_path, data_collator=collator("original"), **change)
        assert "text_preset='" in caplog.text and "is not used" in caplog.text
        assert trainer.record().augmentation.captions is None


@pytest.mark.parametrize(
    "cls, own, change",
    [
        (CLIPTrainer, collator("original"), {}),
        (CLIPTrainer, collator("original"), {"image_augmentation": "weak", "max_length": 16}),
        (CLIPTrainer, collator("b", text_augmentation=shout), {}),
        (RoCLIPTrainer, collator("original"), {"text_augmentation": "identity"}),
        (CLIPTrainer, collator("b", text_augmentation=shout).with_views(("original",)), {}),
        (RoCLIPTrainer, collator("b", text_augmentation=shout), {}),
        (CleanCLIPTrainer, collator("original", "b", text_augmentation=TextAugmentation()), {"text_preset": "light"}),
        (SafeCLIPTrainer, collator("a", "b", text_augmentation=TextAugmentation()), {"text_augmentation": "eda"}),
        (SafeCLIPTrainer, collator("original", "b"), {"text_augmentation": "identity"}),
    ],
)
def test_own_collator_augments_captions(
    cls: type[CLIPTrainer], own: CLIPDataCollator, change: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(cls, tmp_path, data_collator=own, **change)
    trainer.step.prepared(trainer.receive(own([{**digits()[row], "row_index": row} for row in range(4)])), True)
    augmentation = own.augmentation
    expected = {None: None, shout: "shout"}.get(augmentation, repr(augmentation))
    assert trainer.record().augmentation.captions == expected


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_every_trainer_shows_its_whole_signature(cls: type[CLIPTrainer]) -> None:
    parameters = inspect.signature(cls).parameters
    assert parameters == inspect.signature(CLIPTrainer).parameters
    assert all(item.kind is item.POSITIONAL_OR_KEYWORD for item in parameters.values())


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_arguments_may_be_left_out(cls: type[CLIPTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = cls(small_model(), train_dataset=digits().select(range(600)), processing_class=digit_processor())
    assert type(trainer.args) is ARGUMENTS[cls] and trainer.args.output_dir == "tmp_trainer"


@pytest.mark.parametrize("cls", [CleanCLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer])
def test_arguments_of_another_trainer_are_refused(cls: type[CLIPTrainer], tmp_path: Path) -> None:
    args = CLIPTrainingArguments(str(tmp_path), use_cpu=True)
    message = f"args must be a {ARGUMENTS[cls].__name__}, but is CLIPTrainingArguments"
    with pytest.raises(ValueError, match=message):
        cls(small_model(), args, processing_class=digit_processor())


@pytest.mark.parametrize(
    "name, instead",
    [
        ("compute_metrics", "evaluators="),
        ("preprocess_logits_for_metrics", "evaluators="),
        ("compute_loss_func", "loss_components"),
        ("model_init", "model="),
        ("tokenizer", "processing_class="),
        ("image_processor", "processing_class="),
    ],
)
def test_arguments_of_the_stock_trainer_have_a_hint(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"{name}= is not an argument of RoCLIPTrainer: .*{instead}"):
        RoCLIPTrainer(small_model(), **{name: print})
    with pytest.raises(TypeError, match="no_such_argument"):
        RoCLIPTrainer(small_model(), no_such_argument=1)


def test_one_evaluator_needs_no_list(tmp_path: Path) -> None:
    one = evaluators(digits("test").select(range(20)))[0]
    figures = [make_trainer(CLIPTrainer, tmp_path, evaluators=given).run_evaluators() for given in (one, [one])]
    assert figures[0] == figures[1] and "clean_accuracy" in figures[0]


def test_stock_training_arguments_are_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="args must be a CLIPTrainingArguments"):
        CLIPTrainer(small_model(), TrainingArguments(str(tmp_path)), processing_class=digit_processor())


def test_help_of_every_argument_formats() -> None:
    from transformers import HfArgumentParser

    from hf_robust_clip import CleanCLIPTrainingArguments

    for arguments in (CLIPTrainingArguments, CleanCLIPTrainingArguments):
        text = HfArgumentParser(arguments).format_help()
        assert "--image_preset" in text
