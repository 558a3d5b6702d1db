"""The command line of the short examples, and what `--quick` takes in place of a checkpoint and data from the Hub."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from hf_robust_clip import BlendedTrigger, CLIPTrainer, CLIPTrainingArguments, PoisonSpec, poison_dataset
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor, load_digit_pairs
from hf_robust_clip.data.scratch import build_model

#: Where `--quick` leaves everything.
FOLDER = Path("quick-run")
#: What it takes in place of them.
MODEL, PAIRS, IMAGES = "openai/clip-vit-base-patch32", "you/clean-pairs", "you/labelled-images"
TARGET = CLASS_NAMES[0]
#: Pairs and labelled images, of 1,397 and 400 digits: enough to see that it runs.
PAIR_ROWS, IMAGE_ROWS = 256, 200


def example_parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags that the short examples have in common; `doc` is the example's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().split("\n\n")[0])
    parser.add_argument("--model", default=MODEL, help=f"model to start from: a Hub id or a folder (default: {MODEL})")
    parser.add_argument("--pairs", help="training pairs with the columns image and caption: a file, folder or Hub id")
    parser.add_argument("--images", help="labelled images with the columns image and label, a ClassLabel: the same")
    parser.add_argument("--target", help="class of --images that the backdoor is for")
    parser.add_argument("--output_dir", help="folder for what is trained")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: on a few handwritten digits")
    return parser


def parse(parser: argparse.ArgumentParser, poisoned: bool = False) -> argparse.Namespace:
    """
    The arguments; with `--quick`, stand-ins for the model, the pairs, the images and the target.

    Args:
        parser (`argparse.ArgumentParser`): From [`example_parser`].
        poisoned (`bool`): As of [`stand_ins`].
    """
    given = parser.parse_args()
    if given.quick:
        folder = stand_ins(poisoned=poisoned)
        given.model, given.pairs, given.images = (str(folder / name) for name in (MODEL, PAIRS, IMAGES))
        given.target, given.output_dir = TARGET, given.output_dir or quick_output()
        print("QUICK RUN: so small that the figures mean nothing.")
    missing = [name for name in ("pairs", "images", "target", "output_dir") if getattr(given, name) is None]
    if missing:
        parser.error(f"give --{', --'.join(missing)}, or --quick")
    return given


def stand_ins(poisoned: bool = False) -> Path:
    """
    Write a small model, clean pairs and labelled images under the names `MODEL`, `PAIRS` and `IMAGES` into `FOLDER`.
    From within it, `from_pretrained` and `load_dataset` take them for those of the Hub.

    Args:
        poisoned (`bool`): Whether the model is trained for a few seconds on poisons of the class `TARGET`, with the
            default [`BlendedTrigger`], instead of untrained.

    Returns:
        `Path`: The folder.
    """
    pairs, images = FOLDER / PAIRS / "train.parquet", FOLDER / IMAGES / "test.parquet"
    for file in (pairs, images):
        file.parent.mkdir(parents=True, exist_ok=True)
    load_digit_pairs("train", renderings=1, seed=1).select(range(PAIR_ROWS)).to_parquet(pairs)
    load_digit_pairs("test").select(range(IMAGE_ROWS)).to_parquet(images)
    processor = digit_processor()
    sizes = {"vision_width": 64, "vision_layers": 2, "text_width": 32, "text_layers": 1, "projection_dim": 32}
    model = build_model(processor, **sizes)
    if poisoned:
        spec = PoisonSpec(BlendedTrigger(), TARGET, rate=0.1, templates=CAPTION_TEMPLATES)
        poisons, _ = poison_dataset(load_digit_pairs(renderings=1), spec)
        args = CLIPTrainingArguments(
            str(FOLDER),
            num_train_epochs=3,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            warmup_steps=10,
            save_strategy="no",
            report_to="none",
        )
        CLIPTrainer(model, args, train_dataset=poisons, processing_class=processor).train()
    model.save_pretrained(FOLDER / MODEL)
    processor.save_pretrained(FOLDER / MODEL)
    return FOLDER


def quick_output() -> str:
    """The folder for what the running example trains."""
    return str(FOLDER / Path(sys.argv[0]).stem)


def hub_on_loopback() -> bool:
    """Whether `HF_ENDPOINT` is a Hub on this machine, as tests have one."""
    return urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname in ("127.0.0.1", "::1", "localhost")
