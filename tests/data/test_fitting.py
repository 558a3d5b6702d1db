"""A model and a processor that do not go together are found out on one pair, and nothing is changed by the trial."""

from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from support.families import processor_for, siglip, vision_text_dual_encoder
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_robust_clip.data.collator import CLIPDataCollator
from hf_robust_clip.data.digits import digit_processor
from hf_robust_clip.data.fitting import check_fit


def with_tokens(*tokens: str, special: bool = False) -> Any:
    processor = digit_processor()
    processor.tokenizer.add_tokens(list(tokens), special_tokens=special)
    return processor


def with_images(**settings: Any) -> Any:
    processor = digit_processor()
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    return processor


def naflex() -> tuple[Any, Any]:
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "photo", "of"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 6, "max_position_embeddings": 16, "projection_size": 32}
    config = transformers.Siglip2Config(text_config=text, vision_config={**tower, "num_patches": 16, "patch_size": 8})
    images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    return transformers.Siglip2Model(config), transformers.Siglip2Processor(images, tokenizer)


@pytest.mark.parametrize("training", [False, True])
def test_what_goes_together_passes_and_nothing_changes(training: bool, tiny_model: Any, processor: Any) -> None:
    for model in (tiny_model(), siglip(), vision_text_dual_encoder()):
        model.train(training)
        model.vision_model.eval()
        modes = [module.training for module in model.modules()]
        given = processor_for(model)
        torch.manual_seed(5)
        state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
        check_fit(model, given)
        check_fit(model, given, CLIPDataCollator(given, max_length=16, padding="max_length"))
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            with_tokens("zebracorn", "snowleopard"),
            r"ids up to \d+ \('snowleopard'\), but the model has \d+ token",
        ),
        (
            with_images(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
            "makes images of 32 x 32, but the model takes 16 x 16",
        ),
    ],
    ids=["tokens", "size"],
)
def test_what_does_not_go_together_is_refused(given: Any, message: str, training: bool, tiny_model: Any) -> None:
    collator = CLIPDataCollator(given) if training else None
    with pytest.raises(ValueError, match=message) as caught:
        check_fit(tiny_model(), given, collator)
    assert len(str(caught.value)) <= 600 and "\n" not in str(caught.value)


def test_images_that_are_not_cropped_must_be_of_one_shape(tiny_model: Any) -> None:
    def rows(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
        return [{"image": Image.new("RGB", size), "caption": "a dog"} for size in sizes]

    given = with_images(do_center_crop=False)
    collator = CLIPDataCollator(given)
    for dataset in (None, rows((40, 40), (20, 20)), [{"image": b"broken", "caption": "a"}, *rows((9, 9))]):
        check_fit(tiny_model(), given, collator, dataset)
    check_fit(tiny_model(), given)
    with pytest.raises(ValueError, match=r"makes no batch of images of 2 sizes.*set do_center_crop"):
        check_fit(tiny_model(), given, collator, rows((40, 40), (40, 20)))
    with pytest.raises(ValueError, match=r"makes images of 16 x 32, but the model takes 16 x 16"):
        check_fit(tiny_model(), given, collator, rows((40, 20)))


def test_captions_longer_than_the_model_takes_are_refused(tiny_model: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match=r"max_length=200 is longer than the model's 16"):
        check_fit(tiny_model(), processor, CLIPDataCollator(processor, max_length=200))


def test_patches_in_place_of_pixels_are_refused() -> None:
    model, processor = naflex()
    with pytest.raises(ValueError, match=r"pixel_values of shape \(2, 16, 192\).*SigLIP 2 NaFlex"):
        check_fit(model, processor)


def test_a_token_that_no_caption_becomes_needs_no_embedding(tiny_model: Any) -> None:
    check_fit(tiny_model(), with_tokens("<image>", special=True))


def test_where_clip_looks_for_the_end_of_a_caption(
    tiny_model: Any, processor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.config.text_config.eos_token_id = 7
    with pytest.raises(ValueError, match=r"ends captions with id 1 .* reads them at id 7"):
        check_fit(model, processor)
    # The number with which the first configurations were published: the token of the highest number ends a caption.
    model.config.text_config.eos_token_id = 2
    check_fit(model, processor)
    assert "set text_config.eos_token_id" in caplog.text


def test_a_model_without_weights_is_checked_by_its_configuration(tiny_model: Any, processor: Any) -> None:
    model = tiny_model().to("meta")
    check_fit(model, processor)
    with pytest.raises(ValueError, match="token embeddings"):
        check_fit(model, with_tokens("zebracorn"))


def test_a_collator_that_needs_more_of_a_row_is_left_alone(tiny_model: Any, processor: Any) -> None:
    class Own(CLIPDataCollator):
        def __call__(self, rows: Any) -> Any:
            return {**super().__call__(rows), "source": [row["source"] for row in rows]}

    check_fit(tiny_model(), processor, Own(processor))
