"""Unbind: a pool of universal perturbations, drawn at random or by the gradients that there are anyway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.training import assert_same_bits, make_trainer, small_model, train_and_resume, training_log

from hf_robust_clip import CLIPTrainer, UnbindTrainer, UnbindTrainingArguments
from hf_robust_clip.augment.universal import Add, Family, Warp
from hf_robust_clip.batch import Batch, Embeddings
from hf_robust_clip.cli.train_flags import method_parser, training_arguments
from hf_robust_clip.defences import Unbind
from hf_robust_clip.defences.base import Plan
from hf_robust_clip.defences.unbind import Perturbations
from hf_robust_clip.losses import clip_loss, info_nce, unbind_loss

#: Without what depends on where a row stands in a batch: one perturbation for all.
ONE: dict[str, Any] = {"families": "add=1", "redraw": 0.0, "train_sampling_strategy": "sequential"}


def unbind(folder: Path, **overrides: Any) -> CLIPTrainer:
    overrides["model"] = overrides["model"] if "model" in overrides else small_model()
    return make_trainer(UnbindTrainer, folder, **{"max_steps": 3, "adversary": "universal", **overrides})


def one(folder: Path, **overrides: Any) -> CLIPTrainer:
    return unbind(folder, **{**ONE, "model": small_model(dropout=0.0), **overrides})


def embeddings(seed: int, rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 5, generator=generator), dim=1)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    images, texts, perturbed, augmented = map(embeddings, range(4))
    plain = unbind_loss(images, texts, perturbed, None, 7.0, 0.3)
    assert plain == {
        "clip_loss": clip_loss(images, texts, 7.0),
        "perturbed_clip_loss": 0.3 * clip_loss(perturbed, texts, 7.0),
    }
    photos = unbind_loss(images, texts, perturbed, augmented, 7.0, 0.5, 1.0)
    assert photos["unimodal_image_loss"] == 0.5 * info_nce(images, perturbed, 7.0)
    assert photos["unimodal_text_loss"] == 0.5 * info_nce(texts, augmented, 7.0)
    with pytest.raises(ValueError, match="text_augmented is None, but unimodal_weight=1"):
        unbind_loss(images, texts, perturbed, None, 7.0, 0.5, 1.0)


def test_perturbations_are_dealt_evenly_and_the_same_for_all_their_images() -> None:
    pool = Perturbations({Add(): 3, Warp(): 2}, seed=0)
    images = torch.full((13, 3, 16, 16), 0.5)
    *added, _ = (pool(images) - images).flatten(1).round(decimals=5).unique(dim=0, return_counts=True)[1].sort().values
    # A warp leaves images of one color as they are.
    assert len(added) == 3 and set(map(int, added)) <= {2, 3}
    few = [pool(images[:2]) for _ in range(40)]
    assert len(torch.cat(few).flatten(1).round(decimals=5).unique(dim=0)) == 4  # none is left out for long


def test_a_view_is_made_in_one_operation_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    for family in (Add, Warp):
        apply = family.apply

        def counted(self: Any, images: Any, parameters: Any, apply: Any = apply) -> Any:
            calls.append((self.name, len(images)))
            return apply(self, images, parameters)

        monkeypatch.setattr(family, "apply", counted)
    Perturbations({Add(): 3, Warp(): 3}, seed=0)(torch.rand(12, 3, 8, 8))
    assert calls == [("add", 6), ("warp", 6)]


def test_captions_are_encoded_once_and_images_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    for preset, texts in (("plain", 8), ("photos", 16)):
        trainer = unbind(tmp_path, preset=preset, max_steps=1)
        forward = trainer.model.forward

        def watched(*args: Any, forward: Any = forward, **inputs: Any) -> Any:
            seen.append((len(inputs["pixel_values"]), len(inputs["input_ids"])))
            return forward(*args, **inputs)

        monkeypatch.setattr(trainer.model, "forward", watched)
        trainer.train()
        assert seen.pop() == (16, texts) and not seen


def test_the_pool_moves_against_the_model(tmp_path: Path) -> None:
    """The loss of the perturbed images is larger under the pool as it was moved, for the same model and images."""
    trainer = one(tmp_path, learning_rate=1e-9, max_steps=6, rows=8)
    trainer.train()
    losses = [entry["perturbed_clip_loss"] for entry in training_log(trainer)]
    assert losses[3] > losses[0]  # before it fades
    pool = trainer.defence.pool.get_buffer("0_add")
    assert pool.square().mean().sqrt() <= 0.08 * 1.001 and not pool.requires_grad and pool.grad is None


def fresh() -> torch.Tensor:
    pool = Perturbations({Add(): 1}, seed=0)
    pool(torch.rand(1, 3, 16, 16))
    return pool.get_buffer("0_add")


def test_chunks_give_the_pool_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    whole, chunked = (one(tmp_path, max_steps=2, contrastive_chunk_size=size) for size in (None, 3))
    for trainer in (whole, chunked):
        trainer.train()
    first, second = (trainer.defence.pool.get_buffer("0_add") for trainer in (whole, chunked))
    assert not torch.equal(first, fresh())
    torch.testing.assert_close(first, second, rtol=0, atol=2e-5)


@pytest.mark.parametrize("given", [{}, {"contrastive_chunk_size": 3}], ids=str)
def test_in_half_precision_the_pool_stays_in_single(given: dict[str, Any], tmp_path: Path) -> None:
    trainer = unbind(tmp_path, bf16=True, max_steps=2, redraw=0.0, **given)
    trainer.train()
    assert {value.dtype for value in trainer.defence.buffers()} == {torch.float32}
    assert not torch.equal(trainer.defence.pool.get_buffer("0_add")[:1], fresh())


def test_gradients_of_several_batches_add_up() -> None:
    pool = Perturbations({Add(): 1}, seed=0)
    for weight in (1.0, 2.0):
        (weight * pool(torch.full((2, 3, 8, 8), 0.5))).sum().backward()
    assert torch.equal(pool._summed_gradients()["0_add"], torch.full((1, 3, 8, 8), 6.0))


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "photos", "gradient_accumulation_steps": 2, "adversary": "universal"},
        {},
        {"contrastive_chunk_size": 3, "adversary": "universal"},
        {"families": {"warp": 1, "patch": 4}, "redraw": 0.5, "adversary": "universal", "dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_it_resumes_to_the_bit(given: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = train_and_resume(UnbindTrainer, tmp_path, 3, max_steps=6, **given)
    assert_same_bits(whole, resumed)
    assert any(name.startswith("pool.") for name in whole.training_state())


def test_without_the_adversary_each_step_draws_the_pool_anew(tmp_path: Path) -> None:
    trainer = unbind(tmp_path, adversary="none", max_steps=1)
    trainer.train()
    first = {name: value.clone() for name, value in trainer.defence.named_buffers()}
    images = torch.rand(6, 3, 16, 16)
    assert not trainer.defence.pool(images).requires_grad
    trainer.defence.pool.step(1)
    for name, value in trainer.defence.named_buffers():
        assert all(not torch.equal(one, other) for one, other in zip(first[name], value, strict=True))


def test_a_training_from_the_start_begins_with_a_pool_of_its_own(tmp_path: Path) -> None:
    trainer = unbind(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.defence.pool.drawn
    trainer.defence.reset()
    assert not trainer.defence.pool.drawn and not trainer.defence.state_dict()


def test_a_checkpoint_of_other_families_is_refused(tmp_path: Path) -> None:
    unbind(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    for families in ("add=1,patch=2,warp=2", "add=2,patch=2", "warp=6"):
        with pytest.raises(ValueError, match=r"the checkpoint holds perturbations .* but families asks for"):
            unbind(tmp_path / "other", families=families).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_weight_fades() -> None:
    defence = Unbind(perturbed_weight=0.5, fade_from=0.6, fade_to=0.1)
    assert defence.weight(50) == 0.5  # not told how long training takes
    defence.begin_training(Plan(100, 1, 1, 8))
    weights = [defence.weight(step) for step in (0, 60, 80, 100)]
    assert weights == pytest.approx([0.5, 0.5, 0.275, 0.05])
    constant = Unbind(fade_to=1.0)
    constant.begin_training(Plan(100, 1, 1, 8))
    assert {constant.weight(step) for step in range(101)} == {1.0}


def test_its_presets_and_what_goes_before_them(tmp_path: Path) -> None:
    def arguments(**given: Any) -> UnbindTrainingArguments:
        return UnbindTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **given)

    plain, photos = arguments(), arguments(preset="photos", fade_to=0.5, text_preset="light")
    assert (plain.image_preset, plain.perturbed_weight, plain.unimodal_weight, plain.fade_to) == (
        "identity",
        1,
        0,
        0.1,
    )
    assert plain.families == {"add": 2, "patch": 2, "warp": 2}
    assert (photos.image_preset, photos.text_preset, photos.fade_to) == ("cleanclip", "light", 0.5)
    assert (plain.adversary, photos.adversary) == ("none", "universal")
    assert (photos.perturbed_weight, photos.unimodal_weight, photos.warp_budget) == (0.5, 1, 0.14)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "paintings"}, "preset must be one of 'plain', 'photos'"),
        ({"adversary": "mine"}, "adversary must be one of 'universal', 'none'"),
        ({"families": "magic=1"}, "'magic' is not a family"),
        ({"redraw": 1.5}, r"redraw must be in \[0, 1\], but is 1.5"),
        ({"ascent": 0}, "ascent must be above 0"),
        ({"fade_to": -0.1}, r"fade_to must be in \[0, 1\]"),
        ({"fade_from": float("nan")}, r"fade_from must be in \[0, 1\], but is nan"),
        ({"add_budget": 0}, "add_budget must be above 0"),
        ({"warp_budget": 2}, "warp_budget must be above 0 and at most 1"),
        ({"perturbed_weight": -1}, "perturbed_weight must be at least 0"),
        ({"perturbed_weight": 0}, "perturbed_weight and unimodal_weight are both 0"),
        (
            {"text_preset": "eda"},
            "text_preset='eda', would change nothing: Unbind as it is takes captions un-augmented",
        ),
        ({"text_augmentation": lambda caption, seed: caption}, "text_augmentation, or text_preset='identity', would"),
    ],
    ids=lambda value: str(value).partition(" <")[0],
)
def test_what_cannot_be_is_refused_before_the_first_step(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        unbind(tmp_path, **given)
    assert len(str(error.value)) <= 600


def test_families_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    parser, required = (
        method_parser("unbind", "train unbind"),
        ["--train-data", "x", "--output-dir", str(tmp_path / "o")],
    )
    (tmp_path / "c.yaml").write_text("families: {add: 1, patch: 3}\npreset: photos\n")
    for flags, expected in (
        (["--families", "add=1,warp=2"], {"add": 1, "warp": 2}),
        (["--families", '{"patch": 1}'], {"patch": 1}),
        (["--config", str(tmp_path / "c.yaml")], {"add": 1, "patch": 3}),
        ([], {"add": 2, "patch": 2, "warp": 2}),
    ):
        assert training_arguments("unbind", parser.parse_args([*required, *flags])).families == expected
    with pytest.raises(ValueError, match="'ad' is not a family"):
        training_arguments("unbind", parser.parse_args([*required, "--families", "ad=2"]))


@dataclass(frozen=True)
class Fog(Family):
    """A family of one's own: it takes contrast away."""

    name: ClassVar[str] = "fog"
    budget: float = 0.2

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        return self.budget * torch.rand(1, generator=generator)

    def apply(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return images + parameters[:, :, None, None] * (0.5 - images)

    def project(self, parameters: torch.Tensor) -> torch.Tensor:
        return parameters.clamp(0, self.budget)


def test_families_of_ones_own_and_with_budgets_of_their_own(tmp_path: Path) -> None:
    named = unbind(tmp_path, families="fog=2,add=1", add_budget=0.02)
    objects = make_trainer(
        CLIPTrainer,
        tmp_path,
        max_steps=2,
        defence=Unbind(adversary="universal", families={Fog(budget=0.1): 2, Warp(budget=0.01): 1, "patch": 1}),
    )
    for trainer in (named, objects):
        trainer.train()
    sizes = {name: value.abs().amax().item() for name, value in named.defence.pool.named_buffers()}
    assert sizes.keys() == {"0_fog", "1_add"} and sizes["0_fog"] <= 0.2
    assert named.defence.pool.get_buffer("1_add").square().mean().sqrt() <= 0.0201
    assert objects.defence.pool.get_buffer("0_fog").max() <= 0.1
    assert objects.defence.pool.get_buffer("1_warp").abs().mean() <= 0.0101
    with pytest.raises(ValueError, match="has a family twice"):
        Unbind(families={Warp(budget=0.01): 1, "warp": 1})


def test_adapters_are_trained_under_it(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = one(tmp_path, peft_config=config, max_steps=2)
    before = fresh()
    trainer.train()
    assert not torch.equal(trainer.defence.pool.get_buffer("0_add"), before)


def test_a_step_that_an_epoch_ended_within_leaves_no_gradients(tmp_path: Path) -> None:
    defence = Unbind(adversary="universal")
    defence.pool(torch.rand(6, 3, 8, 8)).sum().backward()
    defence.begin_epoch(1, None)
    assert all(part.grad is None and not part.requires_grad for part in defence.buffers())


def test_terms_of_a_batch_are_logged_and_the_report_shows_the_pool(tmp_path: Path) -> None:
    trainer = unbind(tmp_path, max_steps=2, preset="photos")
    assert trainer.pictures().own == {}
    trainer.train()
    expected = {"clip_loss", "perturbed_clip_loss", "unimodal_image_loss", "unimodal_text_loss", "perturbed_weight"}
    assert expected <= training_log(trainer)[0].keys()
    names = [f"{family} {number}" for family in ("add", "patch", "warp") for number in (1, 2)]
    assert list(trainer.pictures().own) == names
    trainer.save_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "What Unbind perturbed" in page and all(f'alt="Picture of {name}"' in page for name in names)


def test_it_does_not_touch_what_is_measured() -> None:
    defence = Unbind()
    assert defence.make_view("original", torch.rand(2, 3, 8, 8), lambda images: images) is None
    pairs = Embeddings(embeddings(0), embeddings(1))
    batch = Batch({"pixel_values": torch.zeros(6)})
    terms = defence({"original": pairs, "perturbed": pairs}, torch.tensor(5.0), batch)
    assert terms["clip_loss"] == terms["perturbed_clip_loss"]
