"""Train and fine-tune CLIP models that resist data poisoning and backdoors, on the Hugging Face stack."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .defences import LINES

__version__ = "0.1.0"

#: Public name -> module that defines it, or that it is. Modules load when a name is first used: importing the trainers
#: takes seconds.
_PUBLIC = {
    **{f"{cls}Trainer": "trainers.defended" for cls, _ in LINES.values()},
    **{f"{cls}TrainingArguments": f"defences.{name}" for name, (cls, _) in LINES.items()},
    "AttackSuccessEvaluator": "evaluation.attack_success",
    "BlendedStripesTrigger": "attacks.blends",
    "BlendedTrianglesTrigger": "attacks.blends",
    "BlendedTrigger": "attacks.blends",
    "CLIPDataCollator": "data.collator",
    "CLIPTrainer": "trainers.trainer",
    "CLIPTrainingArguments": "arguments",
    "CheckpointScan": "scanning.checkpoint",
    "ColorCurveTrigger": "attacks.transforms",
    "Defence": "defences.base",
    "Embeddings": "batch",
    "Evaluator": "evaluation.base",
    "FeaturePool": "pool",
    "FoundTrigger": "attacks.found",
    "ImageAugmentation": "augment.images",
    "LinearProbeEvaluator": "evaluation.linear_probe",
    "OptimizedPatchTrigger": "attacks.patches",
    "PairScan": "scanning.found",
    "PairSimilarityCallback": "callbacks",
    "PatchTrigger": "attacks.patches",
    "PhraseTrigger": "attacks.text_triggers",
    "PoisonSpec": "attacks.spec",
    "PoisonSuccessEvaluator": "evaluation.poison_success",
    "RedTextTrigger": "attacks.blends",
    "RetrievalEvaluator": "evaluation.retrieval",
    "SinusoidTrigger": "attacks.transforms",
    "StripesPatchTrigger": "attacks.patches",
    "TextAugmentation": "augment.text",
    "TextQueryEvaluator": "evaluation.text_query",
    "TextTrigger": "attacks.text_triggers",
    "Trigger": "attacks.pixels",
    "WarpTrigger": "attacks.transforms",
    "WordTrigger": "attacks.text_triggers",
    "ZeroShotEvaluator": "evaluation.zero_shot",
    "cluster_captions": "scanning.checkpoint",
    "fit_similarity_mixture": "mixture",
    "load_found": "attacks.found",
    "load_pairs": "data.loading",
    "losses": "losses",
    "newest_checkpoint": "trainers.checkpoints",
    "optimize_patch": "attacks.optimizing",
    "poison_dataset": "attacks.poisoning",
    "poison_stream": "attacks.streaming",
    "prepare_dataset": "data.preparing",
    "replay_manifest": "attacks.poisoning",
    "scan_checkpoint": "scanning.checkpoint",
    "scan_pairs": "scanning.pairs",
    "targeted_specs": "attacks.spec",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    # What editors and type checkers read. "X as X" tells them that a name is public.
    from . import losses as losses
    from .arguments import CLIPTrainingArguments as CLIPTrainingArguments
    from .attacks.blends import BlendedStripesTrigger as BlendedStripesTrigger
    from .attacks.blends import BlendedTrianglesTrigger as BlendedTrianglesTrigger
    from .attacks.blends import BlendedTrigger as BlendedTrigger
    from .attacks.blends import RedTextTrigger as RedTextTrigger
    from .attacks.found import FoundTrigger as FoundTrigger
    from .attacks.found import load_found as load_found
    from .attacks.optimizing import optimize_patch as optimize_patch
    from .attacks.patches import OptimizedPatchTrigger as OptimizedPatchTrigger
    from .attacks.patches import PatchTrigger as PatchTrigger
    from .attacks.patches import StripesPatchTrigger as StripesPatchTrigger
    from .attacks.pixels import Trigger as Trigger
    from .attacks.poisoning import poison_dataset as poison_dataset
    from .attacks.poisoning import replay_manifest as replay_manifest
    from .attacks.spec import PoisonSpec as PoisonSpec
    from .attacks.spec import targeted_specs as targeted_specs
    from .attacks.streaming import poison_stream as poison_stream
    from .attacks.text_triggers import PhraseTrigger as PhraseTrigger
    from .attacks.text_triggers import TextTrigger as TextTrigger
    from .attacks.text_triggers import WordTrigger as WordTrigger
    from .attacks.transforms import ColorCurveTrigger as ColorCurveTrigger
    from .attacks.transforms import SinusoidTrigger as SinusoidTrigger
    from .attacks.transforms import WarpTrigger as WarpTrigger
    from .augment.images import ImageAugmentation as ImageAugmentation
    from .augment.text import TextAugmentation as TextAugmentation
    from .batch import Embeddings as Embeddings
    from .callbacks import PairSimilarityCallback as PairSimilarityCallback
    from .data.collator import CLIPDataCollator as CLIPDataCollator
    from .data.loading import load_pairs as load_pairs
    from .data.preparing import prepare_dataset as prepare_dataset
    from .defences.base import Defence as Defence
    from .defences.cleanclip import CleanCLIPTrainingArguments as CleanCLIPTrainingArguments
    from .defences.par import PARTrainingArguments as PARTrainingArguments
    from .defences.roclip import RoCLIPTrainingArguments as RoCLIPTrainingArguments
    from .defences.safeclip import SafeCLIPTrainingArguments as SafeCLIPTrainingArguments
    from .defences.unbind import UnbindTrainingArguments as UnbindTrainingArguments
    from .evaluation.attack_success import AttackSuccessEvaluator as AttackSuccessEvaluator
    from .evaluation.base import Evaluator as Evaluator
    from .evaluation.linear_probe import LinearProbeEvaluator as LinearProbeEvaluator
    from .evaluation.poison_success import PoisonSuccessEvaluator as PoisonSuccessEvaluator
    from .evaluation.retrieval import RetrievalEvaluator as RetrievalEvaluator
    from .evaluation.text_query import TextQueryEvaluator as TextQueryEvaluator
    from .evaluation.zero_shot import ZeroShotEvaluator as ZeroShotEvaluator
    from .mixture import fit_similarity_mixture as fit_similarity_mixture
    from .pool import FeaturePool as FeaturePool
    from .scanning.checkpoint import CheckpointScan as CheckpointScan
    from .scanning.checkpoint import cluster_captions as cluster_captions
    from .scanning.checkpoint import scan_checkpoint as scan_checkpoint
    from .scanning.found import PairScan as PairScan
    from .scanning.pairs import scan_pairs as scan_pairs
    from .trainers.checkpoints import newest_checkpoint as newest_checkpoint
    from .trainers.defended import CleanCLIPTrainer as CleanCLIPTrainer
    from .trainers.defended import PARTrainer as PARTrainer
    from .trainers.defended import RoCLIPTrainer as RoCLIPTrainer
    from .trainers.defended import SafeCLIPTrainer as SafeCLIPTrainer
    from .trainers.defended import UnbindTrainer as UnbindTrainer
    from .trainers.trainer import CLIPTrainer as CLIPTrainer
else:

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
        value = module if _PUBLIC[name] == name else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
