"""What all evaluators have in common: what is measured, on which images, and which way is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from ..kinds import check_callable, check_string
from ..wording import shown
from .embedding import Embedder
from .pixels import ImageRequest, PixelTrigger, check_trigger

Better = Literal["more", "less"]
_Value = TypeVar("_Value")


class Evaluator(ABC):
    """
    Measures a model: `(model, processor, embedder=None) -> dict[str, float]`.

    A subclass says what its `metrics` are and how it `measure`s them. A trainer then knows the names and which way is
    better before it has measured anything, embeds the images of all its evaluators in one pass, and records what was
    measured.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Rows with an image.
        image_column (`str`, defaults to `"image"`): Column with the image.
        prefix (`str`, *optional*): Put before the metrics' names.

    Example:

    ```python
    >>> class Spread(Evaluator):
    ...     name = "spread"
    ...
    ...     def metrics(self):
    ...         return {"spread": "more"}
    ...
    ...     def measure(self, embedder):
    ...         images = embedder.embed_images(self.dataset, self.image_column)  # (N, D), L2-normalised
    ...         return {"spread": 1 - images.mean(dim=0).norm().item()}
    ```
    """

    #: What it measures, in words.
    name: ClassVar[str]
    #: Between the prefix and the name of a metric.
    separator: ClassVar[str] = ""
    # Where an evaluator has them, they are part of what it describes.
    class_names: list[str] | None = None
    templates: list[str] | None = None
    trigger: Callable[..., Any] | None = None
    target: Any = None

    def __init__(self, dataset: Any, image_column: str = "image", prefix: str = "") -> None:
        self.dataset = dataset
        self.image_column = image_column
        self.prefix = check_string("prefix", prefix)

    @abstractmethod
    def metrics(self) -> dict[str, Better]:
        """The name of each metric, without the prefix, and whether more or less of it is better."""

    @abstractmethod
    def measure(self, embedder: Embedder) -> dict[str, float]:
        """The value of each metric, without the prefix, for the embedder's model."""

    def image_requests(self) -> list[ImageRequest]:
        """The image sets that it needs embedded."""
        return [ImageRequest(self.dataset, self.image_column)]

    def check(self, processor: Any) -> None:  # noqa: B027  # most have nothing to refuse
        """Refuse what does not go with a model's processor, before any image is embedded."""

    def sizes(self) -> dict[str, int]:
        """How many `images`, or `queries`, the metrics are over."""
        return {"images": len(self.dataset)}

    def describe(self) -> dict[str, Any]:
        """What it measures, on what, and the names of its metrics."""
        known = {"class_names": "classes", "templates": "templates", "trigger": "trigger", "target": "target"}
        stated = {key: value for name, key in known.items() if (value := getattr(self, name)) is not None}
        return {"measure": self.name, "figures": list(self.prefixed(self.metrics())), **self.sizes(), **stated}

    def prefixed(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
        """The same values under the names that are reported."""
        return {f"{self.prefix}{self.separator}{name}": value for name, value in values.items()}

    def __call__(self, model: Any, processor: Any = None, embedder: Embedder | None = None) -> dict[str, float]:
        return self.prefixed(self.measure(embedder or Embedder(model, processor, requests=self.image_requests())))


class TriggerEvaluator(Evaluator):
    """An [`Evaluator`] of images without and with a trigger, `None` for none, that steers them to `target`."""

    def __init__(
        self, dataset: Any, trigger: PixelTrigger | None, target: Any, image_column: str, prefix: str
    ) -> None:
        super().__init__(dataset, image_column, prefix)
        if (trigger is None) != (target is None):
            raise ValueError(
                f"trigger={shown(trigger)} and target={shown(target)} go together: give what the trigger steers to, "
                "or neither"
            )
        if trigger is not None:
            check_callable("trigger", trigger, "a function of images, such as PatchTrigger()")
        self.trigger = trigger
        self.target = target

    def image_requests(self) -> list[ImageRequest]:
        """The image sets that it needs embedded."""
        triggers = [None] if self.trigger is None else [None, self.trigger]
        return [ImageRequest(self.dataset, self.image_column, trigger) for trigger in triggers]

    def check(self, processor: Any) -> None:
        """Refuse a trigger that does not fit the model's images, before any is embedded."""
        if self.trigger is not None:
            check_trigger(self.trigger, processor)
