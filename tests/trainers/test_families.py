"""Any dual encoder of transformers trains: tiny random models of five families take CleanCLIP steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import altclip, chinese_clip, clip, processor_for, siglip, vision_text_dual_encoder
from support.training import digits, make_trainer, training_log

from hf_robust_clip import CleanCLIPTrainer, ZeroShotEvaluator
from hf_robust_clip.data.digits import CAPTION_TEMPLATES, CLASS_NAMES
from hf_robust_clip.models import longest_caption


@pytest.mark.parametrize("family", [clip, siglip, altclip, chinese_clip, vision_text_dual_encoder])
def test_family_trains_and_evaluates(family: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = family()
    processor = processor_for(model)
    test = digits("test").select(range(10))
    trainer = make_trainer(
        CleanCLIPTrainer,
        tmp_path,
        model=model,
        processing_class=processor,
        evaluators=[ZeroShotEvaluator(test, CLASS_NAMES, templates=CAPTION_TEMPLATES)],
        eval_dataset=test,
        max_steps=3,
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert "logit_scale" in changed
    assert any("text" in name for name in changed)
    assert any("vision" in name for name in changed)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in training_log(trainer))
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_clean_accuracy"] <= 1
    assert metrics["eval_loss"] > 0
    assert longest_caption(model, processor.tokenizer) == 16


def test_evaluator_embeds_as_the_forward_pass_does() -> None:
    from hf_robust_clip.evaluation.embedding import Embedder

    test = digits("test").select(range(6))
    for family in (clip, siglip, altclip, chinese_clip, vision_text_dual_encoder):
        torch.manual_seed(0)
        model = family().eval()
        processor = processor_for(model)
        embedder = Embedder(model, processor)
        images, texts = embedder.embed_images(test), embedder.embed_texts(list(test["caption"]))
        pixels = processor.image_processor(list(test["image"]), return_tensors="pt")["pixel_values"]
        padding = "max_length" if model.config.model_type == "siglip" else True
        tokens = processor.tokenizer(
            list(test["caption"]), padding=padding, truncation=True, max_length=16, return_tensors="pt"
        )
        with torch.no_grad():
            outputs = model(pixel_values=pixels, **tokens)
        torch.testing.assert_close(images, outputs.image_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(texts, outputs.text_embeds, rtol=1e-4, atol=1e-5)
