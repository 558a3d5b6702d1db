"""
Run an example as it is, on a few handwritten digits and in seconds, to see that it works:

    python examples/quick.py lora

What an example names on the Hub is then a folder in `quick-run/`, and some of its constants are smaller. It pushes
only to a Hub on this machine, as tests have one. Its metrics mean nothing.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import CLIPModel, CLIPProcessor

from hf_robust_clip import BlendedTrigger, CLIPTrainer, CLIPTrainingArguments, PoisonSpec, poison_dataset
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES, digit_processor, load_digit_pairs
from hf_robust_clip.data.scratch import build_model

FOLDER = Path("quick-run")
#: What stands in the place of an example's own constants.
CONSTANTS: dict[str, Any] = {
    "TARGET": CLASS_NAMES[0],
    "RATE": 0.1,
    "SIZE": 16,
    "WIDTH": 1,
    "EPOCHS": 8,
    "STEPS": 24,
    "MATCHING_STEPS": 4,
    "POOL": 64,
    "BATCH": 32,
    "LEARNING_RATE": 2e-3,
}


def stand_ins() -> None:
    """Write digits, an untrained model and one with a backdoor into `FOLDER`, as the examples name them."""
    data = {"pairs": ("train", 256), "clean-pairs": ("train", 256), "labeled-images": ("test", 200)}
    for name, (split, rows) in data.items():
        file = FOLDER / "you" / name / f"{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        load_digit_pairs(split, renderings=1, seed=1).select(range(rows)).to_parquet(file)
    processor = digit_processor()
    model = build_model(processor, vision_width=64, vision_layers=2, text_width=32, text_layers=1, projection_dim=32)
    for name in ("you/untrained-clip", "openai/clip-vit-base-patch32"):
        model.save_pretrained(FOLDER / name)
        processor.save_pretrained(FOLDER / name)
        if name == "you/untrained-clip":  # the other one is poisoned first
            poison(model, processor)


def poison(model: CLIPModel, processor: CLIPProcessor) -> None:
    """Plant a backdoor for the class `TARGET`, with the default [`BlendedTrigger`], in a few seconds of training."""
    spec = PoisonSpec(BlendedTrigger(), CONSTANTS["TARGET"], rate=0.1, templates=CAPTION_TEMPLATES)
    poisons, _ = poison_dataset(load_digit_pairs(renderings=1), spec)
    settings: dict[str, Any] = {"per_device_train_batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 10}
    args = CLIPTrainingArguments(str(FOLDER), num_train_epochs=3, save_strategy="no", report_to="none", **settings)
    CLIPTrainer(model, args, train_dataset=poisons, processing_class=processor).train()


def run(example: str) -> dict[str, Any]:
    """
    Run `examples/EXAMPLE.py` within `FOLDER`, where `load_dataset` and `from_pretrained` find the stand-ins.

    Returns:
        `dict[str, Any]`: The example's global names.
    """
    source = Path(__file__).with_name(f"{example}.py").read_text()
    if urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname != "127.0.0.1":
        source = source.replace(".push_to_hub()", ".save_model(), trainer.create_model_card()")
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in CONSTANTS:
                node.value = ast.copy_location(ast.Constant(CONSTANTS[name]), node.value)
    if not FOLDER.is_dir():
        stand_ins()
    os.chdir(FOLDER)
    script = Path(f"{example}.py")
    script.write_text(ast.unparse(tree))
    return runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1])
