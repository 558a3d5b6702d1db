"""RoCLIP: pre-training in which a poisoned pair meets its nearest neighbours instead of its partner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..arguments import check_choice, check_whole
from ..batch import Batch, Embeddings
from ..columns import captions_of, has_transform, naming
from ..data.rows import column_values, poison_flags
from ..losses import MATCHINGS, Matching, roclip_loss
from ..methods import ANYTHING, CONSISTENT, FIRST, WORDS, Line, Method, Panel, Series, Statement
from ..pool import FeaturePool
from ..record import RunRecord
from ..wording import shown
from .base import Defence, Plan
from .pools import FeaturePools, PretrainingArguments, check_pool_size, pool_length

logger = logging.get_logger(__name__)

#: From this share of a batch on, one pool entry that is everybody's match means that matching has collapsed.
COLLAPSED = 0.5


@dataclass
class RoCLIPTrainingArguments(PretrainingArguments):
    """
    Arguments of [`RoCLIPTrainer`] (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854). The paper pre-trains on
    a million pairs for 24 to 32 epochs, at learning rate 5e-4 with batch 128 or 5e-5 with batch 512, with a pool of 2%
    of the pairs.

    Args:
        pool_size (`float`, defaults to 0.02): Pairs whose features the pools hold: a whole number from 2 on, or a
            share of `train_dataset` below 1.
        pool_dtype (`str`, defaults to `"float32"`): What the pools store, `"float32"` or `"bfloat16"`.
        match_every_n_epochs (`int`, defaults to 2): Of so many epochs, the first is a matching epoch; 1: all are.
        matching_start_epoch (`int`, defaults to 2): First matching epoch, counted from 0. Too early, and nearest
            neighbours mean nothing: training on them collapses, which is logged. Too late, and the poisons are
            learned: their nearest neighbours are then of the adversarial class, and matching teaches it once more.
        matching (`str`, defaults to `"image_to_text"`): What a matching epoch matches, see [`~losses.roclip_loss`].
            The default is by evidence on digits: with epochs of matches every second one from the ninth of 16 to 24
            on, it kept 88% accuracy where `"cross"` kept 66% and 73%, at an attack success of 6.6% and 0.8% against
            0.7% and 1.1% (blended and patch trigger; 71% and 91% undefended). `"unimodal"` asks a poison's own caption
            what to match, which where captions are few is another of the adversarial class.
        steps_per_matching_epoch (`int`, *optional*): Optimizer steps that count as one epoch in the two numbers above;
            `None`: the dataset's epochs. Datasets of unknown length need it. On small ones it serves to alternate more
            often: a whole epoch of matches undoes much of what the last one taught.
        adversarial_phrase (`str`, *optional*): For the log alone, where `train_dataset` has a `poisoned` column: a
            word or phrase that captions of the adversarial class contain, as whole words and whatever the case.
            `None`: only captions of poisoned pairs count.
    """

    pool_size: float = field(
        default=0.02, metadata={"help": "Pairs in the pools, or below 1 their share of the dataset."}
    )
    match_every_n_epochs: int = field(
        default=2, metadata={"help": "Of so many epochs, the first is a matching epoch; 1: all are."}
    )
    matching_start_epoch: int = field(default=2, metadata={"help": "First matching epoch, counted from 0."})
    matching: str = field(default="image_to_text", metadata={"help": f"What is matched: {', '.join(MATCHINGS)}."})
    steps_per_matching_epoch: int | None = field(
        default=None, metadata={"help": "Optimizer steps that count as a matching epoch; by default the dataset's."}
    )
    adversarial_phrase: str | None = field(
        default=None, metadata={"help": "For the log: what captions of the adversarial class contain."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool_size(self, "pool_size")
        check_choice(self, "matching", MATCHINGS)
        check_whole(self, "match_every_n_epochs", least=1)
        check_whole(self, "matching_start_epoch", least=0)
        if self.steps_per_matching_epoch is not None:
            check_whole(self, "steps_per_matching_epoch", least=1)


class RoCLIP(Defence):
    """
    In matching epochs an image is trained against the caption nearest to it in a pool of earlier captions, not against
    its own (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854). Other epochs are CLIP's. The pools take in the
    features of every step, in every epoch; matching begins when they are full.

    Args:
        rows (`int`, *optional*): Of the dataset; `None` of a stream.
        pool_size (`float`): Pairs in the pools, or below 1 their share of the rows.
        pool_dtype (`str`): What they store.
        matching (`str`): What is matched: see [`~losses.roclip_loss`].
        match_every_n_epochs, matching_start_epoch (`int`): Which epochs match.
        steps_per_matching_epoch (`int`, *optional*): Optimizer steps that count as an epoch for these two.
        adversarial (`np.ndarray` of shape `(N,)`, bool, *optional*): For the log: the rows whose caption is of the
            adversarial class.
    """

    method = Method(
        name="RoCLIP",
        what="Trained with RoCLIP on pairs that may be poisoned: in matching epochs an image learns from the caption "
        "nearest to it in a pool of earlier ones instead of from its own.",
        kind="pre-training",
        limits=(
            FIRST.format("the first matching epoch"),
            "Poisons that are many enough to be matched with each other get through.",
            CONSISTENT,
            WORDS.format("71%"),
            ANYTHING,
        ),
        paper="Yang, Gao and Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854",
        bibtex="""@inproceedings{yang2023robust,
  title = {Robust Contrastive Language-Image Pretraining against Data Poisoning and Backdoor Attacks},
  author = {Yang, Wenhan and Gao, Jingdong and Mirzasoleiman, Baharan},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year = {2023},
  eprint = {2303.06854},
  archivePrefix = {arXiv}
}""",
    )
    arguments = RoCLIPTrainingArguments
    series = Series(
        heading="What RoCLIP matched",
        caption="From the training log. Left: mean cosine similarity of augmented images and their own captions, and "
        "of what is matched. Right: different matches in a batch, and the share of a batch that the most popular one "
        "serves; when that is most of it, matching has collapsed. Stretches with matching are shaded.",
        panels=(
            Panel(
                "Cosine similarity",
                (
                    Line("pair_similarity", "all pairs", "text"),
                    Line("clean_pair_similarity", "clean pairs"),
                    Line("poisoned_pair_similarity", "poisoned pairs", "attack"),
                    Line("match_similarity", "images and what they are matched with", "target"),
                ),
            ),
            Panel(
                "Matches, %",
                (
                    Line("distinct_matches", "different matches in a batch"),
                    Line("largest_match_share", "share of the most popular match", "target"),
                    Line(
                        "poisoned_match_adversarial",
                        "poisoned images matched with their adversarial class",
                        "attack",
                    ),
                ),
                percent=True,
            ),
        ),
        shaded="match_similarity",
    )

    # One view, augmented where there is an augmentation: the trainer says which.
    def __init__(
        self,
        rows: int | None = None,
        pool_size: float = 0.02,
        pool_dtype: str = "float32",
        matching: Matching = "image_to_text",
        match_every_n_epochs: int = 2,
        matching_start_epoch: int = 2,
        steps_per_matching_epoch: int | None = None,
        adversarial: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        if rows is None and steps_per_matching_epoch is None:
            raise ValueError(
                "train_dataset has no length, so that it has no epochs to count: set steps_per_matching_epoch, the "
                "number of optimizer steps that match_every_n_epochs and matching_start_epoch are to count as one"
            )
        self.pool_size, self.matching = pool_size, matching
        # In a matching step, nothing but these has a gradient.
        self.needs_gradient = frozenset({"vision"} if matching == "image_to_text" else {"vision", "text"})
        self.match_every_n_epochs, self.matching_start_epoch = match_every_n_epochs, matching_start_epoch
        self.steps_per_matching_epoch = steps_per_matching_epoch
        self.pools = FeaturePools(pool_length(pool_size, rows, "pool_size"), getattr(torch, pool_dtype))
        known = None if adversarial is None else torch.from_numpy(adversarial)
        self.register_buffer("adversarial", known, persistent=False)
        self._calls = 1
        self._warned_of_collapse = False

    @classmethod
    def from_arguments(cls, args: Any, train_dataset: Any, **more: Any) -> Defence:
        if train_dataset is None:  # only to evaluate
            return super().from_arguments(args, None, rows=0, **more)
        rows = len(train_dataset) if hasattr(train_dataset, "__len__") else None
        adversarial = adversarial_rows(train_dataset, args.caption_column, args.adversarial_phrase)
        return super().from_arguments(args, train_dataset, rows=rows, adversarial=adversarial, **more)

    def is_matching(self, step: int) -> bool:
        """Whether a step, counted from 0, is one of a matching epoch."""
        steps = self.steps_per_matching_epoch
        since_start = (self.epoch if steps is None else step // steps) - self.matching_start_epoch
        return since_start >= 0 and since_start % self.match_every_n_epochs == 0

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (pairs,) = views.values()
        if self.is_matching(batch.step) and self.pools.full:
            images, texts = _Lookup(self.pools.image), _Lookup(self.pools.text)
            terms = roclip_loss(
                *pairs, scale, images, texts, matching=self.matching, gather=self.gather, bias=batch.bias
            )
            self._note_matches(pairs, texts, batch.poisoned)
        else:
            terms = {"clip_loss": self.contrast(*pairs, scale, batch)}
        self.pools.enqueue(*pairs, batch.rows)
        return terms

    def _note_matches(self, pairs: Embeddings, texts: _Lookup, poisoned: torch.Tensor | None) -> None:
        queries = pairs.text_embeds if self.matching == "unimodal" else pairs.image_embeds
        served = torch.zeros(texts.pool.size, device=queries.device)
        served.scatter_add_(0, texts.slots, torch.ones_like(texts.slots, dtype=served.dtype))
        self.note(
            {
                "distinct_matches": (served > 0).sum() / len(queries),
                "largest_match_share": served.max() / len(queries),
                "match_similarity": (queries * texts.matches).sum(dim=-1),
            }
        )
        if poisoned is not None and isinstance(self.adversarial, torch.Tensor):
            rows = texts.pool.keys[texts.slots]
            self.note({"poisoned_match_adversarial": self.adversarial[rows].float()}, poisoned)

    def reset(self) -> None:
        self.pools.clear()

    def begin_training(self, plan: Plan) -> None:
        """Warn of a training that ends before it can match anything."""
        self._warned_of_collapse, self._calls = False, plan.calls
        steps, start = self.steps_per_matching_epoch, self.matching_start_epoch
        if steps is not None and plan.steps <= start * steps:
            logger.warning(
                f"Training ends after step {plan.steps}, before the first matching epoch "
                f"(matching_start_epoch={start} of steps_per_matching_epoch={steps}): it will be CLIP throughout."
            )
        elif steps is None and plan.epochs <= start:
            logger.warning(
                f"Training ends after epoch {plan.epochs}, before the first matching epoch "
                f"(matching_start_epoch={start}, counted from 0): it will be CLIP throughout."
            )
        rows = plan.batch * plan.calls * plan.steps
        # The last batch comes too late.
        if not self.pools.full and self.pools.size > rows - plan.batch:
            logger.warning(
                f"The pools of {self.pools.size} pairs (pool_size={shown(self.pool_size)}) do not fill before "
                f"training ends, after {rows} pairs, and matching begins when they are full: it will be CLIP "
                "throughout."
            )

    def logged(self, logs: dict[str, float]) -> None:
        """Add the pools' fill and age; warn, once, when matching has collapsed."""
        if self.pools.text is not None:
            logs["pool_fill"] = self.pools.text.filled / self.pools.size
            logs["pool_age"] = self.pools.text.age / self._calls
        share = logs.get("largest_match_share", 0.0)
        if share > COLLAPSED and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                f"Matching has collapsed: one caption of the pool serves {share:.0%} of a batch "
                f"(distinct_matches {logs['distinct_matches']:.1%}), so that images are all trained towards one "
                "point. The representation means too little to match on: resume from a checkpoint before the first "
                "matching epoch with a larger matching_start_epoch or match_every_n_epochs, or start anew with a "
                "larger pool_size, which no checkpoint is resumed with."
            )

    @classmethod
    def findings(cls, record: RunRecord) -> Iterator[Statement]:
        """Whether there was matching, and whether it collapsed."""
        log = record.log
        if not log:
            return
        matching = [entry.numbers for entry in log if "match_similarity" in entry.numbers]
        if not matching:
            yield Statement("warning", "RoCLIP never matched", ": this was training with augmentation alone.")
            return
        means = {name: _mean(matching, name) for name in ("distinct_matches", "poisoned_match_adversarial")}
        rest = f" in {len(matching)} of {len(log)} logged stretches of training"
        if means["distinct_matches"] is not None:
            rest += f", with {means['distinct_matches']:.1%} different matches in a batch"
        if means["poisoned_match_adversarial"] is not None:
            share = f"{means['poisoned_match_adversarial']:.1%}"
            rest += f"; poisoned images were matched with their adversarial class in {share} of all cases"
        yield Statement("result", "RoCLIP matched", f"{rest}.")
        collapsed = [entry for entry in matching if (entry.get("largest_match_share") or 0) > COLLAPSED]
        if collapsed:
            rest = f" in {len(collapsed)} of them: one caption of the pool served more than half of a batch."
            yield Statement("warning", "RoCLIP's matching collapsed", rest)


def adversarial_rows(dataset: Any, caption_column: str, phrase: str | None) -> np.ndarray | None:
    """Which captions are of the adversarial class `(N,)`, bool; `None` where the dataset does not say."""
    rows = poison_flags(dataset)
    if rows is not None and phrase is not None:
        if has_transform(dataset):  # whose captions take reading every row
            return None
        names = naming(phrase)
        rows |= np.array([any(map(names, captions_of(value))) for value in column_values(dataset, caption_column)])
    return rows


def _mean(entries: Sequence[dict[str, float | None]], name: str) -> float | None:
    values = [value for entry in entries if (value := entry.get(name)) is not None]
    return sum(values) / len(values) if values else None


class _Lookup:
    """A pool that remembers what it was last asked for."""

    slots: torch.Tensor  # (B,)
    matches: torch.Tensor  # (B, D)

    def __init__(self, pool: FeaturePool | None) -> None:
        assert pool is not None  # it is full
        self.pool = pool

    def nearest(self, queries: torch.Tensor) -> torch.Tensor:
        self.slots = self.pool.nearest_slots(queries)
        self.matches = self.pool.features[self.slots].to(queries.dtype)
        return self.matches
