"""A small CLIP from nothing: tokenizer, processor and model for training on one's own pairs without a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_processor(
    captions: Iterable[str], image_size: int, merges: int = 2000, max_length: int = 32
) -> CLIPProcessor:
    """
    A CLIP processor with a byte-pair tokenizer learned from captions.

    Every byte stays in the vocabulary, so that no text is unknown: CLIP's unknown token is its end token, which would
    cut a caption short.

    Args:
        captions (iterable of `str`): What the merges are learned from.
        image_size (`int`): Side of the model's square images.
        merges (`int`): Most byte pairs to merge.
        max_length (`int`): Longest caption in tokens, both special ones included.
    """
    alphabet = sorted(ByteLevel.alphabet())
    base = [_START, _END, *alphabet, *(symbol + "</w>" for symbol in alphabet)]
    bare = CLIPTokenizer(vocab={token: i for i, token in enumerate(base)}, merges=[], model_max_length=max_length)
    # Named in advance, because the trainer numbers symbols that end a word as it meets them, in an order that varies
    # from run to run, and breaks ties between equally frequent pairs by these numbers.
    learned = bare.train_new_from_iterator(
        captions, vocab_size=len(base) + merges, new_special_tokens=base[2:], show_progress=False
    )
    pairs: Any = [tuple(pair) for pair in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*base, *(left + right for left, right in pairs)])
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=pairs, model_max_length=max_length
    )
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def build_model(
    processor: CLIPProcessor,
    patch_size: int = 4,
    vision_width: int = 96,
    vision_layers: int = 4,
    text_width: int = 64,
    text_layers: int = 2,
    projection_dim: int = 64,
    seed: int = 0,
) -> CLIPModel:
    """
    An untrained CLIP that fits a processor, the same for the same seed; torch's global generator is left as it was.

    Args:
        processor (`CLIPProcessor`): Gives the image size, the vocabulary and the longest caption.
        patch_size (`int`): Side of the vision tower's patches, a divisor of the image's.
        vision_width, text_width (`int`): Hidden sizes; heads are 32 wide, feed-forward layers four times as wide.
        vision_layers, text_layers (`int`): Depths.
        projection_dim (`int`): Size of the embeddings.
        seed (`int`): Of the initial weights.
    """
    tokenizer = processor.tokenizer
    config = CLIPConfig(
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": max(1, text_width // 32),
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(1, vision_width // 32),
            "image_size": processor.image_processor.crop_size["height"],
            "patch_size": patch_size,
        },
        projection_dim=projection_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = CLIPModel(config)
    # At its stock scale of 0.02 a small ViT needs many epochs to tell positions apart.
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.mul_(10)
        model.text_model.embeddings.position_embedding.weight.mul_(10)
    return model
