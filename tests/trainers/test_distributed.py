"""Several processes train as one with the whole batch, resume to the bit, and measure the same to the last digit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from support.engines import fsdp
from support.families import siglip
from support.forks import run_forked
from support.processes import (
    OTHERS,
    SPLIT,
    TRAINERS,
    WORLD,
    Aligned,
    assert_state,
    few_steps,
    group_threads,
    ranks_agree,
    state_of,
    suspects,
)
from support.training import (
    assert_same_bits,
    broken,
    digits,
    make_trainer,
    poisoned_pairs,
    small_model,
    train_and_resume,
    training_log,
)

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CleanCLIPTrainer,
    CLIPTrainer,
    LinearProbeEvaluator,
    PairSimilarityCallback,
    PARTrainer,
    PatchTrigger,
    RetrievalEvaluator,
    RoCLIPTrainer,
    SafeCLIPTrainer,
    TextQueryEvaluator,
    UnbindTrainer,
    ZeroShotEvaluator,
    scan_pairs,
)
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor
from hf_robust_clip.data.sampling import unpack_mask
from hf_robust_clip.distributed import leave_group, rank
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.losses import (
    MATCHINGS,
    cleanclip_loss,
    clip_loss,
    par_loss,
    roclip_loss,
    safeclip_cross_loss,
    safeclip_unimodal_loss,
    sigmoid_loss,
)

ROWS, DIM = 6, 5
#: Ways to the same batch of 16 in two processes: the batch of each, and arguments.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "": (8, {}),
    ", in chunks": (8, {"contrastive_chunk_size": 3}),
    ", accumulated": (
        4,
        {"gradient_accumulation_steps": 2, "accumulate_negatives": True, "contrastive_chunk_size": 3},
    ),
}
#: With the weights divided among the processes.
SHARDED: dict[str, dict[str, Any]] = {"": {}, ", in chunks": {"contrastive_chunk_size": 3}}
#: From which of these steps others go on: with a pool that has moved, in a matching epoch, and in the second split.
CHECKPOINTS = {UnbindTrainer: 2, RoCLIPTrainer: 2, SafeCLIPTrainer: 6}
#: In two batches of 8 a step: RoCLIP's second epoch matches, SafeCLIP's third and fourth are split.
RESUMED: dict[str, tuple[type[CLIPTrainer], int, dict[str, Any]]] = {
    "CLIPTrainer": (CLIPTrainer, 3, {"num_train_epochs": 2}),
    "CleanCLIPTrainer, 2 workers": (CleanCLIPTrainer, 3, {"num_train_epochs": 2, "dataloader_num_workers": 2}),
    "PARTrainer": (PARTrainer, 3, {"num_train_epochs": 2}),
    "UnbindTrainer": (UnbindTrainer, 3, {"num_train_epochs": 2, "adversary": "universal"}),
    "RoCLIPTrainer": (RoCLIPTrainer, 6, {"num_train_epochs": 2}),
    "SafeCLIPTrainer": (SafeCLIPTrainer, 10, {"num_train_epochs": 4, **SPLIT}),
}


def losses_of(
    embeds: list[torch.Tensor], scale: torch.Tensor, bias: torch.Tensor, pools: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every loss of the package on the same embeddings, with negatives from all ranks."""
    first, second = embeds[:2], embeds[2:]
    terms = {
        "cleanclip": cleanclip_loss(*first, *second, scale, gather=True),
        # All images together are above the threshold; those of the first rank alone are below.
        "par": par_loss(*first, *second, scale, threshold=2.15, gather=True),
        "roclip_cross": roclip_loss(*first, scale, *pools, matching="cross", gather=True),
        "roclip_image_to_text": roclip_loss(*first, scale, *pools, matching="image_to_text", gather=True),
        "roclip_unimodal": roclip_loss(*first, scale, *pools, matching="unimodal", gather=True),
        "safeclip_unimodal": safeclip_unimodal_loss(*first, *second, scale, *pools, gather=True),
        "safeclip_cross": safeclip_cross_loss(*first, *second, scale, gather=True),
        "cleanclip_sigmoid": cleanclip_loss(*first, *second, scale, gather=True, bias=bias),
        "roclip_sigmoid": roclip_loss(*first, scale, *pools, matching="cross", gather=True, bias=bias),
        "safeclip_cross_sigmoid": safeclip_cross_loss(*first, *second, scale, gather=True, bias=bias),
    }
    summed = {name: torch.stack(list(parts.values())).sum() for name, parts in terms.items()}
    sigmoid = sigmoid_loss(*first, scale, bias, gather=True)
    return {"clip": clip_loss(*first, scale, gather=True), "sigmoid": sigmoid, **summed}


