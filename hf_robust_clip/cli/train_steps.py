"""What `hf-robust-clip train` does: load, train, measure before and after, save, push."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from ..arguments import CLIPTrainingArguments
from ..columns import captions_of
from ..data.rows import column_values
from ..data.scratch import build_model, build_processor
from ..distributed import leave_group
from ..record import RUN_FILE, Figures, jsonable
from ..trainers.checkpoints import checkpoints_in, newest_checkpoint, sole_training
from ..trainers.defended import TRAINERS
from ..trainers.trainer import CLIPTrainer
from ..versions import versions
from ..wording import listed, shown
from .info import DEPENDENCIES
from .measuring import load_data, load_labelled, load_model, make_evaluators
from .output import UsageError, format_table, output_folder, say, usage_errors, write_json
from .progress import OnFirstStep, progress_callback
from .train_flags import check_train, training_arguments

RESULTS = "results.json"
#: What a run leaves in its folder, beside checkpoints and the card: the model, its processor, adapters, the record.
LEFT = (
    *("config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*.bin*", "training_args.bin"),
    *("adapter_config.json", "adapter_model.*", "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", RUN_FILE, RESULTS),
)
README = "README.md"
#: The attention's layers: in CLIP, SigLIP and their kin; in BERT and its kin.
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value")
PROJECTIONS = ("visual_projection", "text_projection")


def train(args: argparse.Namespace) -> int:
    """
    Train as the arguments of the sub-command say. On several processes, called on all of them; the first one prints.

    Raises:
        `UsageError`: If the arguments, the model and the data do not go together, before any step.
    """
    check_train(args)
    with usage_errors():
        arguments = training_arguments(args.method, args)
    if args.dry_run:
        if arguments.process_index == 0:
            say(args.parser.dump(args).rstrip())
        return 0
    folder = Path(args.output_dir)
    with output_folder(folder, sole_training(arguments, "--output-dir"), files=(RESULTS,)):
        _train(args, arguments, folder)
    if arguments.world_size > 1:
        leave_group()
    return 0


def _train(args: argparse.Namespace, arguments: CLIPTrainingArguments, folder: Path) -> None:
    """As [`train`], with the folder to itself."""
    first = arguments.process_index == 0
    checkpoint = _checkpoint(args, arguments, folder)
    set_seed(arguments.seed)
    trainer = _make_trainer(args, arguments, resumed=checkpoint is not None)
    if first:
        if args.overwrite:
            # Not before a step is made: a run that fails at once leaves what was there.
            trainer.add_callback(OnFirstStep(partial(_remove, _of_earlier_run(folder))))
        _announce(args, trainer, checkpoint)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if trainer.evaluators:
            trainer.evaluate()
        record = trainer.record()
        if first:
            results = {
                "method": args.method,
                "before": record.before,
                "after": record.after,
                "train": metrics,
                "versions": versions(DEPENDENCIES),
            }
            write_json(folder / RESULTS, jsonable(results))
        if arguments.push_to_hub:
            pushed = trainer.push_to_hub()  # saves as well
        else:
            trainer.save_model(str(folder))
        trainer.accelerator.wait_for_everyone()
    finally:
        trainer.accelerator.end_training()
    if first:
        for line in _outcome(record.before, record.after):
            say(line)
        say(f"\n{record.steps} steps in {record.environment.seconds:.0f} s; the model is in {folder}")
        if arguments.push_to_hub:
            say(f"It is on the Hub: {getattr(pushed, 'repo_url', None) or trainer.hub_model_id}")


def lora_config(model: Any, r: int) -> Any:
    """
    Adapters of rank `r` on the attention of both towers; the projections of the embeddings are trained whole.

    Args:
        model (`PreTrainedModel`): The dual encoder.
        r (`int`): The rank. The updates are scaled by `lora_alpha / r` = 2.

    Returns:
        `peft.LoraConfig`.
    """
    from peft import LoraConfig

    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=[name for name in ATTENTION if name in modules],
        modules_to_save=[name for name in PROJECTIONS if name in modules] or None,
    )


def _checkpoint(args: argparse.Namespace, arguments: CLIPTrainingArguments, folder: Path) -> str | None:
    """The checkpoint to go on from, if any; `UsageError` where something in the folder would be lost, or mixed up."""
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise UsageError(f"--resume-from-checkpoint: {checkpoint} is not a folder")
    if args.resume:
        checkpoint = newest_checkpoint(folder)
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return checkpoint
    if args.model is not None and _holds(folder, Path(args.model)):
        raise UsageError(
            f"--output-dir: {folder} holds --model, {args.model}, which would be replaced: give another folder"
        )
    if args.overwrite:
        return None
    earlier = checkpoints_in(folder)
    if earlier and not args.resume:
        newest = max(earlier, key=lambda path: path.stat().st_mtime)
        raise UsageError(
            f"--output-dir: {folder} holds {newest.name} of an earlier run: give another folder, --resume to go on "
            "from there, or --overwrite to start anew"
        )
    found = [path.name for path in (*_of_earlier_run(folder), folder / README) if path.is_file()]
    if found:
        raise UsageError(
            f"--output-dir: {folder} holds {listed(found)}, which this run would replace: give another folder, or "
            "--overwrite"
        )
    return checkpoint


def _holds(folder: Path, model: Path) -> bool:
    """Whether a model's files are where a run in this folder writes or deletes some."""
    folder, model = folder.resolve(), model.resolve()
    if not model.is_dir() or folder not in (model, *model.parents):
        return False
    inside = model.relative_to(folder).parts
    return not inside or folder / inside[0] in checkpoints_in(folder)


