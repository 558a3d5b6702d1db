"""
Pre-train with RoCLIP on a dataset that is read as a stream, and never is on disk as a whole.

    python examples/streaming.py --model my-untrained-clip --pairs you/pairs-from-the-web \
        --images you/labelled-images --target banana --output_dir robust --max_steps 100000

With `--poison_rate 0.003` a backdoor for the target is planted as the stream is read; `--key_column` then names a
column of integers or strings that tells rows apart, which streams of several files need. On a few digits, in seconds:

    python examples/streaming.py --quick
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from quick import example_parser, parse
from transformers import AutoProcessor

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    PoisonSpec,
    RoCLIPTrainer,
    RoCLIPTrainingArguments,
    ZeroShotEvaluator,
    load_pairs,
    poison_stream,
)
from hf_robust_clip.data.images import ImagePreprocessor


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--max_steps", type=int, default=100_000, help="optimizer steps (default: 100000)")
    parser.add_argument("--poison_rate", type=float, default=0.0, help="share of the pairs to poison (default: none)")
    parser.add_argument("--key_column", help="column that decides which rows are poisoned (default: their number)")
    given = parse(parser)
    stream = load_dataset(given.pairs, split="train", streaming=True)
    trigger = BlendedTrigger()
    if given.poison_rate > 0:
        # The trigger goes on at the model's own resolution, where it is measured too.
        size = ImagePreprocessor(AutoProcessor.from_pretrained(given.model).image_processor).image_size
        spec = PoisonSpec(trigger, given.target, rate=given.poison_rate, image_size=size)
        stream, manifest = poison_stream(stream, spec, key_column=given.key_column)
        Path(given.output_dir).mkdir(parents=True, exist_ok=True)
        Path(given.output_dir, "poisons.json").write_text(json.dumps(manifest))
    # Poisoned first, then shuffled: a row's number in a shuffled stream would be another in every epoch.
    stream = stream.shuffle(seed=0, buffer_size=10_000)
    images = load_pairs(given.images, split="test")
    names = images.features["label"].names
    # A stream has no length, so that the pool is a number of pairs, and an epoch of matches a number of steps.
    settings: dict[str, Any] = {
        "max_steps": given.max_steps,
        "per_device_train_batch_size": 128,
        "pool_size": 20_000,
        "steps_per_matching_epoch": 4_000,
    }
    if given.quick:
        settings = {
            "max_steps": 24,
            "per_device_train_batch_size": 32,
            "pool_size": 64,
            "steps_per_matching_epoch": 4,
            "logging_steps": 4,
        }
    trainer = RoCLIPTrainer(
        given.model,
        RoCLIPTrainingArguments(given.output_dir, report_to="none", **settings),
        train_dataset=stream,
        evaluators=[
            ZeroShotEvaluator(images, names),
            AttackSuccessEvaluator(images, trigger, given.target, names),
        ],
    )
    trainer.train()
    trainer.save_model()
    print(trainer.run_evaluators())


if __name__ == "__main__":
    main()
