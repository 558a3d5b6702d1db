"""Callbacks that the trainers install, and those that users add."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .augment.images import ImageNormalization
from .batch import encode_pairs
from .columns import BAD_ROWS, POISONED, ROW_INDEX, check_columns, check_flag
from .data.collator import CLIPDataCollator
from .data.rows import IndexedDataset, column_values
from .kinds import check_string
from .models import caption_padding, inference, longest_caption
from .wording import shown

_KINDS = ("clean", "poisoned")
_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


class TrainerHooks(TrainerCallback):
    """
    Passes the Trainer's events on to what takes no arguments, such as the methods of a trainer, which cannot override
    the loop that raises them.

    Args:
        **events (callables): Each by the name of its event, such as `on_train_begin`.
    """

    def __init__(self, **events: Callable[[], None]) -> None:
        for name, call in events.items():
            setattr(self, name, lambda *args, call=call, **kwargs: call())


@dataclass(frozen=True)
class SimilarityRecord:
    """
    How similar image and caption of clean and of poisoned pairs were: cosines in [-1, 1], NaN without such pairs.

    `epoch` and `step` of training; `{clean,poisoned}_similarity`, the mean, with the 5th, 50th and 95th percentiles
    under `_q05`, `_q50` and `_q95`; `{clean,poisoned}_pairs`, how many pairs they are over.
    """

    epoch: float
    step: int
    clean_pairs: int
    poisoned_pairs: int
    clean_similarity: float = math.nan
    clean_similarity_q05: float = math.nan
    clean_similarity_q50: float = math.nan
    clean_similarity_q95: float = math.nan
    poisoned_similarity: float = math.nan
    poisoned_similarity_q05: float = math.nan
    poisoned_similarity_q50: float = math.nan
    poisoned_similarity_q95: float = math.nan


class PairSimilarityCallback(TrainerCallback):
    """
    Follows the similarity of clean and of poisoned pairs over training: of the same pairs each time, un-augmented, in
    evaluation mode, before training and after each epoch.

    Each figure becomes part of the trainer's `log_history`, and from there of its checkpoints. Training itself goes on
    to the bit as it would without; but the time that it takes counts in the throughput that the trainer logs next.
    In a distributed run every rank computes the same.

    Args:
        dataset (`datasets.Dataset` or other map-style dataset): Pairs, as for training.
        image_column (`str`, defaults to `"image"`): Column with the image.
        caption_column (`str`, defaults to `"caption"`): Column with the caption, or a list of captions of which the
            first counts.
        poisoned_column (`str`, defaults to `"poisoned"`): Boolean column that marks the poisoned pairs.
        max_pairs (`int`, defaults to 1000): Most pairs of each kind, drawn where there are more; at least 1.
        seed (`int`, defaults to 0): Of that draw.
        prefix (`str`, *optional*): Put before the figures' names in the log, for several callbacks in one run:
            `"held_out_"`.

    Attributes:
        records (`list[SimilarityRecord]`): One for each time; after resuming, those of the whole training.

    Raises:
        `ValueError`: If the dataset is empty or has no length, a column is missing, or a flag is not boolean. When
            called, if a pair cannot be read; with `on_bad_row="skip"` among the trainer's arguments it is left out.
            When training starts, if another callback has the same prefix.

    Example:

    ```python
    >>> similarities = PairSimilarityCallback(poisoned_pairs)
    >>> trainer = RoCLIPTrainer(model, args, train_dataset=poisoned_pairs, callbacks=[similarities])
    >>> trainer.train()
    >>> [(record.epoch, record.clean_similarity, record.poisoned_similarity) for record in similarities.records]
    [(0.0, 0.02, 0.01), (1.0, 0.31, 0.12), (2.0, 0.38, 0.15)]
    ```
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str = "image",
        caption_column: str = "caption",
        poisoned_column: str = POISONED,
        max_pairs: int = 1000,
        seed: int = 0,
        prefix: str = "",
    ) -> None:
        columns = {"image_column": image_column, "caption_column": caption_column, "poisoned_column": poisoned_column}
        check_columns(dataset, columns, "pairs")
        if isinstance(max_pairs, bool) or not isinstance(max_pairs, int) or max_pairs < 1:
            raise ValueError(f"max_pairs={shown(max_pairs)} must be a whole number of at least 1")
        self.dataset = dataset
        self.image_column = image_column
        self.caption_column = caption_column
        self.prefix = check_string("prefix", prefix)
        values, column = enumerate(column_values(dataset, poisoned_column)), shown(poisoned_column)
        flags = np.array([check_flag(value, f"row {row}, column {column}") for row, value in values])
        rng = np.random.default_rng(seed)
        self._rows = {
            kind: np.sort(rng.permutation(np.flatnonzero(flags == poisoned))[:max_pairs]).tolist()
            for kind, poisoned in zip(_KINDS, (False, True), strict=True)
        }
        self.records: list[SimilarityRecord] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = (_read(entry, self.prefix) for entry in state.log_history)
        self.records = [record for record in found if record is not None]
        if self.records and state.global_step == 0:  # before it has made one
            raise ValueError(
                f"two PairSimilarityCallbacks have prefix={shown(self.prefix)}: give one of them another, for example "
                "prefix='held_out_'"
            )
        # A checkpoint of an epoch's last step was saved before the end of that epoch.
        if float(state.epoch or 0).is_integer():
            self._record(args, state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._record(args, state, **kwargs)

    def _record(
        self, args: TrainingArguments, state: TrainerState, model: Any, processing_class: Any, **kwargs: Any
    ) -> None:
        if any(record.step == state.global_step for record in self.records):
            return
        figures: dict[str, Any] = {}
        for kind, rows in self._rows.items():
            similarities = self._similarities(args, model, processing_class, rows)
            figures[f"{kind}_pairs"] = len(similarities)
            if len(similarities) > 0:
                figures[f"{kind}_similarity"] = float(similarities.mean())
                for name, share in _QUANTILES.items():
                    figures[f"{kind}_similarity_{name}"] = float(np.quantile(similarities, share))
        record = SimilarityRecord(float(state.epoch or 0), state.global_step, **figures)
        self.records.append(record)
        names = _names(self.prefix)
        # JSON has no NaN.
        state.log_history.append({names[name]: value for name, value in asdict(record).items() if value == value})

    def _similarities(
        self, args: TrainingArguments, model: Any, processing_class: Any, rows: list[int]
    ) -> NDArray[np.float64]:
        """The cosine of each of these pairs that can be used."""
        columns = (self.image_column, self.caption_column)
        on_bad_row: Any = getattr(args, "on_bad_row", "raise")
        dataset = IndexedDataset(self.dataset, *columns, on_bad_row=on_bad_row)
        collator = CLIPDataCollator(
            processing_class,
            *columns,
            max_length=getattr(args, "max_length", None) or longest_caption(model, processing_class.tokenizer),
            padding=caption_padding(model),
        ).for_evaluation()
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        normalization = ImageNormalization(collator.preprocess.mean, collator.preprocess.std).to(device)
        found = [torch.zeros(0)]
        with inference(model):
            for start in range(0, len(rows), args.eval_batch_size):
                wanted = rows[start : start + args.eval_batch_size]
                batch = collator(dataset.__getitems__(wanted))
                # Where another row came in a row's place, that row cannot be used.
                usable = batch.pop(ROW_INDEX) == torch.tensor(wanted)
                inputs = {name: value.to(device) for name, value in batch.items() if name not in (POISONED, BAD_ROWS)}
                inputs["pixel_values"] = normalization(inputs["pixel_values"]).to(dtype)
                found.append(encode_pairs(model, inputs).similarities.cpu()[usable])
        return torch.cat(found).double().numpy()


def _names(prefix: str) -> dict[str, str]:
    """What the fields of a record are called in the log; `epoch` and `step` as in every entry."""
    names = (item.name for item in fields(SimilarityRecord))
    return {name: name if name in ("epoch", "step") else prefix + name for name in names}


def _read(entry: dict[str, Any], prefix: str) -> SimilarityRecord | None:
    """The record that an entry of the log is; `None` if it is none, or of another prefix."""
    names = _names(prefix)
    if names["clean_pairs"] not in entry:
        return None
    return SimilarityRecord(**{name: entry[logged] for name, logged in names.items() if logged in entry})
