"""Unbind: fine-tuning on clean pairs under universal perturbations, which removes a backdoor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..arguments import IMAGE_PRESETS, TEXT_PRESETS, CLIPTrainingArguments, check_choice
from ..augment.universal import Family, family_classes, family_counts
from ..batch import Batch, Embeddings
from ..distributed import world_size
from ..losses import unbind_loss
from ..methods import ANYTHING, Line, Method, Panel, Series
from ..seeding import derive_seed, forked_rng
from ..wording import shown
from .base import Defence, Plan

ADVERSARIES = ("universal", "none")
#: What the arguments that are left at `None` become.
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {
        "image_preset": "identity",
        "text_preset": "identity",
        "adversary": "none",
        "perturbed_weight": 1.0,
        "unimodal_weight": 0.0,
        "fade_to": 0.1,
        "warp_budget": 0.1,
    },
    "photos": {
        "image_preset": "cleanclip",
        "text_preset": "eda",
        "adversary": "universal",
        "perturbed_weight": 0.5,
        "unimodal_weight": 1.0,
        "fade_to": 1.0,
        "warp_budget": 0.14,
    },
}


@dataclass
class UnbindTrainingArguments(CLIPTrainingArguments):
    """
    Arguments of [`UnbindTrainer`]. The recipe around the method is CleanCLIP's: 10 epochs over about 100,000 clean
    pairs, batch 64, learning rate 1e-5 with 50 warm-up steps and a cosine, AdamW with weight decay 0.1. A higher
    learning rate removes more of the backdoor and costs more clean accuracy.

    Args:
        preset (`str`, defaults to `"plain"`): What the arguments are that are left at `None`. `"plain"`: perturbed
            images and their captions, without augmentation, fading out towards the end. `"photos"`: the same on top of
            CleanCLIP's augmentation and with its terms within images and within captions, without fading.
        families (`dict` or `str`, *optional*): How many perturbations there are of each family, such as
            `{"add": 2, "patch": 2, "warp": 2}` or `"add=2,patch=2,warp=2"`, which is the default. One that is left
            out has none. See [`~augment.universal.Family`] for one of your own.
        adversary (`str`, *optional*): `"none"`: each step draws the perturbations anew. `"universal"`: each step moves
            them to where the loss is larger. `None`: `"none"` of `"plain"`, since it was not worth its cost on digits,
            and `"universal"` of `"photos"`, where it was.
        perturbed_weight (`float`, *optional*): Weight of the CLIP loss of perturbed images, at least 0. `None`: 1 of
            `"plain"`, 0.5 of `"photos"`.
        unimodal_weight (`float`, *optional*): Weight of CleanCLIP's terms, between images and their perturbed copies
            and between captions and augmented ones, at least 0. `None`: 0 of `"plain"`, 1 of `"photos"`.
        fade_from (`float`, defaults to 0.6): Share of training, in [0, 1], from which on `perturbed_weight` fades.
        fade_to (`float`, *optional*): What share of it is left at the end, in [0, 1]; it falls in a line. 1: no
            fading. `None`: 0.1 of `"plain"`, 1 of `"photos"`.
        add_budget (`float`, defaults to 0.08): Largest root mean square of an added pattern, on the scale [0, 1].
        warp_budget (`float`, *optional*): Largest mean shift of a warp, as a share of the side. `None`: 0.1 of
            `"plain"`, 0.14 of `"photos"`.
        ascent (`float`, defaults to 0.2): Of the adversary: how far a step moves a perturbation, as a share of its
            budget, above 0.
        redraw (`float`, defaults to 0.15): Of the adversary: probability, in [0, 1], that a step draws a perturbation
            anew instead.
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size per device for training."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Number of epochs over the clean pairs."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; logit_scale is exempt."})
    warmup_steps: float = field(default=50, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    preset: str = field(
        default="plain", metadata={"help": f"What arguments are that are not given: {', '.join(PRESETS)}."}
    )
    image_preset: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}; else the preset's."},
    )
    text_preset: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}; else the preset's."},
    )
    families: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Perturbations of each family; by default add=2,patch=2,warp=2."}
    )
    adversary: str | None = field(
        default=None,
        metadata={"help": "What moves the perturbations: universal, or none, which draws anew; else the preset's."},
    )
    perturbed_weight: float | None = field(
        default=None, metadata={"help": "Weight of the CLIP loss of perturbed images; else the preset's."}
    )
    unimodal_weight: float | None = field(
        default=None, metadata={"help": "Weight of the terms within images and captions; else the preset's."}
    )
    fade_from: float = field(default=0.6, metadata={"help": "Share of training from which on perturbed_weight fades."})
    fade_to: float | None = field(
        default=None, metadata={"help": "Share of perturbed_weight at the end; else the preset's."}
    )
    add_budget: float = field(
        default=0.08, metadata={"help": "Largest root mean square of an added pattern, on the scale [0, 1]."}
    )
    warp_budget: float | None = field(
        default=None,
        metadata={"help": "Largest mean shift of a warp, as a share of the side; else the preset's."},
    )
    ascent: float = field(
        default=0.2, metadata={"help": "Of the adversary: how far a step goes, as a share of the budget."}
    )
    redraw: float = field(default=0.15, metadata={"help": "Of the adversary: probability that a step draws one anew."})

    def __post_init__(self) -> None:
        check_choice(self, "preset", PRESETS)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self.families = family_counts("add=2,patch=2,warp=2" if self.families is None else self.families)
        check_unbind(self)


