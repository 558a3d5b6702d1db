"""Embeddings of images and texts for evaluation, computed once and shared by the evaluators that need them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from ..augment.images import ImageNormalization
from ..data.images import ImagePreprocessor
from ..data.rows import undecoded
from ..imaging import decode_image
from ..models import caption_padding, longest_caption

Trigger = Callable[[np.ndarray], np.ndarray]


class Embedder:
    """
    Embeds images and texts with a dual encoder, and remembers what it has embedded.

    Make one for each state of the model: what it remembers belongs to the weights that it saw.

    Args:
        model (`PreTrainedModel`): A dual encoder, on its device.
        processor (`ProcessorMixin`): Its image processor and tokenizer.
        batch_size (`int`, defaults to 64): Images, or texts, encoded at a time.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 64) -> None:
        self.model = model
        self.tokenizer = processor.tokenizer
        self.batch_size = batch_size
        self.preprocess = ImagePreprocessor(processor.image_processor)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.normalization = ImageNormalization(self.preprocess.mean, self.preprocess.std).to(self.device)
        # Dataset and trigger are kept beside the embeddings, so that their ids cannot pass to others.
        self._images: dict[tuple[int, str, Hashable], tuple[Any, Trigger | None, torch.Tensor]] = {}
        self._texts: dict[tuple[str, ...], torch.Tensor] = {}

    def embed_images(self, dataset: Any, image_column: str = "image", trigger: Trigger | None = None) -> torch.Tensor:
        """
        Embed every image of a dataset, in order.

        Args:
            dataset (`datasets.Dataset` or sequence of mappings): N rows.
            image_column (`str`): Any image that [`~imaging.decode_image`] takes.
            trigger (callable, *optional*): Takes and returns a uint8 array `(H, W, 3)`, at the model's input
                resolution, before normalisation.

        Returns:
            `torch.Tensor` of shape `(N, D)`: float32, L2-normalised, on the CPU.

        Raises:
            `ValueError`: If an image does not decode (it names the row), or the trigger returns something else.
        """
        key = (id(dataset), image_column, trigger if isinstance(trigger, Hashable) else id(trigger))
        if key not in self._images:
            rows = undecoded(dataset, image_column, image_column)
            starts = range(0, len(rows), self.batch_size)
            description = "Embedding triggered images" if trigger is not None else "Embedding images"
            embeds = []
            with self._inference():
                for start in tqdm(starts, desc=description, leave=False, disable=None):
                    stop = min(start + self.batch_size, len(rows))
                    images = [self._image(rows[i][image_column], i, image_column) for i in range(start, stop)]
                    embeds.append(self._embed_pixels(images, trigger))
            self._images[key] = (dataset, trigger, torch.cat(embeds))
        return self._images[key][-1]

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """
        Embed texts.

        Returns:
            `torch.Tensor` of shape `(len(texts), D)`: float32, L2-normalised, on the CPU.
        """
        key = tuple(texts)
        if key not in self._texts:
            embeds = []
            with self._inference():
                for start in range(0, len(texts), self.batch_size):
                    tokens = self.tokenizer(
                        list(texts[start : start + self.batch_size]),
                        padding=caption_padding(self.model),
                        truncation=True,
                        max_length=longest_caption(self.model, self.tokenizer),
                        return_tensors="pt",
                    )
                    features = self.model.get_text_features(**tokens.to(self.device))
                    embeds.append(_normalize(features))
            self._texts[key] = torch.cat(embeds)
        return self._texts[key]

    def _image(self, value: Any, row: int, column: str) -> Image.Image:
        try:
            return decode_image(value)
        except ValueError as error:
            raise ValueError(f"row {row} of the evaluation images, column {column!r}: {error}") from error

    def _embed_pixels(self, images: Sequence[Image.Image], trigger: Trigger | None) -> torch.Tensor:
        pixels = self.preprocess(images)  # (B, 3, H, W)
        if trigger is not None:
            pixels = apply_trigger(trigger, pixels)
        pixels = self.normalization(pixels.to(self.device)).to(self.dtype)
        return _normalize(self.model.get_image_features(pixel_values=pixels))

    @contextmanager
    def _inference(self) -> Iterator[None]:
        # Module by module: a part that is kept in evaluation mode while the rest trains stays so.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def apply_trigger(trigger: Trigger, pixels: torch.Tensor) -> torch.Tensor:
    """
    Put a trigger on a batch of images.

    Args:
        trigger (callable): uint8 array `(H, W, 3)` to the same.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): uint8.

    Raises:
        `ValueError`: If the trigger does not fit the images, or returns something else.
    """
    arrays = [_triggered(np.ascontiguousarray(image), trigger) for image in pixels.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _triggered(pixels: np.ndarray, trigger: Trigger) -> np.ndarray:
    triggered = trigger(pixels)
    if not isinstance(triggered, np.ndarray) or triggered.dtype != np.uint8 or triggered.shape != pixels.shape:
        found = (
            f"{triggered.dtype} of shape {triggered.shape}"
            if isinstance(triggered, np.ndarray)
            else type(triggered).__name__
        )
        raise ValueError(f"trigger must return a uint8 array of shape {pixels.shape}, as it was given, not {found}")
    return triggered


def _normalize(features: Any) -> torch.Tensor:
    # transformers 5 returns an output object whose pooler_output is the projected, not normalised vector.
    features = getattr(features, "pooler_output", features)
    return F.normalize(features.float(), dim=-1).cpu()
