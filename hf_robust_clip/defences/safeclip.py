"""SafeCLIP: pre-training that tells safe pairs from risky ones and treats them differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..arguments import check_choice, check_whole
from ..batch import Batch, Embeddings
from ..data.sampling import RoutedBatchSampler
from ..distributed import world_size
from ..losses import safeclip_cross_loss, safeclip_unimodal_loss
from ..methods import ANYTHING, CONSISTENT, FIRST, WORDS, Line, Method, Panel, Series, Statement
from ..record import RunRecord, Split
from ..wording import shown
from .base import Defence, PairScores, Plan
from .pools import FeaturePools, PretrainingArguments, check_pool_size, pool_length
from .split import SplitHistory

logger = logging.get_logger(__name__)

SCORE_VIEWS = ("clean", "augmented")

#: Components that are less far apart are one group, in standard deviations (`SplitRecord.separation`).
ONE_GROUP = 0.5


@dataclass
class SafeCLIPTrainingArguments(PretrainingArguments):
    """
    Arguments of [`SafeCLIPTrainer`] (Yang, Gao, Mirzasoleiman, ICML 2024, arXiv 2310.05862), by default those of the
    paper: 5 epochs of unimodal warm-up, one CLIP epoch at a hundredth of the learning rate, a first safe set of
    probability 0.9 that grows by 1% an epoch up to 85%.

    Args:
        warmup_unimodal_epochs (`int`, defaults to 5): Epochs of the first phase, in which each modality learns by
            itself.
        warmup_unimodal_learning_rate (`float`, *optional*): Its peak learning rate. `None`: `learning_rate`. With an
            optimizer of your own, this and the next are the rate of the group with the largest; others keep their
            ratio to it, and `None` refers to its rates in place of `learning_rate`.
        warmup_cross_epochs (`int`, defaults to 1): Epochs of the second phase, CLIP on all pairs.
        warmup_cross_learning_rate (`float`, *optional*): Its constant learning rate. `None`: a hundredth of
            `learning_rate`.
        safe_threshold (`float`, defaults to 0.9): Probability from which on a pair is safe at the first split, in
            (0, 1).
        safe_growth (`float`, defaults to 0.01): What the safe set grows by at each later split, as a share of all
            pairs, in [0, 1].
        safe_cap (`float`, defaults to 0.85): Largest share of the pairs that are safe, in (0, 1].
        score_views (`str`, defaults to `"clean"`): What pairs are scored on: `"clean"`, un-augmented, or
            `"augmented"`, as in the released code.
        unimodal_pool_size (`float`, defaults to 0.02): Pairs in the pools of the unimodal loss: a whole number from 2
            on, a share of `train_dataset` below 1, or 0: no pools, a view's own copy is its only positive.
        pool_dtype (`str`, defaults to `"float32"`): What the pools store, `"float32"` or `"bfloat16"`.
    """

    warmup_unimodal_epochs: int = field(
        default=5, metadata={"help": "Epochs in which each modality learns by itself."}
    )
    warmup_unimodal_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the unimodal warm-up; by default learning_rate."}
    )
    warmup_cross_epochs: int = field(default=1, metadata={"help": "Epochs of CLIP on all pairs after that."})
    warmup_cross_learning_rate: float | None = field(
        default=None, metadata={"help": "Its learning rate; by default a hundredth of learning_rate."}
    )
    safe_threshold: float = field(
        default=0.9, metadata={"help": "Probability from which on a pair is safe at the first split."}
    )
    safe_growth: float = field(
        default=0.01, metadata={"help": "Share of all pairs that the safe set grows by at each later split."}
    )
    safe_cap: float = field(default=0.85, metadata={"help": "Largest share of the pairs that are safe."})
    score_views: str = field(
        default="clean", metadata={"help": f"What pairs are scored on: {', '.join(SCORE_VIEWS)}."}
    )
    unimodal_pool_size: float = field(
        default=0.02, metadata={"help": "Pairs in the pools, or below 1 their share of the dataset; 0: no pools."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "warmup_unimodal_epochs", least=0)
        check_whole(self, "warmup_cross_epochs", least=0)
        for name in ("warmup_unimodal_learning_rate", "warmup_cross_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be None or at least 0, but is {shown(value)}")
        if not 0 < self.safe_threshold < 1:
            raise ValueError(f"safe_threshold must be in (0, 1), but is {shown(self.safe_threshold)}")
        if not 0 <= self.safe_growth <= 1:
            raise ValueError(f"safe_growth must be a share of the pairs in [0, 1], but is {shown(self.safe_growth)}")
        if not 0 < self.safe_cap <= 1:
            raise ValueError(f"safe_cap must be a share of the pairs in (0, 1], but is {shown(self.safe_cap)}")
        check_choice(self, "score_views", SCORE_VIEWS)
        if self.unimodal_pool_size != 0:
            check_pool_size(self, "unimodal_pool_size")


class SafeCLIP(Defence):
    """
    Three phases (Yang, Gao, Mirzasoleiman, ICML 2024, arXiv 2310.05862): each modality by itself; CLIP on all pairs at
    a small learning rate; then, with all pairs split anew before each epoch, CLIP across two views on the safe ones
    and the first phase's loss on the risky ones, in batches of one kind.

    Args:
        rows (`int`): Of the dataset.
        seed (`int`): Of the mixture's subsample.
        Others: As of [`SafeCLIPTrainingArguments`].
    """

    method = Method(
        name="SafeCLIP",
        what="Trained with SafeCLIP on pairs that may be poisoned: a Gaussian mixture over the pairs' similarities "
        "tells safe ones, which get the loss of CLIP, from risky ones, whose image and caption learn each by itself. "
        "Not to be confused with aimagelab's safe-clip, which is about unsafe content.",
        kind="pre-training",
        limits=(
            FIRST.format("the first split"),
            "Poisons that are many enough to be learned with the classes, before the first split, get through.",
            CONSISTENT,
            "It costs accuracy where data is scarce, since risky pairs teach no words: an independent run on 500,000 "
            "pairs went from 25.3% to 13.9% on CIFAR-10.",
            WORDS.format("64%"),
            ANYTHING,
        ),
        paper="Yang, Gao and Mirzasoleiman, ICML 2024, arXiv 2310.05862",
        bibtex="""@inproceedings{yang2024better,
  title = {Better Safe than Sorry: Pre-training {CLIP} against Targeted Data Poisoning and Backdoor Attacks},
  author = {Yang, Wenhan and Gao, Jingdong and Mirzasoleiman, Baharan},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2024},
  eprint = {2310.05862},
  archivePrefix = {arXiv}
}""",
    )
    arguments = SafeCLIPTrainingArguments
    series = Series(
        heading="What SafeCLIP called safe",
        caption="How large the safe set is at each split, and, where they are known, how much of the poisons it has "
        "taken in.",
        panels=(
            Panel(
                "%",
                (
                    Line("safe_share", "share of all pairs that are in the safe set", "target"),
                    Line("poisons_in_safe_set", "share of the poisons that are in the safe set", "attack"),
                ),
                percent=True,
            ),
        ),
        source="splits",
        missing="training ended before the first split.",
    )
    views = ("first", "second")
    needs_gradient = frozenset({"vision", "text"})

    def __init__(
        self,
        rows: int,
        warmup_unimodal_epochs: int = 5,
        warmup_unimodal_learning_rate: float | None = None,
        warmup_cross_epochs: int = 1,
        warmup_cross_learning_rate: float | None = None,
        safe_threshold: float = 0.9,
        safe_growth: float = 0.01,
        safe_cap: float = 0.85,
        score_views: str = "clean",
        unimodal_pool_size: float = 0.02,
        pool_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.warmup_unimodal_epochs, self.warmup_cross_epochs = warmup_unimodal_epochs, warmup_cross_epochs
        self.warmup_unimodal_learning_rate = warmup_unimodal_learning_rate
        self.warmup_cross_learning_rate = warmup_cross_learning_rate
        self.safe_threshold, self.safe_growth, self.safe_cap = safe_threshold, safe_growth, safe_cap
        self.score_views, self.seed = score_views, seed
        self.splits = SplitHistory(rows)
        self.pools: FeaturePools | None = None
        if unimodal_pool_size:
            size = pool_length(unimodal_pool_size, rows, "unimodal_pool_size")
            self.pools = FeaturePools(size, getattr(torch, pool_dtype))
        self._sampler: RoutedBatchSampler | None = None

    @classmethod
    def from_arguments(cls, args: Any, train_dataset: Any, **more: Any) -> Defence:
        if train_dataset is None:
            return cls(0, unimodal_pool_size=0)  # only to evaluate
        _check_routing(args, train_dataset)
        return super().from_arguments(args, train_dataset, rows=len(train_dataset), **more)

    @property
    def first_split_epoch(self) -> int:
        """The first epoch, from 0, of the third phase."""
        return self.warmup_unimodal_epochs + self.warmup_cross_epochs

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        first, second = views["first"], views["second"]
        if self.kind(batch):
            terms = safeclip_cross_loss(*first, *second, scale, gather=self.gather, bias=batch.bias)
        elif self.warmup_unimodal_epochs <= self.epoch < self.first_split_epoch:
            terms = {"clip_loss": self.contrast(*first, scale, batch)}
        else:
            pools = self.pools if self.pools is not None and self.pools.full else None
            images, texts = (pools.image, pools.text) if pools is not None else (None, None)
            terms = safeclip_unimodal_loss(*first, *second, scale, images, texts, gather=self.gather)
        if self.pools is not None:
            self.pools.enqueue(*first)
        return terms

    def kind(self, batch: Batch) -> bool:
        """Whether its pairs are safe. A row in the place of an unusable one, which is risky, may be safe by itself."""
        return self.splits.are_safe(batch.rows)

    def scheduled(self, epoch: int, factor: float, peak: float) -> float:
        """The learning rates of the two warm-up phases while they last."""
        if epoch < self.warmup_unimodal_epochs:
            rate = self.warmup_unimodal_learning_rate
            return factor if rate is None else factor * rate / peak
        if epoch < self.first_split_epoch:
            rate = self.warmup_cross_learning_rate
            return 0.01 if rate is None else rate / peak
        return factor

    def sampler(self, rows: int, batch_size: int, world_size: int, seed: int) -> RoutedBatchSampler:
        # One for all loaders: a second loader, made by a callback, say, must not leave the first without its kinds.
        if self._sampler is None or (self._sampler.length, self._sampler.batch_size) != (rows, batch_size):
            self._sampler = RoutedBatchSampler(rows, batch_size, world_size, seed)
        return self._sampler

    def begin_training(self, plan: Plan) -> None:
        if plan.epochs <= self.first_split_epoch:
            logger.warning(
                f"Training ends after epoch {plan.epochs}, before the first split into safe and risky "
                f"pairs (after warmup_unimodal_epochs={self.warmup_unimodal_epochs} and "
                f"warmup_cross_epochs={self.warmup_cross_epochs}): it will be warm-up only."
            )

    def begin_epoch(self, epoch: int, score: Callable[..., PairScores | None]) -> dict[str, float]:
        """Split the pairs, unless this is warm-up, or a resumed epoch whose split the checkpoint held."""
        assert self._sampler is not None  # made with the loader
        logs = {}
        if epoch >= self.first_split_epoch and self.splits.epoch != epoch:
            logs = self._split(epoch, score, self._sampler.group)
        self._sampler.set_epoch(epoch)
        self._sampler.set_split(self.splits.safe)
        return logs

    def _split(self, epoch: int, score: Callable[..., PairScores | None], batch: int) -> dict[str, float]:
        scores = score(augmented=self.score_views == "augmented")
        if scores is not None:  # on the first rank alone
            self.splits.add(epoch, scores, self.safe_threshold, self.safe_growth, self.safe_cap, seed=self.seed)
        if world_size() > 1:
            shared = [self.splits]
            broadcast_object_list(shared)
            self.splits = shared[0]
        latest = self.splits.records[-1]
        if latest.safe_share in (0.0, 1.0):
            logger.warning(
                f"The split of epoch {epoch} calls {'no' if latest.safe_share == 0 else 'every'} pair safe: the "
                "similarities do not fall into two groups. Longer warm-up, another safe_threshold or more data may "
                "help; as it is, SafeCLIP defends against nothing."
            )
        elif latest.separation < ONE_GROUP:
            logger.warning(
                f"The mixture of epoch {epoch} found one group of similarities and not two: its components are "
                f"{latest.separation:.2f} standard deviations apart. Which pairs it calls safe is close to chance. "
                "Longer warm-up or more data may help."
            )
        if 0 < round(latest.safe_share * self.splits.rows) < batch:
            logger.warning(
                f"The safe set of epoch {epoch} holds fewer pairs than a batch of all processes, {batch}: no image "
                "learns from a caption. Lower the batch size or safe_threshold, or raise safe_cap."
            )
        return {f"split_{name}": value for name, value in latest._asdict().items() if value == value}

    def reset(self) -> None:
        self.splits.clear()
        if self.pools is not None:
            self.pools.clear()

    def notes(self) -> dict[str, Any]:
        """The splits."""
        return {"splits": self.splits.to_list(None if self._sampler is None else self._sampler.group)}

    @classmethod
    def findings(cls, record: RunRecord) -> Iterator[Statement]:
        """How well the splits separated poisons from other pairs, and which of them separated nothing."""
        splits = record.details.splits
        if splits is None:
            return
        if not splits:
            yield Statement("warning", "SafeCLIP split nothing", ": its training was warm-up only.")
            return
        first, last = splits[0], splits[-1]
        if first.auroc is None:
            yield Statement("result", "SafeCLIP's safe set", f" held {first.safe_share:.1%} of the pairs at first.")
        else:
            held = f"{_held(first)} at first, {_held(last)} at the last split" if len(splits) > 1 else _held(first)
            rest = (
                f" tells poisoned pairs from clean ones with an AUROC of {first.auroc:.3f}. Its safe set holds {held}."
            )
            yield Statement("result", "SafeCLIP's first split", rest)
        nothing = "no image learned from a caption"
        for which, outcome, concerns in (
            ("no pair", nothing, lambda split: split.safe_share == 0),
            ("fewer pairs than a batch", nothing, lambda split: split.safe_share > 0 and split.safe_batches == 0),
            ("every pair", "it defended against nothing", lambda split: split.safe_share == 1),
        ):
            epochs = [split.epoch + 1 for split in filter(concerns, splits)]
            if epochs:
                *others, final = map(str, epochs)
                numbers = f"{', '.join(others)} and {final}" if others else final
                yield Statement(
                    "warning", f"SafeCLIP called {which} safe", f" in epoch {numbers}, in which {outcome}."
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.pools is None and any(name.startswith(f"{prefix}pools.") for name in state_dict):
            raise ValueError(
                "the checkpoint holds pools, but unimodal_pool_size is 0 now: resume with the arguments of the "
                "interrupted run"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _held(split: Split) -> str:
    pairs = f"{split.safe_share:.1%} of all pairs"
    poisons = split.poisons_in_safe_set
    return pairs if poisons is None else f"{poisons:.1%} of the poisons and {pairs}"


def _check_routing(args: Any, train_dataset: Any) -> None:
    """`ValueError` where pairs cannot be scored, and dealt out by that."""
    if not hasattr(train_dataset, "__len__") or isinstance(train_dataset, torch.utils.data.IterableDataset):
        raise ValueError(
            f"train_dataset is a {type(train_dataset).__name__}, which is read in order, but SafeCLIP scores "
            "every pair before an epoch and deals them into safe and risky batches by their number: load it as a "
            "map-style dataset (load_dataset without streaming=True, or datasets.Dataset.from_generator), or use "
            "RoCLIPTrainer, which can stream"
        )
    accelerator_config: Any = args.accelerator_config
    for name, value, accepted in (
        ("dataloader_drop_last", args.dataloader_drop_last, True),
        ("dataloader_in_order", args.dataloader_in_order, True),
        ("ignore_data_skip", args.ignore_data_skip, False),
        ("accelerator_config.split_batches", accelerator_config.split_batches, False),
        ("accelerator_config.dispatch_batches", accelerator_config.dispatch_batches, False),
    ):
        if bool(value) is not accepted:
            raise ValueError(
                f"{name}={shown(value)} does not work with SafeCLIPTrainer, which deals batches that are all safe "
                f"or all risky itself: set it to {accepted}"
            )
