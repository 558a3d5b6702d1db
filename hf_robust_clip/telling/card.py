"""From the record of a run to its model card."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..methods import Method
from ..record import Measured, RunRecord, checked
from ..wording import shown as cut
from .escaping import Markdown, escaped, fenced, literal, one_line
from .facts import Facts, facts_of
from .html import templates
from .index import evaluation_results
from .picture import course_panels, course_text
from .sentences import Statement, notes, statements
from .tables import figure_groups, value_text

#: What distinguishes our cards from those that a person wrote, or has made their own.
MARKER = (
    "<!-- hf_robust_clip wrote this card from robust_clip_run.json, and writes it anew at the next push. To keep your "
    "changes to it, delete this line. -->"
)
#: The defence's arguments that say little of it, and are left out of a card where they have their defaults.
_PLUMBING = (
    "image_column",
    "caption_column",
    "max_length",
    "gather_across_devices",
    "contrastive_chunk_size",
    "accumulate_negatives",
    "loss_type",
    "freeze",
    "max_logit_scale",
    "merge_adapters",
    "dataloader_drop_last",
    "stop_on_non_finite",
    "on_bad_row",
    "adversarial_phrase",
)
#: Names of augmentations, which may have been given as objects: `augmentation` says what was used.
_PRESETS = {"image_preset": "images", "text_preset": "captions"}


def render_card(
    record: RunRecord,
    *,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] | None = None,
    model_name: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    dataset_names: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    picture: str | None = None,
    repo_id: str | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
) -> str:
    """
    The model card of a run, front matter and Markdown. Whatever comes from data is escaped.

    Args:
        record ([`RunRecord`]): The run's.
        license (`str`, *optional*): Of the weights, as the Hub calls it. `None`: the card says that it is not stated.
        language (`str` or sequence, *optional*): Of the captions, ISO 639 codes.
        tags (`str` or sequence, *optional*): Beside the card's own.
        tasks (`str` or sequence, *optional*): The first replaces `zero-shot-image-classification` as the pipeline's,
            the others are tags.
        model_name (`str`, *optional*): The title. `None`: the end of `repo_id`, or the method's.
        base_model (`str`, *optional*): Hub id of the model that training started from. `None`: the record's.
        datasets (`str` or sequence, *optional*): Hub ids of the training data in addition to the record's.
        dataset_names, dataset_args (`str` or sequence, *optional*): What the training data is called, and arguments
            that it was loaded with.
        picture (`str`, *optional*): Path, relative to the card, of a plot of the record's course.
        repo_id (`str`, *optional*): Where the model is, or will be, on the Hub.
        measured (sequence of mappings): Metrics next to the run's, each with `measures` and `figures`, as in a record
            and as `hf-robust-clip evaluate --json` writes them: of these weights, or with `control`, a few words, of
            the model that those describe ("undefended, on the same pairs"). Controls are not part of the model index.

    Returns:
        `str`: Ready for `README.md`.

    Raises:
        `ValueError`: If `base_model`, `repo_id` or one of `datasets` is not an id of the Hub.
    """
    facts = facts_of(record, [checked(Measured, entry, "measured") for entry in measured])
    method = facts.method
    base = _hub_id("base_model", base_model) or _valid(record.model.name)
    repo_id = _hub_id("repo_id", repo_id)
    extra = [_hub_id("datasets", name) for name in _listed(datasets)]
    hub_data = [name for name in dict.fromkeys([_valid(record.data and record.data.hub_id), *extra]) if name]
    adapter = record.model.adapter if not record.defence.get("merge_adapters") else None
    name = one_line(model_name or (repo_id or "").rpartition("/")[2]) or f"CLIP, {method.name}"
    pipeline, *other_tasks = _listed(tasks) or ["zero-shot-image-classification"]
    relation: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    data = ModelCardData(
        language=_listed(language) or None,
        license=one_line(license) if license else None,
        library_name="peft" if adapter else "transformers",
        base_model=base,
        **relation,
        datasets=hub_data or None,
        pipeline_tag=pipeline,
        tags=[*_own_tags(method), *other_tasks, *_listed(tags)],
        eval_results=evaluation_results(facts) or None,
        model_name=name,
    )
    body = _template().render(
        marker=Markdown(MARKER),
        name=name,
        record=record,
        method=method,
        base=_linked(base) if base else None,
        revision=record.model.revision if base == record.model.name else None,
        adapter=adapter,
        notices=[_notice(statement) for statement in statements(facts) if statement.kind != "result"],
        columns=[column.label for column in facts.columns],
        groups=figure_groups(facts),
        guessed_before=facts.before is not None and facts.before.guesses(),
        picture=Markdown(quote(picture)) if picture else None,
        alt=course_text(course_panels(facts)) if picture else None,
        notes=[note.text for note in notes(record) if note.kind == "result"],
        settings=[*_settings(record)],
        dataset=record.data,
        skipped=record.skipped,
        hub_data=[_linked(name, "datasets/") for name in hub_data],
        dataset_names=_listed(dataset_names),
        dataset_args=_listed(dataset_args),
        unmeasured=facts.unmeasured,
        usage=_usage(facts, adapter, base, repo_id),
        license=license,
        citation=fenced(method.bibtex, "bibtex") if method.bibtex else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


@functools.cache
def _template() -> jinja2.Template:
    # Of Markdown, not of HTML: autoescaping would leave tables and links open.
    environment = templates(finalize=escaped)
    environment.filters["parameters"] = value_text
    return environment.get_template("model_card.md.j2")


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [one_line(entry) for entry in ([value] if isinstance(value, str) else value or ())]


def _hub_id(argument: str, name: str | None) -> str | None:
    if name is not None and _valid(name) is None:
        raise ValueError(
            f"{argument}: {cut(name)} is not an id of the Hub; accepted is one such as 'openai/clip-vit-base-patch32'"
        )
    return name


def _valid(name: Any) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if isinstance(name, str) else None


def _linked(hub_id: str, kind: str = "") -> Markdown:
    return Markdown(f"[{escaped(hub_id)}](https://huggingface.co/{kind}{hub_id})")


def _own_tags(method: Method) -> list[str]:
    if method.kind == "none":
        return ["hf-robust-clip"]
    return ["hf-robust-clip", *([method.name.lower(), "backdoor-defense"] if method.kind != "own" else [])]


def _notice(statement: Statement) -> Markdown:
    gap = " " if statement.rest.startswith(" ") else ""
    return Markdown(f"**{escaped(statement.head)}**{gap}{escaped(statement.rest)}")


def _settings(record: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of what the run was set to: the method's own arguments, and others that differ."""
    for name, value in record.defence.items():
        default = record.defence_defaults.get(name)
        if name in _PRESETS and record.augmentation:
            used = getattr(record.augmentation, _PRESETS[name])
            yield f"augmentation of {_PRESETS[name]}", used or "none", f"{name}={default}"
        elif name not in _PLUMBING or value != default:
            yield name, value, default
    for name, value in record.settings.items():
        yield name, value, ""


