"""The trainers of the defences: each names its defence and its arguments."""

from __future__ import annotations

import sys

import datasets

from ..data.rows import IndexedDataset
from ..defences import LINES, Registry, defence_named
from ..defences.cleanclip import CleanCLIP, CleanCLIPTrainingArguments
from ..defences.par import PAR, PARTrainingArguments
from ..defences.pools import FeaturePools
from ..defences.roclip import RoCLIP, RoCLIPTrainingArguments
from ..defences.safeclip import SafeCLIP, SafeCLIPTrainingArguments
from ..defences.split import SplitHistory
from ..defences.unbind import Unbind, UnbindTrainingArguments
from ..evaluation.embedding import Embedder
from ..telling import MatchedPair
from .pictures import matched_pairs
from .trainer import CLIPTrainer


class CleanCLIPTrainer(CLIPTrainer):
    """
    Fine-tune a suspected CLIP on clean pairs so that a backdoor loses its hold: beside the CLIP loss, each image and
    each caption learns to recognise an augmented copy of itself, which unties the trigger from the target's captions
    (Bansal et al., ICCV 2023, arXiv 2303.03323).

    It needs pairs that are clean: poisons that are left among them undo it, and so does pre-training with a
    self-supervised term (arXiv 2311.14948). It is weak against structured triggers (stripes, triangles, text; arXiv
    2412.00727) and against BadCLIP (arXiv 2412.20392). Measure, with [`AttackSuccessEvaluator`], and do not resume the
    optimizer of the poisoned checkpoint: pass its weights.

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder.
        args ([`CleanCLIPTrainingArguments`]): The paper's recipe by default.
        image_augmentation, text_augmentation: `None`: the presets of `args`, `"cleanclip"` and `"eda"`.
        Others: As of [`CLIPTrainer`].
    """

    defence_class = CleanCLIP
    args_class = CleanCLIPTrainingArguments
    args: CleanCLIPTrainingArguments


class PARTrainer(CLIPTrainer):
    """
    Fine-tune a suspected CLIP on clean pairs, away from itself: beside the CLIP loss, embeddings of images and of
    captions are driven away from those that the suspect model has of the same inputs, until their mean squared
    distance is above a threshold. What clean pairs teach comes back, a backdoor does not (PAR, Perturb and Recover:
    Singh, Croce, Hein, arXiv 2412.00727).

    `model` is the suspect model, in resumed trainings as well: a checkpoint holds a hash of its weights, and not the
    weights. With `peft_config`, or a model with adapters, the suspect model is the one that the adapters were put on,
    and takes no memory; else it is one copy, in evaluation mode and without gradient. With FSDP every process holds
    that copy whole. `logit_scale` is frozen while training goes on, unless `freeze_logit_scale=False`.

    Logged beside the loss terms: `image_distance` and `text_distance`, the mean squared distances from the suspect
    model's embeddings, in [0, 4]; with `repel_layers`, `layer_distance`, of class tokens, over the layers.

    It leaves something of large structured triggers, and much of text and of BadCLIP (arXiv 2412.00727). Measure, with
    [`AttackSuccessEvaluator`].

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder.
        args ([`PARTrainingArguments`]): The paper's recipe by default.
        image_augmentation: `None`: the preset of `args`, `"par"`.
        Others: As of [`CLIPTrainer`].

    Raises:
        `ValueError`: As of [`CLIPTrainer`]; with `repel_layers`, for a vision tower without class tokens; of `train`,
            for a checkpoint of a training that another suspect model was given to.
    """

    defence_class = PAR
    args_class = PARTrainingArguments
    args: PARTrainingArguments


class UnbindTrainer(CLIPTrainer):
    """
    Fine-tune a suspected CLIP on clean pairs so that a backdoor loses its hold: images under a small pool of universal
    perturbations, each the same for all images that it is dealt, keep their captions. A trigger is such a
    perturbation. Each step draws the pool anew; with `adversary="universal"` it learns against the model instead, by
    the gradients that each step has anyway. It is this package's own; docs/unbind.md says what was measured of it.

    It needs pairs that are clean: a few poisons left among them undo it. Triggers that are far from every family of
    perturbations are not covered. Measure, with [`AttackSuccessEvaluator`], and do not resume the optimizer of the
    poisoned checkpoint: pass its weights.

    Logged beside the loss terms: `perturbed_similarity` (cosine of an image and its perturbed copy),
    `perturbed_pair_similarity` (of the copy and the caption) and `perturbed_weight`. A report shows the pool.

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder.
        args ([`UnbindTrainingArguments`]): `preset="photos"` for photos.
        image_augmentation, text_augmentation: `None`: the presets of `args`, without augmentation by default. Images
            are augmented before they are perturbed; captions only with a `unimodal_weight`.
        Others: As of [`CLIPTrainer`].

    Raises:
        `ValueError`: As of [`CLIPTrainer`]; and for an augmentation of captions without a `unimodal_weight`.
    """

    defence_class = Unbind
    args_class = UnbindTrainingArguments
    args: UnbindTrainingArguments


