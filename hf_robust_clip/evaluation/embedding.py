"""Embeddings of images and texts for evaluation, computed once and shared by the evaluators that need them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..augment.images import ImageNormalization
from ..data.fitting import check_fit
from ..data.images import ImagePreprocessor
from ..data.tokens import tokenise
from ..distributed import rank
from ..models import (
    caption_padding,
    check_processor,
    inference,
    load_dual_encoder,
    load_processor,
    longest_caption,
)
from .pixels import ImageRequest, PixelTrigger, pixel_batches
from .sharing import share_batches

_Key = tuple[int, str, Hashable]


class Embedder:
    """
    Embeds images and texts with a dual encoder, and remembers what it has embedded.

    Make one for each state of the model: what it remembers belongs to the weights that it saw.

    Args:
        model (`PreTrainedModel` or `str`): A dual encoder, on its device; or a Hub id or a folder to load one from.
            What is wrapped around it is taken off.
        processor (`ProcessorMixin`, *optional*): Its image processor and tokenizer. `None`: those saved beside the
            model that is loaded.
        batch_size (`int`, defaults to 64): Images, or texts, encoded at a time.
        requests (iterable of [`~evaluation.pixels.ImageRequest`], *optional*): What will be asked for. Of a dataset,
            everything requested is embedded in one pass, in which each image is decoded once.
        across_ranks (`bool`, defaults to `False`): Share the work among the processes of the default group. Then all
            of them must ask for the same, in the same order. Batches are what they are in one process, and go whole
            to one rank or another, so that the embeddings are the same to the last bit.
        check (`bool`, defaults to `True`): Try model and processor on one pair first ([`~data.fitting.check_fit`]).

    Raises:
        `ValueError`: If model and processor do not go together.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        batch_size: int = 64,
        requests: Iterable[tuple[Any, str, PixelTrigger | None]] = (),
        across_ranks: bool = False,
        check: bool = True,
    ) -> None:
        processor = load_processor(model, processor, "processor")
        check_processor(processor, "processor")
        self.model = model = load_dual_encoder(model)
        if check:
            check_fit(model, processor)
        self.tokenizer = processor.tokenizer
        self.batch_size = batch_size
        self.requests = [ImageRequest(*request) for request in requests]
        self.across_ranks = across_ranks
        self.preprocess = ImagePreprocessor(processor.image_processor)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.normalization = ImageNormalization(self.preprocess.mean, self.preprocess.std).to(self.device)
        # Dataset and trigger are kept beside the embeddings, so that their ids cannot pass to others.
        self._images: dict[_Key, tuple[ImageRequest, torch.Tensor]] = {}
        self._texts: dict[tuple[str, ...], torch.Tensor] = {}

    def embed_images(
        self, dataset: Any, image_column: str = "image", trigger: PixelTrigger | None = None
    ) -> torch.Tensor:
        """
        Embed every image of a dataset, in order.

        Args:
            dataset (`datasets.Dataset` or sequence of mappings): N rows.
            image_column (`str`): Any image that [`~imaging.decode_image`] takes.
            trigger (callable, *optional*): Takes and returns a uint8 array `(H, W, 3)`, at the model's input
                resolution, before normalisation. It runs in threads, so it must be a function of the pixels alone.

        Returns:
            `torch.Tensor` of shape `(N, D)`: float32, L2-normalised, on the CPU.

        Raises:
            `ValueError`: If an image does not decode (it names the row), or the trigger returns something else.
        """
        asked = ImageRequest(dataset, image_column, trigger)
        if _key(asked) not in self._images:
            wanted = {_key(asked): asked}
            for planned in self.requests:
                same_images = planned.dataset is dataset and planned.image_column == image_column
                if same_images and _key(planned) not in self._images:
                    wanted[_key(planned)] = planned
            self._embed_requests(wanted)
        return self._images[_key(asked)][-1]

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """
        Embed texts.

        Returns:
            `torch.Tensor` of shape `(len(texts), D)`: float32, L2-normalised, on the CPU.
        """
        key = tuple(texts)
        if key not in self._texts:
            self._texts[key] = self._embed(
                len(key), lambda batches: ([self.encode_texts(key[batch.start : batch.stop])] for batch in batches)
            )[0]
        return self._texts[key]

    def _embed_requests(self, wanted: dict[_Key, ImageRequest]) -> None:
        """Embed images of one dataset and column, clean and triggered, in one pass."""
        first = next(iter(wanted.values()))
        triggers = [request.trigger for request in wanted.values()]

        def encoded(batches: Sequence[range]) -> Iterator[list[torch.Tensor]]:
            pixels = pixel_batches(first.dataset, first.image_column, self.preprocess, triggers, batches)
            hidden = True if self.across_ranks and rank() > 0 else None  # None: where there is no terminal
            for variants in tqdm(pixels, "Embedding images", total=len(batches), leave=False, disable=hidden):
                yield [self.encode_pixels(variant) for variant in variants]

        embeds = self._embed(len(first.dataset), encoded)  # (V, N, D)
        for (key, request), variant in zip(wanted.items(), embeds, strict=True):
            self._images[key] = (request, variant)

    def _embed(self, length: int, encode: Callable[[Sequence[range]], Iterator[list[torch.Tensor]]]) -> torch.Tensor:
        """What `encode` makes of the batches of so many rows, `(V, N, D)`, in order."""
        batches = [range(start, min(start + self.batch_size, length)) for start in range(0, length, self.batch_size)]

        def embed(own: Sequence[range]) -> torch.Tensor:
            with inference(self.model):
                return torch.cat([torch.stack(variants) for variants in encode(own)], dim=1)

        return share_batches(batches, embed) if self.across_ranks else embed(batches)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Encode a batch of images, with gradients where they are on, and remember nothing.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): uint8, or floats in [0, 1], of the model's size.

        Returns:
            `torch.Tensor` of shape `(B, D)`: float32, L2-normalised, on the CPU.
        """
        pixels = self.normalization(pixels.to(self.device)).to(self.dtype)
        return _normalize(self.model.get_image_features(pixel_values=pixels))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[`encode_pixels`] of texts: `(len(texts), D)`."""
        tokens = tokenise(
            self.tokenizer,
            texts,
            padding=caption_padding(self.model),
            truncation=True,
            max_length=longest_caption(self.model, self.tokenizer),
            return_tensors="pt",
        )
        return _normalize(self.model.get_text_features(**tokens.to(self.device)))


def _key(request: ImageRequest) -> _Key:
    trigger = request.trigger
    return id(request.dataset), request.image_column, trigger if isinstance(trigger, Hashable) else id(trigger)


def _normalize(features: Any) -> torch.Tensor:
    # transformers 5 returns an output object whose pooler_output is the projected, not normalised vector.
    features = getattr(features, "pooler_output", features)
    return F.normalize(features.float(), dim=-1).cpu()