def _usage(facts: Facts, adapter: Any, base: str | None, repo_id: str | None) -> Markdown:
    """Python that classifies a picture with the model."""
    prompts = ["a photo of a cat.", "a photo of a dog."]
    for measure in facts.measures:
        if measure.classes and measure.templates:
            prompts = [measure.templates[0].replace("{}", name) for name in measure.classes[:3]]
            break
    where = literal(repo_id or "PATH_OR_ID_OF_THIS_MODEL")
    if adapter and base is None:
        imports = "from peft import PeftModel\n"
        load = 'base = AutoModel.from_pretrained("PATH_OF_THE_MODEL_THAT_TRAINING_STARTED_FROM")\n'
        load += f"model = PeftModel.from_pretrained(base, {where}).eval()"
    else:
        imports, load = "", f"model = AutoModel.from_pretrained({where}).eval()"
        load += "  # needs peft, and loads the base model too" if adapter else ""
    padding = '"max_length"' if facts.record.model.type.startswith("siglip") else "True"
    return fenced(
        f"""import torch
{imports}from PIL import Image
from transformers import AutoModel, AutoProcessor

{load}
processor = AutoProcessor.from_pretrained({where})
labels = [{", ".join(map(literal, prompts))}]
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(text=labels, images=image, return_tensors="pt", padding={padding})
with torch.no_grad():
    shares = model(**inputs).logits_per_image.softmax(dim=-1)[0]
print(dict(zip(labels, shares.tolist())))""",
        "python",
    )