def example() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Embeddings of the whole batch, a tower's weight that all of them went through, and the log of the scale."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(WORLD * ROWS, DIM, generator=generator, dtype=torch.float64) for _ in range(4)]
    pools = [torch.randn(20, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
    return inputs, pools, torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)


def gradients(rows: slice) -> dict[str, list[torch.Tensor]]:
    """The gradients of a shared tower, of the log scale and of the bias, for each loss on these rows of the batch."""
    inputs, pools, start = example()
    grads = {}
    for name in losses_of(inputs, torch.tensor(1.0), torch.tensor(0.0), pools):
        weight = start.clone().requires_grad_()
        log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        embeds = [torch.nn.functional.normalize(part[rows] @ weight, dim=1) for part in inputs]
        bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
        losses_of(embeds, log_scale.exp(), bias, pools)[name].backward()
        grads[name] = [leaf.grad for leaf in (weight, log_scale, bias) if leaf.grad is not None]
    return grads


def gradients_of_ranks() -> dict[str, list[torch.Tensor]]:
    """Those of each rank's rows, averaged as DDP does."""
    grads = gradients(slice(rank() * ROWS, (rank() + 1) * ROWS))
    for parts in grads.values():
        for grad in parts:
            torch.distributed.all_reduce(grad)
            grad /= WORLD
    return grads


def assert_gradients(found: dict[str, list[torch.Tensor]]) -> None:
    expected = gradients(slice(None))
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        for one, two in zip(parts, found[name], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.longest
def test_trainers_in_several_processes(tmp_path: Path) -> None:
    run_forked(__file__, tmp_path, two=WORLD, four=4)
    assert_gradients(torch.load(tmp_path / "gradients.pt"))
    for cls in TRAINERS:
        expected = state_of(few_steps(cls, tmp_path / "one", batch=16))
        for variant in (*VARIANTS, *(f", sharded{variant}" for variant in SHARDED), ", four"):
            if variant == ", accumulated" and cls in (RoCLIPTrainer, SafeCLIPTrainer):
                continue  # the rows come in another order, which pools and splits follow
            assert_state(torch.load(tmp_path / f"{cls.__name__}{variant}.pt"), expected, f"{cls.__name__}{variant}")
        # Of two processes, in one.
        if cls in CHECKPOINTS:
            checkpoint = tmp_path / "two" / cls.__name__ / f"checkpoint-{CHECKPOINTS[cls]}"
            resumed = few_steps(cls, tmp_path / "resumed", batch=16, checkpoint=checkpoint)
            assert_state(state_of(resumed), expected, f"{cls.__name__}, resumed in one process")
    for name, (cls, given) in OTHERS.items():
        expected = state_of(few_steps(cls, tmp_path / "one", batch=16, **given))
        for variant in ("", ", in chunks", ", sharded in chunks") if cls is CLIPTrainer else ("",):
            assert_state(torch.load(tmp_path / f"{name}{variant}.pt"), expected, f"{name}{variant}")
    assert 1 / 3 < unpack_mask(torch.load(tmp_path / "SafeCLIPTrainer.pt")["splits.bits"], 80).mean() < 2 / 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["resumed_equals_uninterrupted"] == dict.fromkeys(RESUMED, True)
    assert (
        report["sharded_resumed_equals_uninterrupted"] and report["sharded_figures"] == report["sharded_figures_after"]
    )
    assert report["ranks_agree"] == {
        **dict.fromkeys([cls.__name__ + variant for cls in TRAINERS for variant in VARIANTS], True),
        **dict.fromkeys([f"{name}, resumed" for name in RESUMED], True),
        "measured before": True,
    }
    assert report["ranks_take_the_same_kinds"]
    assert report["kinds"] == [
        "clip_loss",
        "image_to_text_loss, text_to_image_loss",
        "unimodal_image_loss, unimodal_text_loss",
    ]
    assert report["matching_steps"] == {matching: [False, False, True, True] for matching in MATCHINGS}
    assert report["steps_without_a_scale"] == 2
    assert report["skipped_rows"] == [3, 17]
    assert report["figures_agree"] and report["similarities_agree"]
    figures = one_process_figures(tmp_path / "one")
    assert report["figures"] == figures and len(figures) > 30
    loss = eval_loss(tmp_path / "one", digits("test").select(range(21)), 21)
    assert report["eval_losses"] == pytest.approx([loss] * len(evaluated()), rel=1e-6)
    assert report["similarities"] == 3
    assert report["failures"] == [
        "RuntimeError: rank 1 could not embed its share: ValueError: row 9 of the evaluation images, column 'image'",
        "ValueError: row 9 of the evaluation images, column 'image'",
    ]
    for name, given in suspects().items():
        expected = state_of(few_steps(PARTrainer, tmp_path / "one", batch=16, **given))
        for variant in (name, f"{name}, sharded"):
            assert_state(torch.load(tmp_path / f"{variant}.pt"), expected, variant)
    assert report["scans_agree"]
    for name, scores in scanned(None).items():
        for column, values in scores.items():
            assert report["scans"][name][column] == pytest.approx(values, rel=1e-3, abs=1e-3), (name, column)
    # A pass ends on both ranks with the shard of 27 rows. CleanCLIP's batches have two views of each.
    assert report["streamed"] == {
        "own shards": [[8, 8, 8, 8, 8]] * WORLD,
        "own shards, last batches too": [[16, 16, 16, 6, 16, 16]] * WORLD,
        "own rows": [[8, 8, 8, 8, 8]] * WORLD,
    }


def measuring_trainer(output: Path) -> CLIPTrainer:
    """With evaluators of every kind; batches of 8 of 21, 20, 7 and 1 images."""
    test, train = digits("test").select(range(21)), digits().select(range(20))
    options: dict[str, Any] = {"class_names": CLASS_NAMES, "templates": CAPTION_TEMPLATES}
    patch = PatchTrigger(size=3)
    evaluators = [
        ZeroShotEvaluator(test, **options),
        AttackSuccessEvaluator(test, patch, "eight", **options),
        AttackSuccessEvaluator(test, BlendedTrigger(), "eight", prefix="blended_", **options),
        RetrievalEvaluator(test, trigger=patch, target="eight"),
        TextQueryEvaluator(test, lambda caption: f"cf {caption}", "eight"),
        LinearProbeEvaluator(train, test, CLASS_NAMES, trigger=patch, target="eight"),
        ZeroShotEvaluator(test.select(range(7)), prefix="few", **options),
        ZeroShotEvaluator(test.select([3]), prefix="one", **options),
        lambda model, processor, embedder: {"plain": embedder.embed_images(train).sum().item()},
    ]
    return make_trainer(CLIPTrainer, output, evaluators=evaluators, per_device_eval_batch_size=8)


def one_process_figures(output: Path) -> dict[str, float]:
    """With as many threads as each of the launched processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        metrics = measuring_trainer(output).evaluate()
    finally:
        torch.set_num_threads(threads)
    return without_times(metrics)


def evaluated() -> list[tuple[Any, int]]:
    """The same 21 rows in several ways, each with the size of a process's batches."""
    test = digits("test").select(range(21))
    return [(test, 8), (test, 1), (test.to_iterable_dataset(), 8), (test.to_iterable_dataset(num_shards=2), 8)]


def eval_loss(output: Path, data: Any, batch_size: int) -> float:
    trainer = make_trainer(CLIPTrainer, output, eval_dataset=data, per_device_eval_batch_size=batch_size)
    return float(trainer.evaluate()["eval_loss"])


def scanned(folder: Path | None) -> dict[str, dict[str, list[float]]]:
    """The scores of pairs whose sample has all of them, and of pairs that are read once more."""
    found = {}
    for name, most in (("at once", 50_000), ("in two passes", 80)):
        with mock.patch.multiple("hf_robust_clip.scanning.pairs", SAMPLE=most, BLOCK=24):
            place = None if folder is None else folder / name
            pairs = digits().select(range(100))
            scan = scan_pairs(small_model(0), digit_processor(), pairs, batch_size=8, cache_dir=place)
            scan = scan.verified(pairs, small_model(1), digit_processor(), batch_size=8)
        columns = ("group", "slof", "distrust", "rank", "cleaned_distance")
        found[name] = {column: scan.scores[column][:] for column in columns}
    return found


def save_suspects(output: Path, kind: str = "") -> None:
    for name, given in suspects().items():
        trainer = few_steps(PARTrainer, output / "suspects", 8, **given)
        state = state_of(trainer)
        if trainer.is_world_process_zero():
            torch.save(state, output / f"{name}{kind}.pt")


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_time", "_per_second"))}


def same_on_ranks(value: object) -> bool:
    return len(set(gather_object([repr(value)]))) == 1


def failure(broken_row: int) -> str:
    """What a rank raises when an image cannot be read that one of them embeds."""
    rows = [{"image": b"" if row == broken_row else digits()[row]["image"]} for row in range(21)]
    try:
        Embedder(small_model(), digit_processor(), batch_size=8, across_ranks=True).embed_images(rows)
    except Exception as error:
        return f"{type(error).__name__}: {error}".rsplit(": the image", 1)[0]
    return "none"


def sharded(output: Path) -> dict[str, Any]:
    """Everything that needs the weights divided among the processes."""
    from torch.distributed.fsdp import FSDPModule

    for cls in TRAINERS:
        for variant, given in SHARDED.items():
            trainer = few_steps(cls, output / "sharded", 8, **given)
            assert isinstance(trainer.model, FSDPModule)
            state = state_of(trainer)
            if trainer.is_world_process_zero():
                torch.save(state, output / f"{cls.__name__}, sharded{variant}.pt")
    save_suspects(output, ", sharded")
    for name, (cls, given) in OTHERS.items():
        if cls is CLIPTrainer:
            layer = "SiglipEncoderLayer" if given.get("family") is siglip else "CLIPEncoderLayer"
            with mock.patch.dict(os.environ, {"FSDP_TRANSFORMER_CLS_TO_WRAP": layer}):
                trainer = few_steps(cls, output / "sharded", 8, contrastive_chunk_size=3, **given)
            state = state_of(trainer)
            if trainer.is_world_process_zero():
                torch.save(state, output / f"{name}, sharded in chunks.pt")
    evaluator = ZeroShotEvaluator(digits("test").select(range(21)), CLASS_NAMES, templates=CAPTION_TEMPLATES)
    options: dict[str, Any] = {"num_train_epochs": 4, "evaluators": [evaluator], "eval_strategy": "epoch", **SPLIT}
    pair = train_and_resume(SafeCLIPTrainer, output / "sharded-resumed", step=10, **options)
    states = [state_of(trainer) for trainer in pair]
    figure = "eval_clean_top5_accuracy"
    return {
        "sharded_resumed_equals_uninterrupted": training_log(pair[0]) == training_log(pair[1])
        and all(torch.equal(value.nan_to_num(), states[1][name].nan_to_num()) for name, value in states[0].items()),
        "sharded_figures": [entry[figure] for entry in pair[1].state.log_history if figure in entry][-1],
        "sharded_figures_after": pair[1].run_evaluators()["clean_top5_accuracy"],
    }


def four(output: Path) -> None:
    """What four processes do: the same steps, and those after a checkpoint of two processes. They leave no thread."""
    steps_of_four(output)
    assert group_threads()
    leave_group()
    assert not group_threads()


def steps_of_four(output: Path) -> None:
    for cls in TRAINERS:
        step = CHECKPOINTS.get(cls)
        checkpoint = output / "two" / cls.__name__ / f"checkpoint-{step}" if step else None
        trainer = few_steps(cls, output / "four", 4, checkpoint)
        state = state_of(trainer)
        if trainer.is_world_process_zero():
            torch.save(state, output / f"{cls.__name__}, four.pt")


def two(output: Path) -> None:
    """What two processes do, in one launch."""
    from support.recording import RecordedRoCLIP, RecordedSafeCLIP
    from support.streaming import STREAMED

    report: dict[str, Any] = {"resumed_equals_uninterrupted": {}, "ranks_agree": {}, "matching_steps": {}}
    main = PartialState().is_main_process  # joins the other process
    averaged = gradients_of_ranks()
    if main:
        torch.save(averaged, output / "gradients.pt")
    for cls in TRAINERS:
        for variant, (batch, given) in VARIANTS.items():
            saving = {"save_strategy": "steps", "save_steps": CHECKPOINTS[cls]} if cls in CHECKPOINTS else {}
            trainer = few_steps(cls, output / f"two{variant}" / cls.__name__, batch, **saving, **given)
            report["ranks_agree"][cls.__name__ + variant] = ranks_agree(trainer)
            state = state_of(trainer)
            if main:
                torch.save(state, output / f"{cls.__name__}{variant}.pt")
    save_suspects(output)
    for name, (cls, given) in OTHERS.items():
        for chunks, size in (("", None), (", in chunks", 3)) if cls is CLIPTrainer else (("", None),):
            options = {**given, "contrastive_chunk_size": size, "ddp_find_unused_parameters": False}
            trainer = few_steps(cls, output / "others", 8, **options)
            assert ranks_agree(trainer), name
            if main:
                torch.save(state_of(trainer), output / f"{name}{chunks}.pt")
    measured = make_trainer(CLIPTrainer, output / "measured", rows=32, eval_dataset=digits("test").select(range(9)))
    measured.evaluate()
    measured.train()
    report["ranks_agree"]["measured before"] = ranks_agree(measured)
    for name, (cls, step, options) in RESUMED.items():
        pair = train_and_resume(cls, output / name, step=step, **options)
        assert_same_bits(*pair)
        report["resumed_equals_uninterrupted"][name] = True
        report["ranks_agree"][f"{name}, resumed"] = ranks_agree(pair[1])
    phases = make_trainer(RecordedSafeCLIP, output / "phases", rows=80, num_train_epochs=4, **SPLIT)
    phases.train()
    kinds = [", ".join(sorted(step.terms)) for step in phases.steps]
    report["ranks_take_the_same_kinds"] = len(set(gather_object([tuple(kinds)]))) == 1
    report["kinds"] = sorted(set(kinds))
    for matching in MATCHINGS:
        trainer = make_trainer(
            RecordedRoCLIP,
            output / "matching",
            max_steps=4,
            matching=matching,
            matching_start_epoch=0,
            # In unimodal matching DDP waits for towers whose gradient is zero, computed again or not.
            gradient_checkpointing=matching != "cross",
            ddp_find_unused_parameters=False,
        )
        trainer.train()
        report["matching_steps"][matching] = ["image_match_loss" in step.terms for step in trainer.steps]
    trainer = make_trainer(
        CLIPTrainer, output / "aligned", max_steps=2, defence=Aligned(), gradient_checkpointing=True
    )
    report["steps_without_a_scale"] = trainer.train().global_step
    trainer = make_trainer(
        CLIPTrainer, output / "bad", train_dataset=broken(), on_bad_row="skip", per_device_train_batch_size=4
    )
    trainer.train()
    report["skipped_rows"] = trainer.skipped_rows
    report["figures"] = without_times(measuring_trainer(output / "eval").evaluate())
    report["figures_agree"] = same_on_ranks(report["figures"])
    report["eval_losses"] = [eval_loss(output / "eval", data, size) for data, size in evaluated()]
    report["failures"] = gather_object([failure(broken_row=9)])
    pairs = poisoned_pairs(32)
    followed = PairSimilarityCallback(pairs)
    trainer = make_trainer(CLIPTrainer, output / "followed", train_dataset=pairs, callbacks=[followed], max_steps=4)
    trainer.train()
    report["similarities"] = len(followed.records)
    report["similarities_agree"] = same_on_ranks(followed.records)
    report["scans"] = scanned(output / "scans")
    report["scans_agree"] = same_on_ranks(report["scans"])
    report["streamed"] = {}
    for name, (cls, make, options) in STREAMED.items():
        pair = train_and_resume(cls, output / name, train_dataset=make(), **options)
        assert_same_bits(*pair)
        assert ranks_agree(pair[1])
        sizes = [int(batch[0]) for batch in pair[0].seen]
        assert pair[1].seen == pair[0].seen[options["step"] :]
        report["streamed"][name] = gather_object([sizes])
    with fsdp():
        report.update(sharded(output))
    if main:
        (output / "report.json").write_text(json.dumps(report))
    leave_group()  # as a script does; FSDP's caches hold the group's threads until the process ends
