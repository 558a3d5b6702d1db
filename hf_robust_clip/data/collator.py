"""Rows to a batch: pixels as bytes, and every text view of the captions tokenised in one call."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from ..columns import BAD_ROWS, POISONED, ROW_INDEX, captions_of
from ..kinds import check_callable, text_list
from ..models import check_processor
from ..seeding import derive_seed
from ..wording import shown
from .images import ImagePreprocessor
from .rows import decode_row
from .tokens import tokenise

ORIGINAL = "original"


class CLIPDataCollator:
    """
    Collate image-caption rows for the trainers of this package.

    Each image is decoded once, converted to RGB, and resized and cropped by the model's own image processor; the
    pixels stay uint8, and the trainer makes and normalises the image views on the device. The text views are drawn
    here and tokenised in one call, view after view. What is drawn depends on (seed, epoch, row), so it is the same
    with any number of workers and after resuming. Rows without a number (iterable datasets) are keyed by their
    content. The names of special tokens in a caption are text ([`~data.tokens.tokenise`]).

    Args:
        processor (`transformers.ProcessorMixin`):
            With an `image_processor` and a `tokenizer`.
        image_column (`str`, defaults to `"image"`):
            Column with the image: what [`~imaging.decode_image`] takes.
        caption_column (`str`, defaults to `"caption"`):
            Column with the caption, or with a list of captions of which one is drawn each epoch.
        views (sequence of `str`, defaults to `("original",)`):
            The text views, all named differently. `"original"` is the caption as it is, any other name an augmented
            copy.
        text_augmentation (callable, *optional*):
            `(caption: str, seed: int) -> str`; `None` leaves the augmented views as they are.
        max_length (`int`, *optional*):
            Longest caption in tokens, longer ones are cut. `None`: the tokenizer's `model_max_length`.
        padding (`bool` or `str`, defaults to `True`):
            As of the tokenizer: `True` pads to the longest caption of the batch, `"max_length"` to `max_length`
            (what SigLIP was trained with).
        seed (`int`, defaults to 0):
            Seed of the text views.

    Example:

    ```python
    >>> collator = CLIPDataCollator(processor, views=("original", "augmented"), text_augmentation=TextAugmentation())
    >>> batch = collator([{"image": image, "caption": "a dog", "row_index": 0} for image in images])  # 4 rows
    >>> batch["pixel_values"].dtype, batch["pixel_values"].shape, batch["input_ids"].shape
    (torch.uint8, torch.Size([4, 3, 224, 224]), torch.Size([8, 5]))
    ```
    """

    def __init__(
        self,
        processor: Any,
        image_column: str = "image",
        caption_column: str = "caption",
        views: Sequence[str] = (ORIGINAL,),
        text_augmentation: Callable[[str, int], str] | None = None,
        max_length: int | None = None,
        padding: bool | str = True,
        seed: int = 0,
    ) -> None:
        check_processor(processor, "processor")
        accepted = "one or more different names, such as ('original',)"
        names = text_list("views", views, accepted)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"views must be {accepted}, but is {shown(views)}")
        if text_augmentation is not None:
            check_callable("text_augmentation", text_augmentation, "None or a function `(caption, seed) -> caption`")
        self.preprocess = ImagePreprocessor(processor.image_processor)
        self.tokenizer = processor.tokenizer
        self.image_column = image_column
        self.caption_column = caption_column
        self.views = tuple(names)
        self.text_augmentation = text_augmentation
        self.max_length = max_length
        self.padding = padding
        self.seed = seed
        self._first_caption_only = False
        # In shared memory, so that worker processes that live on through the epochs see the number change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def augmentation(self) -> Callable[[str, int], str] | None:
        """What it augments captions with: `None` where all of its views are originals."""
        return None if set(self.views) == {ORIGINAL} else self.text_augmentation

    def set_epoch(self, epoch: int) -> None:
        """Draw what belongs to this epoch (from 0) from now on, in worker processes too."""
        self._epoch.fill_(epoch)

    def with_views(self, views: Sequence[str]) -> CLIPDataCollator:
        """A copy that returns these text views; of several captions it draws the one that this collator does."""
        collator = copy(self)
        collator.views = tuple(views)
        return collator

    def for_evaluation(self) -> CLIPDataCollator:
        """A copy that returns the original captions only, and the first where a row has several."""
        collator = self.with_views((ORIGINAL,))
        collator._first_caption_only = True
        return collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (sequence of mappings): B rows with the image and the caption, and where known `"row_index"` (`int`),
                `"poisoned"` (`bool`) and `"bad_rows"` (`list[int]`).

        Returns:
            `dict[str, torch.Tensor]`, for V views:

            ```
            {'pixel_values': uint8 (B, 3, H, W),
             'input_ids': int64 (V*B, L), view after view,
             'attention_mask': int64 (V*B, L), and what else the tokenizer returns,
             'row_index': int64 (B,), 'poisoned': bool (B,), 'bad_rows': int64 (any number,), each where rows have it}
            ```

        Raises:
            [`~data.rows.BadRowError`]: If a column is missing, an image does not decode or a caption is not a string.
        """
        decoded = [decode_row(row, self.image_column, self.caption_column) for row in rows]
        pixels = self.preprocess([row[self.image_column] for row in decoded])
        epoch = int(self._epoch)
        keys = [self._key(row, pixels[i], epoch) for i, row in enumerate(decoded)]
        captions = [self._caption(row, key) for row, key in zip(decoded, keys, strict=True)]
        texts = [
            self._view(caption, key, view) for view in self.views for caption, key in zip(captions, keys, strict=True)
        ]
        tokens = tokenise(
            self.tokenizer,
            texts,
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        batch = {"pixel_values": pixels, **tokens}
        if all(ROW_INDEX in row for row in decoded):
            batch[ROW_INDEX] = torch.tensor([row[ROW_INDEX] for row in decoded])
        if all(isinstance(row.get(POISONED), bool) for row in decoded):
            batch[POISONED] = torch.tensor([row[POISONED] for row in decoded])
        bad = [index for row in decoded for index in row.get(BAD_ROWS, ())]
        if bad:
            batch[BAD_ROWS] = torch.tensor(bad)
        return batch

    def _key(self, row: Mapping[str, Any], pixels: torch.Tensor, epoch: int) -> int:
        number = row.get(ROW_INDEX)
        if number is None:
            text = "\n".join(captions_of(row[self.caption_column]))
            number = zlib.crc32(text.encode("utf-8", "surrogatepass"), zlib.crc32(pixels.numpy().tobytes()))
        return derive_seed(self.seed, epoch, int(number))

    def _caption(self, row: Mapping[str, Any], key: int) -> str:
        captions = captions_of(row[self.caption_column])
        return captions[0 if self._first_caption_only else derive_seed(key, -1) % len(captions)]

    def _view(self, caption: str, key: int, view: str) -> str:
        if view == ORIGINAL or self.text_augmentation is None:
            return caption
        return self.text_augmentation(caption, derive_seed(key, self.views.index(view)))


class RowsOnHost:
    """As another collator, but the numbers of the rows are an array, which no loader moves to a device."""

    def __init__(self, collator: CLIPDataCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        return {**batch, ROW_INDEX: batch[ROW_INDEX].numpy()} if ROW_INDEX in batch else batch
