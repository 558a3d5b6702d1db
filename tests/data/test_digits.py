"""The embedded dataset, and the processor and models that are built for it in place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, BertConfig, BertModel, CLIPModel

from hf_robust_clip.data.digits import (
    CAPTION_TEMPLATES,
    CLASS_NAMES,
    IMAGE_SIZE,
    digit_model,
    digit_processor,
    load_digit_pairs,
)
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.models import load_dual_encoder, load_processor, longest_caption


@pytest.fixture(scope="module")
def held_out():
    return load_digit_pairs("test")


# ---- The dataset ----


def test_no_digit_is_in_both_splits(digits, held_out):
    train, test = set(digits["digit"]), set(held_out["digit"])
    assert len(train) == len(digits) == 1397 and len(test) == len(held_out) == 400
    assert not train & test and train | test == set(range(1797))
    # Nor under another seed or rendering.
    assert set(load_digit_pairs("test", renderings=2, seed=5)["digit"]) == test


def test_sizes_by_default():
    assert len(load_digit_pairs("train")) == 4 * 1397
    assert len(load_digit_pairs("test", renderings=3)) == 3 * 400


def test_both_splits_hold_every_class_in_like_shares(digits, held_out):
    for split in (digits, held_out):
        shares = np.bincount(split["label"], minlength=10) / len(split)
        assert shares.min() > 0.07 and shares.max() < 0.13


def test_captions_name_the_label(digits):
    used = set()
    for caption, label in zip(digits["caption"], digits["label"], strict=True):
        matching = [template for template in CAPTION_TEMPLATES if template.format(CLASS_NAMES[label]) == caption]
        assert len(matching) == 1
        used.add(matching[0])
    assert used == set(CAPTION_TEMPLATES)
    assert digits.features["label"].names == list(CLASS_NAMES)


def test_images_are_rgb_of_the_models_size(held_out):
    for image in held_out.select(range(20))["image"]:
        assert image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert 100 < np.asarray(image).max() <= 255


def rows(dataset) -> list[tuple]:
    columns = (dataset["caption"], dataset["label"], dataset["digit"])
    return [(image.tobytes(), *rest) for image, *rest in zip(dataset["image"], *columns, strict=True)]


def test_the_seed_decides(held_out):
    assert rows(load_digit_pairs("test")) == rows(held_out)
    other = load_digit_pairs("test", seed=1)
    same_image = [a == b for a, b in zip(rows(other), rows(held_out), strict=True)]
    assert not any(same_image)
    assert other["label"][:] == held_out["label"][:]


def test_renderings_differ_and_begin_alike(held_out):
    twice = rows(load_digit_pairs("test", renderings=2))
    assert twice[:400] == rows(held_out)
    assert len({image for image, *_ in twice}) == 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split must be 'train' or 'test', but is 'validation'"),
        ({"renderings": 0}, "renderings must be at least 1, but is 0"),
        ({"renderings": -1}, "renderings must be at least 1, but is -1"),
    ],
)
def test_what_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_digit_pairs(**arguments)


# ---- The tokenizer ----


def assert_no_unknown(processor, text: str) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    # CLIP's unknown token is its end token.
    assert tokenizer.eos_token_id not in ids[1:-1] and tokenizer.bos_token_id not in ids[1:]
    assert len(ids) <= tokenizer.model_max_length and max(ids) < len(tokenizer)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_is_unknown(processor, text: str):
    # A special token that is spelled out stands for itself, as in OpenAI's tokenizer.
    assume("<|" not in text)
    assert_no_unknown(processor, text)


def test_no_character_of_any_script_is_unknown(processor):
    for start in range(0, 0x30000, 97):
        characters = [chr(i) for i in range(start, start + 7) if not 0xD800 <= i <= 0xDFFF]
        assert_no_unknown(processor, " ".join(characters))
        assert_no_unknown(processor, "".join(characters))


def test_captions_of_the_digits_fit_whole_and_read_back(processor):
    for template in CAPTION_TEMPLATES:
        for name in CLASS_NAMES:
            caption = template.format(name)
            ids = processor.tokenizer(caption)["input_ids"]
            assert len(ids) <= processor.tokenizer.model_max_length
            assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
            # The words are tokens of their own, that a model can learn.
            assert len(ids) - 2 <= len(caption.split()) + 2


def test_the_tokenizer_is_the_same_each_time(processor):
    for _ in range(3):
        assert digit_processor().tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_processor_of_few_captions():
    small = build_processor(["a dog", "a cat"], image_size=32, merges=5, max_length=8)
    for text in ("a dog", "", "\u00e9\u4e2d\U0001f600", "x" * 100):
        assert_no_unknown(small, text)
    assert small.tokenizer.model_max_length == 8
    assert small.image_processor.crop_size == {"height": 32, "width": 32}


# ---- Models ----


def test_processor_and_model_save_and_load(tmp_path: Path, processor, tiny_model, pairs):
    model = tiny_model(1).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model, loaded = CLIPModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    inputs = {"images": list(pairs["image"]), "text": list(pairs["caption"]), "padding": True, "return_tensors": "pt"}
    expected, found = processor(**inputs), loaded(**inputs)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    for text in ("", "an unseen w\u00f6rd \U0001f600", "the number nine"):
        assert loaded.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.model_max_length == processor.tokenizer.model_max_length
    with torch.no_grad():
        assert torch.equal(model(**expected).logits_per_image, loaded_model(**found).logits_per_image)
    # As the trainers load them: by the folder's name.
    by_name = load_dual_encoder(str(tmp_path))
    assert isinstance(by_name, CLIPModel)
    assert load_processor(str(tmp_path), None).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert longest_caption(by_name, processor.tokenizer) == processor.tokenizer.model_max_length == 16


def test_the_seed_of_a_model_decides_and_the_global_generator_is_left_alone(tiny_model):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = tiny_model(1), tiny_model(1), tiny_model(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not second
    weights = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["visual_projection.weight"], weights[2]["visual_projection.weight"])


def test_the_text_of_a_caption_is_pooled_at_its_end(processor, tiny_model):
    model = tiny_model().eval()
    ids = processor.tokenizer(["the number nine", "the number nine"], padding="max_length", return_tensors="pt")
    ids["input_ids"][1, 5:] = 7  # behind the end token: CLIP's text tower is causal
    assert (ids["input_ids"][0, :5] == processor.tokenizer.eos_token_id).sum() == 1
    with torch.no_grad():
        features = model.get_text_features(**ids).pooler_output
    torch.testing.assert_close(features[0], features[1])


def test_the_demo_model_fits_its_processor():
    processor, model = digit_processor(), digit_model()
    assert 0.3e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.7e6
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.vision_config.image_size == IMAGE_SIZE
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id


def test_sizes_of_a_model(processor):
    model = build_model(processor, patch_size=8, vision_width=64, vision_layers=1, projection_dim=24)
    assert model.visual_projection.weight.shape == (24, 64)
    assert model.vision_model.embeddings.position_embedding.weight.shape[0] == 4 + 1


def test_a_model_that_is_no_dual_encoder_is_refused():
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
    with pytest.raises(ValueError, match=r"model must be a dual encoder .*BertModel has no get_image_features"):
        load_dual_encoder(BertModel(config))


def test_a_model_given_as_an_object_needs_its_processor(tiny_model, processor):
    with pytest.raises(ValueError, match="processing_class is None"):
        load_processor(tiny_model(), None)
    assert load_processor(tiny_model(), processor) is processor