def check_unbind(args: Any) -> None:
    """`ValueError` for arguments of Unbind, by their names, that are out of range."""
    check_choice(args, "adversary", ADVERSARIES)
    for name, accepted, fits in (
        ("perturbed_weight", "at least 0", lambda value: value >= 0),
        ("unimodal_weight", "at least 0", lambda value: value >= 0),
        ("fade_from", "in [0, 1]", lambda value: 0 <= value <= 1),
        ("fade_to", "in [0, 1]", lambda value: 0 <= value <= 1),
        ("add_budget", "above 0 and at most 1", lambda value: 0 < value <= 1),
        ("warp_budget", "above 0 and at most 1", lambda value: 0 < value <= 1),
        ("ascent", "above 0 and at most 1", lambda value: 0 < value <= 1),
        ("redraw", "in [0, 1]", lambda value: 0 <= value <= 1),
    ):
        value = getattr(args, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
            raise ValueError(f"{name} must be {accepted}, but is {shown(value)}")
    if args.perturbed_weight == args.unimodal_weight == 0:
        raise ValueError(
            "perturbed_weight and unimodal_weight are both 0, so that this is plain fine-tuning: one must be above 0, "
            "or use CLIPTrainer"
        )


class Perturbations(nn.Module):
    """
    A pool of universal perturbations, which can learn beside a model. Its buffers hold the parameters of each family,
    the same on every rank.

    Args:
        families (mapping of [`~augment.universal.Family`] to `int`): How many there are of each.
        seed (`int`): With the step and a perturbation's number, of what is drawn of it.
        learns (`bool`): Whether a step moves them up their gradient; otherwise it draws all of them anew.
        ascent (`float`): How far, as a share of their budget.
        redraw (`float`): Probability that a step draws one anew instead.
    """

    def __init__(
        self, families: Mapping[Family, int], seed: int, learns: bool = True, ascent: float = 0.2, redraw: float = 0.15
    ) -> None:
        super().__init__()
        self.families = {f"{place}_{family.name}": family for place, family in enumerate(families)}
        self.counts = list(families.values())
        self.seed, self.learns, self.ascent, self.redraw = seed, learns, ascent, redraw
        self.size: tuple[int, int] | None = None  # of the images last seen
        self.clear()

    @property
    def drawn(self) -> bool:
        """Whether there are any, as from the first images on."""
        return all(parameters is not None for parameters in self._buffers.values())

    def clear(self) -> None:
        """Forget them: the next images, whose size they have, draw them."""
        for name in self.families:
            self.register_buffer(name, None)

    def forget_gradients(self) -> None:
        """Of a step that was not made."""
        for parameters in self.buffers():
            parameters.grad = None
            parameters.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Deal the perturbations to images as evenly as it goes, and apply them: one operation a family.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Floats in [0, 1].

        Returns:
            `torch.Tensor`: As `images`, with gradients for the perturbations.
        """
        self.size = (int(images.shape[-2]), int(images.shape[-1]))
        if not self.drawn:
            self._draw(images.device)
        total, batch = sum(self.counts), len(images)
        # Which of them serve one image more than others is drawn as well, or a batch of fewer would leave some out.
        dealt = torch.randperm(total)[torch.arange(batch) % total].sort().values
        order = torch.randperm(batch, device=images.device)
        # Autocast would round the places of a warp.
        with torch.autocast(images.device.type, enabled=False):
            done, shuffled = [], images[order]
            first, start = 0, 0
            for (name, family), count in zip(self.families.items(), self.counts, strict=True):
                numbers = dealt[(dealt >= first) & (dealt < first + count)] - first
                part = shuffled[start : start + len(numbers)]
                if len(part):
                    parameters = self.get_buffer(name).requires_grad_(self.learns)
                    done.append(family.apply(part, parameters[numbers.to(images.device)]))
                first, start = first + count, start + len(part)
            return torch.cat(done)[order.argsort()]

    @torch.no_grad()
    def step(self, number: int) -> None:
        """
        Move the perturbations up the gradients that came to them since the last step, or draw them anew. Call it on
        all ranks: each adds its gradients to those of the others.

        Args:
            number (`int`): Of the optimizer step, from 0.
        """
        if self.size is None:
            return  # no image was perturbed
        gradients = self._summed_gradients() if self.learns else {}
        self.forget_gradients()
        first = 0
        for (name, family), count in zip(self.families.items(), self.counts, strict=True):
            parameters = self.get_buffer(name)
            if name in gradients:
                parameters.copy_(family.step(parameters, gradients[name], self.ascent))
            for place in range(count):
                generator = self._generator(number + 1, first + place)
                if not self.learns or torch.rand((), generator=generator) < self.redraw:
                    parameters[place].copy_(family.draw(self.size, generator))
            first += count

    def pictures(self) -> dict[str, Image.Image]:
        """What each looks like, by its name; none before the first images."""
        found = {}
        for (name, family), count in zip(self.families.items(), self.counts, strict=True):
            for place in range(count if self.size is not None and self.drawn else 0):
                assert self.size is not None
                with forked_rng(self.seed, torch.device("cpu")), torch.no_grad():
                    pixels = family.picture(self.get_buffer(name)[place].detach(), self.size)  # (3, H, W)
                array = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
                found[f"{family.name} {place + 1}"] = Image.fromarray(array)
        return found

    def _draw(self, device: torch.device) -> None:
        assert self.size is not None
        first = 0
        for (name, family), count in zip(self.families.items(), self.counts, strict=True):
            places = range(first, first + count)
            drawn = torch.stack([family.draw(self.size, self._generator(0, place)) for place in places])
            self.register_buffer(name, drawn.to(device))
            first += count

    def _generator(self, step: int, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, step, place))

    def _summed_gradients(self) -> dict[str, torch.Tensor]:
        """Those of all ranks, by family."""
        parts = {name: self.get_buffer(name) for name in self.families}
        owed = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts.values()]
        flat = torch.cat([part.flatten() for part in owed])
        if world_size() > 1:
            torch.distributed.all_reduce(flat)
        pieces = flat.split([part.numel() for part in owed])
        return {name: piece.view_as(part) for (name, part), piece in zip(parts.items(), pieces, strict=True)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        held = {name: len(value) for name, value in saved.items()}
        wanted = dict(zip(self.families, self.counts, strict=True))
        if held != wanted:
            raise ValueError(
                f"the checkpoint holds perturbations {shown(held)}, but families asks for {shown(wanted)} now: resume "
                "with the arguments of the interrupted run"
            )
        for name, value in saved.items():
            self.register_buffer(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Unbind(Defence):
    """
    Beside the images as they are, the model learns the captions of images under a small pool of universal
    perturbations, each the same for all images that it is dealt: additions, patches and warps. They must not change
    what an image means, so that a trigger, which is such a perturbation, loses its meaning. The pool is drawn anew at
    each step, or learns against the model, by the gradients that each step has anyway.

    Args:
        families (mapping or `str`): How many perturbations there are of each family. Keys are names, or objects of
            [`~augment.universal.Family`], which have budgets of their own.
        adversary (`str`): `"none"`: every step draws all perturbations anew; or `"universal"`.
        perturbed_weight (`float`): Of the CLIP loss of perturbed images.
        unimodal_weight (`float`): Of CleanCLIP's terms within each modality. 0: captions are encoded once, and not
            augmented.
        fade_from, fade_to (`float`): The share of training from which on `perturbed_weight` falls in a line, and the
            share of it at the end.
        add_budget, warp_budget (`float`): Of the families of these names.
        ascent (`float`): How far a step moves a perturbation, as a share of its budget.
        redraw (`float`): Probability that a step draws one anew instead.
        seed (`int`): Of what is drawn of the pool.

    Raises:
        `ValueError`: If one is out of range.
    """

    method = Method(
        name="Unbind",
        what="Fine-tuned with Unbind on pairs taken to be clean: images under a small pool of universal "
        "perturbations, such as patterns, patches and warps, keep their captions, which loosens what a trigger has "
        "tied together.",
        kind="fine-tuning",
        limits=(
            "It needs clean pairs: with ten poisons of each attack left among the pairs, it left 34.5% attack success "
            "on small models of digits, and CleanCLIP 20.6%.",
            "It is new: it was measured on small models only, and never against an attacker who knows of it.",
            "It covers what its families cover: triggers that are the same for all images and lie near an addition, a "
            "patch or a warp. A trigger that is a change of meaning, or differs between images, is none of these.",
            "It was not made against words in captions as triggers; no defence in hf_robust_clip was.",
            ANYTHING,
        ),
    )
    arguments = UnbindTrainingArguments
    series = Series(
        heading="What Unbind perturbed",
        caption="From the training log. Left: mean cosine similarity of images and their captions, and of images and "
        "their perturbed copies. Right: the weight of the loss of perturbed images.",
        panels=(
            Panel(
                "Cosine similarity",
                (
                    Line("pair_similarity", "images and their captions", "text"),
                    Line("perturbed_pair_similarity", "perturbed images and the captions", "attack"),
                    Line("perturbed_similarity", "images and their perturbed copies"),
                ),
            ),
            Panel("Weight", (Line("perturbed_weight", "weight of perturbed images", "target"),)),
        ),
    )
    views = ("original", "perturbed")

    def __init__(
        self,
        families: Mapping[str | Family, int] | str = "add=2,patch=2,warp=2",
        adversary: str = "none",
        perturbed_weight: float = 1.0,
        unimodal_weight: float = 0.0,
        fade_from: float = 0.6,
        fade_to: float = 0.1,
        add_budget: float = 0.08,
        warp_budget: float = 0.1,
        ascent: float = 0.2,
        redraw: float = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adversary, self.ascent, self.redraw = adversary, ascent, redraw
        self.perturbed_weight, self.unimodal_weight = perturbed_weight, unimodal_weight
        self.fade_from, self.fade_to = fade_from, fade_to
        self.add_budget, self.warp_budget = add_budget, warp_budget
        check_unbind(self)
        self.text_views = self.views if unimodal_weight else ("original",)
        # The pool learns through the vision tower.
        self.needs_gradient = frozenset({"vision", "text"} if unimodal_weight else {"vision"})
        counts = _family_objects(families, {"add": add_budget, "warp": warp_budget})
        self.pool = Perturbations(counts, seed, adversary == "universal", ascent, redraw)
        self._steps, self._step = 0, 0

    def weight(self, step: int) -> float:
        """The weight of the loss of perturbed images in a step, from 0."""
        if not self._steps:
            return self.perturbed_weight
        gone = (step / self._steps - self.fade_from) / max(1 - self.fade_from, 1e-9)
        return self.perturbed_weight * (1 - (1 - self.fade_to) * min(max(gone, 0.0), 1.0))

    def make_view(
        self, name: str, images: torch.Tensor, augment: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """The perturbed view: the augmented images under the pool."""
        if name != "perturbed":
            return None
        perturbed: torch.Tensor = self.pool(augment(images))
        return perturbed

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (images, texts), (perturbed, augmented) = views["original"], views["perturbed"]
        self._step, weight = batch.step, self.weight(batch.step)
        self.note(
            {
                "perturbed_weight": torch.tensor(weight, device=images.device),
                "perturbed_similarity": (images * perturbed).sum(dim=-1).detach(),
                "perturbed_pair_similarity": (texts * perturbed).sum(dim=-1).detach(),
            }
        )
        return unbind_loss(
            images, texts, perturbed, augmented, scale, weight, self.unimodal_weight, self.gather, batch.bias
        )

    def after_backward(self) -> None:
        """The pool's own step."""
        self.pool.step(self._step)

    def begin_training(self, plan: Plan) -> None:
        self._steps = plan.steps

    def begin_epoch(self, epoch: int, score: Any) -> dict[str, float]:
        """Drop what is left of a step that a callback ended an epoch within."""
        self.pool.forget_gradients()
        return {}

    def reset(self) -> None:
        self.pool.clear()

    def pictures(self) -> dict[str, Image.Image]:
        """The pool as training left it."""
        return self.pool.pictures()


def _family_objects(families: Mapping[Any, int] | str, budgets: Mapping[str, float]) -> dict[Family, int]:
    """How many perturbations there are of each family, those that are named with these budgets where they have one."""
    given: Any = families
    own: dict[str, Family] = {}
    if isinstance(families, Mapping):
        own = {key.name: key for key in families if isinstance(key, Family)}
        given = {key.name if isinstance(key, Family) else key: count for key, count in families.items()}
        if len(given) < len(families):
            raise ValueError(f"families={shown(families)} has a family twice; accepted is each once")
    classes = family_classes()
    return {
        own.get(name) or classes[name](**({"budget": budgets[name]} if name in budgets else {})): count
        for name, count in family_counts(given).items()
    }
