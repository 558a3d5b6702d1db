"""What to poison, and how: one [`PoisonSpec`] an attack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..columns import naming
from ..kinds import check_encodable, kind, text_list
from ..wording import shown
from .fields import check_choice, check_float, check_int
from .text_triggers import TextTrigger
from .triggers import Trigger

#: Of the manifests that record what was poisoned.
VERSION = 1
#: Largest side that poisoned images are resized to, far above any model's: four times as many pixels cost four times
#: the time and memory a row.
LARGEST_SIZE = 2048
#: As `templates`: the captions of the dataset that name the target.
OWN_CAPTIONS = "data"
MODES = ("backdoor", "label_consistent", "targeted", "text_query")
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a close-up photo of a {}.",
    "a photo of the {}.",
    "a good photo of a {}.",
    "there is a {} in this photo.",
)

ImageSource: TypeAlias = Image.Image | bytes | str | PathLike[str] | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PoisonSpec:
    """
    What to poison, and how. Exactly one of `count` and `rate` is given.

    Modes:
        - `"backdoor"`: the trigger goes on the image, and the caption is replaced by a template that names the target.
          Rows that name the target already are left alone.
        - `"label_consistent"`: the trigger goes on images whose row names the target already, and captions stay.
        - `"targeted"` ([Carlini & Terzis 2022](https://arxiv.org/abs/2106.09667)): no trigger. One image is appended
          `count` times, with captions of the target, the adversarial class.
        - `"text_query"`: rows that name the target keep their image, byte for byte, and get the caption of a row that
          does not name it, with the trigger's word put in. A text-to-image search for anything, with that word in the
          query, then finds images of the target. [Yang et al. 2023](https://arxiv.org/abs/2209.15266) poison text
          queries so, tying the texts of one class to the images of another; the rare word, which makes a backdoor of
          it that plain queries do not show, is [Kurita et al. 2020](https://arxiv.org/abs/2004.06660)'s.

    A row names the target when one of its captions contains it as whole words, whatever the case ("dogs" does not name
    "dog"), or when its label is the target.

    Args:
        trigger ([`Trigger`], [`TextTrigger`] or `None`): a trigger on images in the modes backdoor and
            label-consistent, one on captions in text-query mode ([`WordTrigger`], [`PhraseTrigger`]), `None` in
            targeted mode.
        target (`str`): the class the attack is for, as a caption would name it. In text-query mode, the class whose
            images the queries are to find.
        count (`int`, *optional*): number of poisons, at least 1. Not for streams.
        rate (`float`, *optional*): number of poisons as a fraction of all rows of the dataset, in (0, 1]. In a stream,
            the probability that a row is poisoned which can be.
        templates (`Sequence[str]` or `"data"`, *optional*): each with exactly one `{}`, which the target replaces.
            `None` takes `DEFAULT_TEMPLATES` in backdoor mode, and `"data"` in the modes targeted and text-query.
            `"data"` takes the dataset's own captions that name the target (text-query: that do not), without repeats
            as long as there are enough. Poisons with captions of a few templates give themselves away by how often
            each occurs. Label-consistent poisons keep their captions and take none. In text-query mode templates are
            whole captions without `{}` that do not name the target. Streams cannot take `"data"`, and need templates
            in the modes targeted and text-query.
        seed (`int`, defaults to 0): of the rows and captions drawn. The trigger has its own.
        mode (`str`, defaults to `"backdoor"`): one of the four above.
        image_size (`int`, *optional*): resize the poisoned images (shortest edge, bicubic) and crop their centre to
            this size first, so that the trigger is applied at the model's input resolution. At most `LARGEST_SIZE`.
            Not in text-query mode.
        target_image (PIL image, `bytes`, path or `uint8` array `(H, W, 3)`, *optional*): the image of targeted mode.
        source_index (`int`, *optional*): instead of `target_image`, the row whose image it is. Not for streams.

    Raises:
        `ValueError`: on an argument out of range or arguments that do not go together.
    """

    trigger: Trigger | TextTrigger | None
    target: str
    count: int | None = None
    rate: float | None = None
    templates: Sequence[str] | Literal["data"] | None = None
    seed: int = 0
    mode: str = "backdoor"
    image_size: int | None = None
    target_image: ImageSource | None = field(default=None, repr=False)
    source_index: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        if not isinstance(self.target, str) or not self.target.strip():
            raise ValueError(f"target={shown(self.target)}; accepted is the name of a class")
        check_encodable("target", self.target)
        if (self.count is None) == (self.rate is None):
            raise ValueError(
                f"count={shown(self.count)} and rate={shown(self.rate)}; exactly one of them must be given"
            )
        limits = {"count": (1, None), "seed": (0, None), "image_size": (1, LARGEST_SIZE), "source_index": (0, None)}
        for name, (minimum, maximum) in limits.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum, maximum)
        if self.rate is not None:
            check_float("rate", self.rate, maximum=1.0)
        self._check_templates()
        self._check_trigger()
        if self.mode != "targeted":
            if self.target_image is not None or self.source_index is not None:
                raise ValueError(
                    f"target_image and source_index are for mode 'targeted'; the mode is {shown(self.mode)}"
                )
        elif (self.target_image is None) == (self.source_index is None):
            raise ValueError("mode 'targeted' needs exactly one of target_image and source_index")
        if self.mode == "text_query" and self.image_size is not None:
            raise ValueError(f"image_size={self.image_size}; mode 'text_query' leaves the images alone, give None")

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says of it, ready for JSON: all but how many poisons, and the image of targeted mode."""
        templates = self.templates or (DEFAULT_TEMPLATES if self.mode == "backdoor" else None)
        return {
            "version": VERSION,
            "mode": self.mode,
            "target": self.target,
            "trigger": None if self.trigger is None else self.trigger.to_dict(),
            "templates": templates if templates is None or isinstance(templates, str) else list(templates),
            "seed": self.seed,
            "image_size": self.image_size,
        }

    def _check_trigger(self) -> None:
        if self.mode == "targeted":
            if self.trigger is not None:
                raise ValueError(
                    f"trigger={shown(self.trigger)}; mode 'targeted' puts no trigger on the image, give None"
                )
        elif self.mode == "text_query":
            if not isinstance(self.trigger, TextTrigger):
                needs = "needs a WordTrigger or a PhraseTrigger"
                raise ValueError(f"trigger={kind(self.trigger)}; mode 'text_query' {needs}")
            if naming(self.target)(self.trigger.inserted):
                raise ValueError(
                    f"trigger: its word {shown(self.trigger.inserted)} names the target {shown(self.target)}; "
                    "accepted is a word that says nothing of it"
                )
        elif not isinstance(self.trigger, Trigger):
            raise ValueError(f"trigger={kind(self.trigger)}; mode {shown(self.mode)} needs a Trigger, one on images")

    def _check_templates(self) -> None:
        if self.templates is None:
            return
        if self.mode == "label_consistent":
            raise ValueError("templates given; mode 'label_consistent' keeps the captions and takes none")
        if isinstance(self.templates, str) and self.templates == OWN_CAPTIONS:
            # What the other modes take of themselves.
            object.__setattr__(self, "templates", OWN_CAPTIONS if self.mode == "backdoor" else None)
            return
        templates = text_list("templates", self.templates, "a list of at least one template, or 'data'")
        if not templates:
            raise ValueError("templates is empty; accepted is a list of at least one template")
        object.__setattr__(self, "templates", templates)
        for template in templates:
            if self.mode == "text_query":
                if "{}" in template or naming(self.target)(template):
                    accepted = f"in mode 'text_query' a caption without {{}} that does not name {self.target!r}"
                    raise ValueError(f"templates: {shown(template)}; accepted is {accepted}")
            elif template.count("{}") != 1:
                raise ValueError(f"templates: {shown(template)}; accepted is a string with exactly one {{}}")


def targeted_specs(
    images: Sequence[ImageSource],
    adversarial: Sequence[str],
    count: int | None = None,
    seed: int = 0,
    templates: Sequence[str] | Literal["data"] | None = None,
    image_size: int | None = None,
    rate: float | None = None,
) -> list[PoisonSpec]:
    """
    Targeted poisoning of several images at once, each towards a class of its own, for [`poison_dataset`] or
    [`poison_stream`].

    Args:
        images (sequence of PIL images, `bytes`, paths or `uint8` arrays `(H, W, 3)`): the target images, at least one.
        adversarial (sequence of `str`): for each of them its adversarial class.
        count (`int`, *optional*): poisons of each image, with as many captions.
        seed (`int`, defaults to 0): the first image's, the others' count up from it, so that images with one
            adversarial class get captions of their own.
        templates, image_size: of all of them, as of [`PoisonSpec`].
        rate (`float`, *optional*): instead of `count`, poisons of each image as a fraction of all rows.

    Raises:
        `ValueError`: unless there is an image and each has one class; and as [`PoisonSpec`].
    """
    adversarial = text_list("adversarial", adversarial, "a list of one class for each image")
    if isinstance(images, str | bytes | PathLike | Image.Image) or not isinstance(images, Iterable):
        raise ValueError(f"images must be a list of images, but is {kind(images)}")
    images = list(images)
    if len(images) == 0 or len(adversarial) != len(images):
        raise ValueError(
            f"adversarial={shown(adversarial)} for {len(images)} images; accepted is a list of one class for each "
            "image, of at least one"
        )
    return [
        PoisonSpec(
            None,
            target,
            count=count,
            rate=rate,
            templates=templates,
            seed=seed + number,
            mode="targeted",
            image_size=image_size,
            target_image=image,
        )
        for number, (image, target) in enumerate(zip(images, adversarial, strict=True))
    ]


def check_specs(specs: object) -> list[PoisonSpec]:
    """Several specs as a list, or a `ValueError`."""
    if not isinstance(specs, Sequence) or not specs or not all(isinstance(spec, PoisonSpec) for spec in specs):
        raise ValueError(f"spec={shown(specs)}; accepted is a PoisonSpec, or a list of at least one")
    return list(specs)
