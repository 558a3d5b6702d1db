"""What a scan reads of pairs: features of a model, fingerprints of images, words of captions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ..augment.images import ImageNormalization
from ..columns import ROW_INDEX, captions_of
from ..data.images import ImagePreprocessor
from ..data.rows import IndexedDataset, decode_row
from ..data.tokens import tokenise
from ..models import caption_padding, inference, longest_caption
from .duplicates import fingerprint
from .groups import words_of


class Features(NamedTuple):
    """
    Of the pairs under one model, kept in files: `pooled (N, D)`, the vision tower's output before its projection,
    `images (N, E)` and `texts (N, E)`, the embeddings of images and first captions, all float16 and L2-normalised.
    """

    pooled: NDArray[np.float16]
    images: NDArray[np.float16]
    texts: NDArray[np.float16]


class _Collator:
    """Rows to pixels, tokens, fingerprints, and row numbers."""

    def __init__(self, processor: Any, model: Any, image_column: str, caption_column: str) -> None:
        self.columns = image_column, caption_column
        self.preprocess = ImagePreprocessor(processor.image_processor)
        self.tokenizer, self.padding = processor.tokenizer, caption_padding(model)
        self.max_length = longest_caption(model, processor.tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        image_column, caption_column = self.columns
        decoded = [decode_row(row, image_column, caption_column) for row in rows]
        tokens = tokenise(
            self.tokenizer,
            [captions_of(row[caption_column])[0] for row in decoded],
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        images = [row[image_column] for row in decoded]
        return {
            "pixel_values": self.preprocess(images),
            "tokens": dict(tokens),
            "fingerprints": np.array([fingerprint(image) for image in images], dtype=np.uint64),
            "rows": np.array([row[ROW_INDEX] for row in decoded]),
        }


def read_features(
    model: Any,
    processor: Any,
    dataset: Any,
    image_column: str,
    caption_column: str,
    folder: Path,
    batch_size: int,
    workers: int,
) -> tuple[Features, NDArray[np.uint64]]:
    """
    The features of all pairs under a model, un-augmented, in one pass, and the fingerprints of their images.

    Args:
        model: A dual encoder, on its device.
        processor (`ProcessorMixin`): Its image processor and tokenizer.
        dataset (map-style dataset), image_column, caption_column (`str`): The pairs.
        folder (`Path`): Where the features are kept, so that they take no memory.
        batch_size, workers (`int`): Of the loader.
    """
    collator = _Collator(processor, model, image_column, caption_column)
    rows = IndexedDataset(dataset, image_column, caption_column)
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collator,
        generator=torch.Generator(),
    )
    parameter = next(model.parameters())
    normalization = ImageNormalization(collator.preprocess.mean, collator.preprocess.std).to(parameter.device)
    fingerprints = np.zeros(len(rows), dtype=np.uint64)
    kept: Features | None = None
    with inference(model):
        for batch in loader:
            pixels = normalization(batch["pixel_values"].to(parameter.device)).to(parameter.dtype)
            tokens = {name: value.to(parameter.device) for name, value in batch["tokens"].items()}
            pooled, projected = encode_images(model, pixels)
            texts = model.get_text_features(**tokens)
            texts = F.normalize(getattr(texts, "pooler_output", texts).float(), dim=-1)
            parts = Features(*(part.half().cpu().numpy() for part in (pooled, projected, texts)))
            if kept is None:
                folder.mkdir(parents=True, exist_ok=True)
                shapes = {name: (len(rows), part.shape[1]) for name, part in parts._asdict().items()}
                kept = Features(**{name: _file(folder / f"{name}.npy", shape) for name, shape in shapes.items()})
            numbers = batch["rows"]
            for kept_part, part in zip(kept, parts, strict=True):
                kept_part[numbers] = part
            fingerprints[numbers] = batch["fingerprints"]
    assert kept is not None  # a dataset of no rows was refused
    return kept, fingerprints


def encode_images(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The vision tower's pooled output and the image's embedding, both float32 and L2-normalised; the same where a model
    has no projection of its own.

    Args:
        model: A dual encoder.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Normalised as it takes them.
    """
    seen: list[torch.Tensor] = []
    tower = getattr(model, "vision_model", None)
    with contextlib.ExitStack() as stack:
        if tower is not None:
            handle = tower.register_forward_hook(lambda module, args, output: seen.append(output.pooler_output))
            stack.callback(handle.remove)
        projected = model.get_image_features(pixel_values=pixels)
    projected = F.normalize(getattr(projected, "pooler_output", projected).float(), dim=-1)
    if not seen or seen[0] is None or seen[0].ndim != 2:
        return projected, projected
    return F.normalize(seen[0].float(), dim=-1), projected


def captions_in_blocks(dataset: Any, caption_column: str, size: int) -> Iterator[tuple[range, list[set[str]]]]:
    """The words of the captions of each row, some rows at a time."""
    columns = dataset.select_columns([caption_column]) if hasattr(dataset, "select_columns") else dataset
    for start in range(0, len(dataset), size):
        block = range(start, min(start + size, len(dataset)))
        yield block, [words_of(captions_of(columns[row][caption_column])) for row in block]


def _file(path: Path, shape: tuple[int, int]) -> Any:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
