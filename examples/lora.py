"""
CleanCLIP by LoRA: train small adapters in place of the weights, save them alone, load them again, merge them.

The projections are trained in full beside the adapters, and so is `logit_scale`; both are in what is saved.

    python examples/lora.py --model openai/clip-vit-base-patch32 --pairs you/clean-pairs --images you/labelled-images \
        --target banana --output_dir cleaned-lora

On a few digits, in seconds:

    python examples/lora.py --quick
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from quick import example_parser, parse
from transformers import AutoModel, AutoProcessor, CLIPModel

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    CleanCLIPTrainer,
    CleanCLIPTrainingArguments,
    ZeroShotEvaluator,
    load_pairs,
)


def main() -> None:
    given = parse(example_parser(__doc__), poisoned=True)
    images = load_pairs(given.images, split="test")
    names = images.features["label"].names
    evaluators = [
        ZeroShotEvaluator(images, names),
        AttackSuccessEvaluator(images, BlendedTrigger(), given.target, names),
    ]
    adapters = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        modules_to_save=["visual_projection", "text_projection"],
    )
    # Adapters start from zero: they take a higher learning rate than the weights themselves.
    settings: dict[str, Any] = {"learning_rate": 1e-4}
    if given.quick:
        settings = {"learning_rate": 5e-3, "num_train_epochs": 3, "warmup_steps": 5}
    trainer = CleanCLIPTrainer(
        given.model,
        CleanCLIPTrainingArguments(given.output_dir, report_to="none", **settings),
        train_dataset=load_pairs(given.pairs),
        evaluators=evaluators,
        peft_config=adapters,
    )
    print("before:", trainer.run_evaluators())
    trainer.train()
    print("after:", trainer.run_evaluators())
    trained = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    print(f"{trained:,} of {sum(value.numel() for value in trainer.model.parameters()):,} parameters trained")
    trainer.save_model()

    # The folder names the model that the adapters belong to; transformers loads that first, and then them.
    loaded = AutoModel.from_pretrained(given.output_dir)
    processor = AutoProcessor.from_pretrained(given.output_dir)
    print("loaded:", *(evaluator(loaded, processor) for evaluator in evaluators))

    # Merged, the model needs neither PEFT nor the one that it came from. `merge_adapters=True` saves it so at once.
    merged_dir = Path(given.output_dir, "merged")
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(given.model), given.output_dir)
    adapted.merge_and_unload().save_pretrained(merged_dir)
    processor.save_pretrained(merged_dir)
    merged = CLIPModel.from_pretrained(merged_dir)
    print("merged:", *(evaluator(merged, processor) for evaluator in evaluators))


if __name__ == "__main__":
    main()