class RoCLIPTrainer(CLIPTrainer):
    """
    Pre-train a CLIP on pairs of which some may be poisoned. In matching epochs an image is trained against the
    caption nearest to it in a pool of earlier captions, not against its own, so that an image and an adversarial
    caption that have nothing in common are torn apart (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854).
    Other epochs are CLIP's. Images and captions are augmented in both.

    The pools take in the features of every step, in every epoch; matching begins when they are full. Poisons that are
    many enough to be each other's nearest neighbours are matched with each other, and get through.

    Logged beside the loss terms, for matching steps: `distinct_matches` (different pool entries over batch size),
    `largest_match_share` (share of the batch that the most popular entry serves), `match_similarity` (cosine of an
    image and what it is matched with; of `"unimodal"`, of a caption and its match). For all steps: `pair_similarity`
    (cosine of an image and its own caption), `pool_fill` (0 to 1), `pool_age` (optimizer steps since the oldest entry
    was stored). With a `poisoned` column: `clean_pair_similarity`, `poisoned_pair_similarity`, and
    `poisoned_match_adversarial`, how often a poisoned image is matched with a caption of its adversarial class.

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder, as a rule untrained.
        args ([`RoCLIPTrainingArguments`]): The paper's recipe by default.
        image_augmentation, text_augmentation: `None`: the presets of `args`, `"strong"` and `"eda"`.
        Others: As of [`CLIPTrainer`].

    Raises:
        `ValueError`: As of [`CLIPTrainer`]; and for a `train_dataset` of unknown length if `pool_size` is a share of
            it, or if `steps_per_matching_epoch` is not set.
    """

    defence_class = RoCLIP
    args_class = RoCLIPTrainingArguments
    args: RoCLIPTrainingArguments

    @property
    def pools(self) -> FeaturePools | None:
        """The features that matches are looked up in; `None` without a `train_dataset`."""
        return None if self.train_dataset is None else getattr(self.defence, "pools", None)

    def _matches(self, embedder: Embedder) -> list[MatchedPair]:
        pool = self.pools.text if self.pools is not None else None
        if pool is None:
            return []
        pairs = IndexedDataset(self.train_dataset, self.args.image_column, self.args.caption_column)
        return matched_pairs(pool, pairs, embedder, by_caption=self.args.matching == "unimodal")

    @property
    def matching_epoch(self) -> bool:
        """Whether the current step is one of a matching epoch."""
        return isinstance(self.defence, RoCLIP) and self.defence.is_matching(self.state.global_step)


class SafeCLIPTrainer(CLIPTrainer):
    """
    Pre-train a CLIP on pairs of which some may be poisoned, in three phases (Yang, Gao, Mirzasoleiman, ICML 2024,
    arXiv 2310.05862):

    1. `warmup_unimodal_epochs` in which images and captions each learn by themselves: an augmented view against the
       nearest neighbour, in a pool of earlier features, of another view of the same row.
    2. `warmup_cross_epochs` of CLIP on all pairs, at a small learning rate.
    3. From then on, at the start of each epoch, all pairs are scored by similarity and split: pairs that a Gaussian
       mixture calls safe train with CLIP's loss across two augmented views, the others with the first phase's loss,
       in batches that are all safe or all risky. The safe set grows each epoch.

    A poison that enters the safe set is learned like any other pair: the share of the pairs that are truly clean and
    the separation of the similarities bound how far the safe set may grow (`safe_growth`, `safe_cap`). With a column
    `poisoned` the log says how many are inside. The name is also that of an unrelated method against unsafe content.

    Logged beside the loss terms, at each split, as `split_*`: the fields of [`~defences.split.SplitRecord`].

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder, as a rule untrained.
        args ([`SafeCLIPTrainingArguments`]): The paper's recipe by default.
        image_augmentation, text_augmentation: `None`: the presets of `args`, `"strong"` and `"eda"`.
        Others: As of [`CLIPTrainer`].

    Raises:
        `ValueError`: As of [`CLIPTrainer`]; and for an iterable `train_dataset`, whose pairs cannot be scored and
            then dealt out by what they scored.
    """

    defence_class = SafeCLIP
    args_class = SafeCLIPTrainingArguments
    args: SafeCLIPTrainingArguments

    @property
    def pools(self) -> FeaturePools | None:
        """The features of the unimodal loss; `None` without them."""
        return getattr(self.defence, "pools", None)

    @property
    def splits(self) -> SplitHistory:
        """The record and the histogram of every split so far."""
        assert isinstance(self.defence, SafeCLIP)
        return self.defence.splits

    @property
    def split(self) -> datasets.Dataset | None:
        """
        The latest split, a dataset with the boolean column `safe`, one row for each of `train_dataset`'s; `None`
        before the first. `datasets.concatenate_datasets([train_dataset, trainer.split], axis=1)` puts them together.
        """
        safe = self.splits.safe
        return None if safe is None else datasets.Dataset.from_dict({"safe": safe})


def __getattr__(name: str) -> type[CLIPTrainer]:
    """The trainer of a defence that ships and has no class above."""
    defence = defence_named(name.removesuffix("Trainer")) if name.endswith("Trainer") else None
    if defence is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    content = {
        "__module__": __name__,
        "__doc__": defence.__doc__,
        "defence_class": defence,
        "args_class": defence.arguments,
    }
    trainer = globals()[name] = type(name, (CLIPTrainer,), content)
    return trainer


def _trainer(name: str) -> type[CLIPTrainer]:
    found: type[CLIPTrainer] = getattr(sys.modules[__name__], f"{LINES[name][0]}Trainer")
    return found


#: The trainers of `DEFENCES`, by the same names; `args_class` are their arguments.
TRAINERS = Registry(_trainer)
