"""What a record's entries must be before anything is made from it: it may come from a file that anyone has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .wording import listed, shortened, shown

#: Larger numbers are no figures: with them a percentage or a product is no number any more.
_LARGEST = 1e100


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _is_histogram(value: Any) -> bool:
    counts = [value.get(kind) for kind in ("clean", "poisoned")] if isinstance(value, Mapping) else []
    lists = [entry for entry in counts if isinstance(entry, list) and all(map(_is_count, entry))]
    return len(lists) == 2 and len(lists[0]) == len(lists[1]) and any(map(any, lists))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


#: What a single value may be, in the words of an error.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": _is_number,
    "a share in [0, 1]": lambda value: _is_number(value) and 0 <= value <= 1,
    "a whole number": lambda value: isinstance(value, int) and _is_number(value),
    "true or false": lambda value: isinstance(value, bool),
    "a mapping": lambda value: isinstance(value, Mapping),
    "histograms of clean and of poisoned pairs, as long as each other, with a pair in one": _is_histogram,
    "anything": lambda value: True,
}
_TEXT, _NUMBER, _SHARE, _WHOLE, _FLAG, _MAPPING, _HISTOGRAM, _ANYTHING = _KINDS

# A form is one of the kinds; a list of a form; a mapping of names to forms, of which those with "?" may be missing and
# "*ending" is for the others that end so; or a pair: a form, and what may stand there instead.
_TEXTS, _TEXT_OR_NULL, _WHOLE_OR_NULL, _NUMBER_OR_NULL = [_TEXT], (_TEXT, None), (_WHOLE, None), (_NUMBER, None)
_DATASET = {
    **{f"{name}?": _TEXT_OR_NULL for name in ("name", "hub_id", "revision", "split", "fingerprint")},
    "poisons?": _WHOLE_OR_NULL,
    "*": _ANYTHING,
}
_SPLIT = {
    "epoch": _WHOLE,
    "safe_share": _SHARE,
    "similarity_threshold": _NUMBER_OR_NULL,
    **{f"{part}_{name}": _NUMBER for part in ("risky", "safe") for name in ("mean", "variance", "weight")},
    **dict.fromkeys(("auroc", "poisons_in_safe_set", "safe_set_poison_rate"), (_SHARE, None)),
    "histogram": _HISTOGRAM,
    "*": _ANYTHING,
}

#: Of `measures` and of figures.
MEASURES = [
    {
        "measure": _TEXT,
        "figures": _TEXTS,
        "images?": _WHOLE_OR_NULL,
        "queries?": _WHOLE_OR_NULL,
        "classes?": (_TEXTS, None),
        "templates?": (_TEXTS, None),
        "trigger?": ({"name": _TEXT, "*": _ANYTHING}, None),
        "target?": _TEXT_OR_NULL,
        "dataset?": ({"rows?": _WHOLE_OR_NULL, **_DATASET}, None),
        "*": _ANYTHING,
    }
]
FIGURES = {"*": _NUMBER_OR_NULL}
#: Of what `hf-robust-clip evaluate --json` writes.
RESULTS = {"measures": MEASURES, "figures": FIGURES, "control?": _TEXT_OR_NULL, "*": _ANYTHING}
#: Of a [`~record.RunRecord`], by its fields.
RECORD = {
    "trainer": _TEXT,
    "model": {
        "name": _TEXT_OR_NULL,
        "revision?": _TEXT_OR_NULL,
        "source?": _TEXT,
        "type": _TEXT,
        "parameters": _WHOLE,
        "trainable_parameters": _WHOLE,
        "image_size": _ANYTHING,
        "adapter": (_MAPPING, None),
        "*": _ANYTHING,
    },
    "data": ({"rows": _WHOLE_OR_NULL, **_DATASET}, None),
    "defence": _MAPPING,
    "settings": _MAPPING,
    "measures": MEASURES,
    "before": (FIGURES, None),
    "after": (FIGURES, None),
    "after_step": _WHOLE_OR_NULL,
    "steps": _WHOLE,
    "epochs": _NUMBER,
    "planned_steps": _WHOLE,
    "environment": {
        "versions": _MAPPING,
        "device": _TEXT,
        "processes": _WHOLE,
        "precision": _TEXT,
        "seed": _WHOLE_OR_NULL,
        "seconds": _NUMBER,
        "*": _ANYTHING,
    },
    "course": [{"step": _NUMBER, "epoch": _NUMBER, **FIGURES}],
    "log": [
        {
            "epoch": _NUMBER,
            **{f"*{ending}": _NUMBER_OR_NULL for ending in ("loss", "learning_rate", "similarity", "matches")},
            **{f"*{ending}": _NUMBER_OR_NULL for ending in ("match_share", "match_adversarial")},
            "*": _ANYTHING,
        }
    ],
    "details": {"splits?": [_SPLIT], "*": _ANYTHING},
    "defence_defaults": _MAPPING,
    "method": _TEXT,
    "augmentation": ({"images": _TEXT_OR_NULL, "captions": _TEXT_OR_NULL}, {}),
    "skipped": ({"count": _WHOLE, "rows": [_WHOLE], "streamed": _FLAG}, {}),
}


def check_form(value: Any, form: Any, name: str) -> None:
    """
    That a value has a form, and all that is in it.

    Args:
        value: Plain data, as from JSON.
        form: One of those above.
        name (`str`): What an error calls the value.

    Raises:
        `ValueError`: Naming the first entry that has another form, its value and what is accepted.
    """
    if isinstance(form, tuple):
        form, instead = form
        if value == instead:
            return
    if isinstance(form, str):
        _accept(_KINDS[form](value), name, value, form)
    elif isinstance(form, list):
        _accept(isinstance(value, list), name, value, "a list")
        for number, entry in enumerate(value):
            check_form(entry, form[0], f"{name}[{number}]")
    else:
        _accept(isinstance(value, Mapping), name, value, "a mapping")
        needed = [key for key in form if not key.startswith("*") and not key.endswith("?")]
        missing = [key for key in needed if key not in value]
        _accept(not missing, name, value, f"a mapping with {listed(missing)}")
        for key, entry in value.items():
            check_form(entry, _form_of(key, form), f"{name}[{shown(key)}]")


def _form_of(key: str, form: Mapping[str, Any]) -> Any:
    exact = form.get(key, form.get(f"{key}?"))
    if exact is not None:
        return exact
    # The endings stand in the order in which they are to be tried, that of any name last.
    return next((of for ending, of in form.items() if ending[0] == "*" and key.endswith(ending[1:])), _ANYTHING)


def _accept(accepted: bool, name: str, value: Any, words: str) -> None:
    if not accepted:
        raise ValueError(shortened(f"{name} is {shown(value)}; accepted is {words}"))
