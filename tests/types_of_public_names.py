"""
What a type checker sees of the public names. Nothing runs this file: `mypy` reads it, as pyproject.toml says. Where a
name were `Any`, it would not find the errors that are ignored here, and would say so.
"""

from hf_robust_clip import (
    CLIPTrainer,
    RoCLIPTrainer,
    RoCLIPTrainingArguments,
    SafeCLIPTrainer,
    ZeroShotEvaluator,
    losses,
)

number: int = losses.clip_loss  # type: ignore[assignment]
CLIPTrainer()  # type: ignore[call-arg]
CLIPTrainer("model", evaluator=1)  # type: ignore[call-arg]
RoCLIPTrainer("model", evaluator=1)  # type: ignore[call-arg]
SafeCLIPTrainer("model", evaluator=1)  # type: ignore[call-arg]
CLIPTrainer("model", evaluators=ZeroShotEvaluator([], ["cat", "dog"]))
size: float = RoCLIPTrainer("model", RoCLIPTrainingArguments("out")).args.pool_size