def _of_earlier_run(folder: Path) -> list[Path]:
    """What a run leaves in its folder, but for a card, which a person may have written."""
    return [*checkpoints_in(folder), *sorted(path for name in LEFT for path in folder.glob(name))]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if paths:
        say(f"Deleted of an earlier run: {listed([path.name for path in paths])}")


def _make_trainer(args: argparse.Namespace, arguments: CLIPTrainingArguments, resumed: bool) -> CLIPTrainer:
    # One process fills the caches of the Hub and of datasets, the others read them.
    with arguments.main_process_first():
        pairs = _load_training_pairs(args, arguments)
        column = args.eval_image_column or arguments.image_column
        labelled = load_labelled(args, "--eval-data", "--eval-split", column)
        model, processor = _start_from(args, arguments, pairs)
    evaluators = [] if labelled is None else make_evaluators(args, labelled)
    # Before the first step, where every kind of distributed training has the model ready.
    arguments.eval_on_start = arguments.eval_on_start or (bool(evaluators) and not resumed)
    with usage_errors():
        trainer = TRAINERS[args.method](
            model,
            arguments,
            train_dataset=pairs,
            processing_class=processor,
            evaluators=evaluators,
            peft_config=None if args.lora_r is None else lora_config(model, args.lora_r),
        )
    # These print each log as a dictionary.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if arguments.process_index == 0:
        metrics = _followed(evaluators)
        trainer.add_callback(progress_callback(trainer.recent_loss, metrics, bar=not args.disable_tqdm))
    return trainer


def _load_training_pairs(args: argparse.Namespace, arguments: CLIPTrainingArguments) -> Any:
    source, column = args.train_data, arguments.image_column
    if not args.streaming:
        return load_data("--train-data", source, args.train_split, column)
    stream = load_data("--train-data", source, args.train_split, column, streaming=True)
    return stream.shuffle(seed=arguments.order_seed, buffer_size=args.shuffle_buffer)


def _start_from(args: argparse.Namespace, arguments: CLIPTrainingArguments, pairs: Any) -> tuple[Any, Any]:
    """The model to start from, and its processor."""
    if not args.from_scratch:
        return load_model("--model", args.model)
    if arguments.caption_column not in pairs.column_names:
        raise UsageError(
            f"--caption-column: {shown(arguments.caption_column)} is not a column; the columns are "
            f"{listed(pairs.column_names)}"
        )
    column = column_values(pairs, arguments.caption_column)
    captions = [caption for value in column for caption in captions_of(value)]
    processor = build_processor(captions, image_size=args.image_size)
    return build_model(processor, vision_width=96, text_width=96, seed=arguments.seed), processor


def _followed(evaluators: list[Any]) -> dict[str, str]:
    """The figures that are shown while it trains: accuracy, and the success of each attack."""
    followed = {"eval_clean_accuracy": "clean"}
    for attack in evaluators[1:]:
        followed[f"eval_{attack.prefix}attack_success_rate"] = f"{attack.prefix.rstrip('_')} ASR"
    return followed


def _announce(args: argparse.Namespace, trainer: CLIPTrainer, checkpoint: str | None) -> None:
    data: Any = trainer.train_dataset
    pairs = f"{len(data)} pairs" if hasattr(data, "__len__") else "a stream of pairs"
    parameters = [parameter for parameter in trainer.unwrapped_model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in parameters)
    say(f"Training {args.model or 'a new model'} with {args.method} on {pairs}, {count / 1e6:.2f}M parameters")
    if args.resume or checkpoint is not None:
        say(f"From {checkpoint}" if checkpoint is not None else f"{args.output_dir} has no checkpoint: from the start")
    if not trainer.evaluators:
        say("Nothing is measured: give --eval-data, labelled images, to see what training does")


def _outcome(before: Figures | None, after: Figures | None) -> Iterator[str]:
    """The figures before and after, as a table."""
    if after is None:
        return
    rows = [["", "before", "after"]]
    for name, value in after.items():
        values = ((before or {}).get(name), value)
        rows.append([name.replace("_", " "), *("-" if known is None else f"{known:.3f}" for known in values)])
    yield ""
    yield from format_table(rows)
