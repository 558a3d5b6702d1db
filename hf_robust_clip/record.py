"""What a training run was, as plain data: what its model card, its report and the command line are made from."""

from __future__ import annotations

import json
import math
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .columns import scalar
from .files import RUN_FILE, write_text
from .wording import MOST, listed, shortened, shown

# A record may come from a file that anyone has written. A percentage of a larger number is not a number any more.
Number = Annotated[float, Field(strict=True, ge=-1e100, le=1e100)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Figures = dict[str, Number | None]


class Part(BaseModel):
    """A part of a record. It keeps entries that it has no field for: an evaluator may say more of itself."""

    model_config = ConfigDict(extra="allow")


class Model(Part):
    """
    What was trained.

    `name`, the Hub id of the model that training started from, and `revision`, the commit that it was loaded from;
    `source`, `"hub"`, `"folder"` or `"memory"`; `type`, as in its config; `adapter`, the settings of PEFT.
    """

    name: str | None
    type: str
    parameters: Count
    trainable_parameters: Count
    image_size: Count
    adapter: dict[str, Any] | None
    revision: str | None = None
    source: str = ""


class Filtered(Part):
    """What a scan left out of a dataset: its name, how many pairs, and of how many."""

    scan: str
    dropped: Count
    pairs: Count

    def __str__(self) -> str:
        return f"{self.scan} left out {self.dropped:,} of {self.pairs:,} pairs"


class Data(Part):
    """A dataset, as [`~describing.describe_dataset`] says."""

    rows: Count | None = None
    name: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    split: str | None = None
    fingerprint: str | None = None
    poisons: Count | None = None
    filtered: Filtered | None = None

    @property
    def title(self) -> str | None:
        """What to call it; `None` if nothing is known."""
        return self.hub_id or self.name


class Trigger(Part):
    """A trigger's name; its parameters are further entries."""

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """All but its name."""
        return self.model_extra or {}


class Measure(Part):
    """
    What an evaluator measures.

    `measure`, its kind; `figures`, their names; the others where it has them. `placebos`, how many an attack's success
    is compared with.
    """

    measure: str
    figures: list[str]
    images: Count | None = None
    queries: Count | None = None
    placebos: Count | None = None
    classes: list[str] | None = None
    templates: list[str] | None = None
    trigger: Trigger | None = None
    target: str | None = None
    dataset: Data | None = None


class Logged(Part):
    """Numbers at a time of training, `epoch`. Further entries are these numbers."""

    __pydantic_extra__: dict[str, Number | None] = {}

    epoch: Number

    @property
    def numbers(self) -> Figures:
        """All but the time."""
        return self.__pydantic_extra__


class Evaluation(Logged):
    """The evaluators' metrics at a step of training."""

    step: Number


class Environment(Part):
    """Where a run took place; `seconds` of training, evaluations included."""

    versions: dict[str, Any]
    device: str
    processes: Count
    precision: str
    seed: Count | None
    seconds: Number


class Histogram(Part):
    """How many clean and poisoned pairs there are of each similarity, from -1 to 1."""

    clean: list[Count]
    poisoned: list[Count]

    @model_validator(mode="after")
    def _pairs(self) -> Histogram:
        if len(self.clean) != len(self.poisoned) or not any(self.clean + self.poisoned):
            raise ValueError("histograms of clean and of poisoned pairs, as long as each other, with a pair in one")
        return self


class Split(Part):
    """
    A split of the pairs, as [`~defences.split.SplitRecord`] says, with their similarities. `safe_batches`, how many
    batches of all processes the safe pairs fill; `None` where it is not known.
    """

    epoch: Count
    safe_share: Share
    similarity_threshold: Number | None
    risky_mean: Number
    risky_variance: Number
    risky_weight: Number
    safe_mean: Number
    safe_variance: Number
    safe_weight: Number
    auroc: Share | None
    poisons_in_safe_set: Share | None
    safe_set_poison_rate: Share | None
    histogram: Histogram
    safe_batches: Count | None = None


class Details(Part):
    """What a defence notes down, such as `splits` of the pairs."""

    splits: list[Split] | None = None


class Augmentation(Part):
    """What augmented images and captions, whatever the presets say; `None` for nothing."""

    images: str | None
    captions: str | None


class Skipped(Part):
    """
    Rows that `on_bad_row="skip"` passed over.

    `count` of them; `rows`, the first numbers; `streamed`, whether these are positions in the stream of each worker.
    """

    count: Count
    rows: list[Count]
    streamed: bool

    def __str__(self) -> str:
        """How many, and which ones: "2: 3, 17"; the first ten of many."""
        positions = " (positions in the stream of each worker)" if self.streamed else ""
        first = self.rows[:MOST]
        more = self.count - len(first)
        return f"{self.count:,}: {listed(first)}{f' and {more:,} more' if more else ''}{positions}"


class _Plain(BaseModel):
    """What is read from a file and written to one, as data that JSON can hold."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, content: Any) -> Any:
        return jsonable(content)


class Measured(_Plain):
    """
    Metrics next to a run's, as `hf-robust-clip evaluate --json` writes them: of the same weights, or with `control`, a
    few words, of the model that those describe.
    """

    measures: list[Measure]
    figures: Figures
    control: str | None = None
    model: str = ""


# An empty mapping says as much as nothing.
_OR_NOTHING = BeforeValidator(lambda value: value or None)


class RunRecord(_Plain):
    """
    A training run, ready for JSON. Paths, tokens and data are not in it, beside what the arguments and the names say.

    Args:
        trainer (`str`): Name of the trainer's class.
        model ([`Model`]): What was trained.
        data ([`Data`], *optional*): The training pairs.
        defence (`dict`): The trainer's own arguments, all of them, and their defaults in `defence_defaults`.
        settings (`dict`): Other training arguments that differ from the defaults.
        measures (`list` of [`Measure`]): What each evaluator measures.
        before, after (`dict[str, float]`, *optional*): The evaluators' metrics before training, and of the weights
            that are saved.
        after_step (`int`, *optional*): The optimizer step that `after` is of.
        steps, epochs: Optimizer steps and epochs done.
        planned_steps (`int`): Optimizer steps of the whole training.
        environment ([`Environment`]): Where.
        course (`list` of [`Evaluation`]): The evaluators' metrics over training.
        log (`list` of [`Logged`]): The numbers that were logged, at most [`~describing.LOG_ENTRIES`] entries.
        details ([`Details`]): What a defence notes down.
        method (`str`): The trainer of the defence, or the class of a defence that does not ship.
        augmentation ([`Augmentation`], *optional*): What augmented images and captions.
        skipped ([`Skipped`], *optional*): Rows of the training data that were passed over.
    """

    model_config = ConfigDict(extra="forbid")

    trainer: str
    model: Model
    data: Data | None
    defence: dict[str, Any]
    settings: dict[str, Any]
    measures: list[Measure]
    before: Figures | None
    after: Figures | None
    after_step: Count | None
    steps: Count
    epochs: Number
    planned_steps: Count
    environment: Environment
    course: list[Evaluation] = []
    log: list[Logged] = []
    details: Details = Details()
    defence_defaults: dict[str, Any] = {}
    method: str = ""
    augmentation: Annotated[Augmentation | None, _OR_NOTHING] = None
    skipped: Annotated[Skipped | None, _OR_NOTHING] = None

    def to_json(self) -> str:
        """Its content as JSON."""
        content = jsonable(self.model_dump(exclude_defaults=True))
        return f"{json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the text") -> RunRecord:
        """
        What [`to_json`] wrote.

        Args:
            text (`str`): The JSON.
            where (`str`): What errors call it.

        Raises:
            `ValueError`: If it is not a record, or one of its entries is not what a record holds.
        """
        try:
            return checked(cls, json.loads(text), where)
        except json.JSONDecodeError as error:
            raise ValueError(shortened(f"{where} is not JSON: {error}")) from error
        except RecursionError as error:
            raise ValueError(f"{where} is not a record of a run: its entries are nested too deeply") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a model's folder, as JSON, in one move."""
        write_text(Path(folder, RUN_FILE), self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunRecord:
        """
        Read that of a model's folder.

        Raises:
            `ValueError`: If it has none, or if what it has is not a record.
        """
        path = Path(folder, RUN_FILE)
        if not path.is_file():
            raise ValueError(
                f"{shortened(str(folder), 200)} has no {RUN_FILE}: it was not saved by a trainer of hf_robust_clip"
            )
        return cls.from_json(path.read_text(encoding="utf-8"), shortened(str(path), 200))


Kind = TypeVar("Kind", bound=BaseModel)


def checked(kind: type[Kind], content: Any, where: str) -> Kind:
    """
    Plain data, as from JSON, as a record or as a part of one; `where` is what errors call it.

    Raises:
        `ValueError`: Naming the first entry that is not accepted, its value and what is.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field, *inner = first["loc"] or ("",)
    entry = field if field in kind.model_fields else shown(field)
    name = f"{where}: {entry}{''.join(f'[{shown(key)}]' for key in inner)}" if first["loc"] else where
    words = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    words = {"model_type": "a mapping", "dict_type": "a mapping", "list_type": "a list"}.get(first["type"], words)
    other = f"is {shown(first['input'])}; accepted is {words}"
    unknown = f"is not known; accepted are {listed(kind.model_fields)}"
    fault = {"missing": "is missing", "extra_forbidden": unknown}.get(first["type"], other)
    raise ValueError(shortened(f"{name} {fault}"))


def jsonable(value: Any) -> Any:
    """The same with `None` for numbers that JSON does not have, and text for what it has no form for."""
    if isinstance(value, BaseModel):
        return jsonable(value.model_dump())
    # Before text and numbers, which some enumerations are as well.
    if isinstance(value, Enum):
        return jsonable(value.value)
    value = scalar(value)
    if isinstance(value, dict):
        return {_encodable(str(key)): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(entry) for entry in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else _encodable(str(value))


def _encodable(text: str) -> str:
    """A text that UTF-8 can hold: half a pair of surrogates, as in an argument that is not UTF-8, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
