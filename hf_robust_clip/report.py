"""The demo's report: one HTML file that needs nothing beside it. Drawing takes the extra `report`."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The models of the demo, as its results call them and as the report does.
MODELS = {"poisoned": "Poisoned", "finetuned": "Plain fine-tuning", "cleanclip": "CleanCLIP"}
#: Under these an attack has not taken, and over these it has not been removed.
TAKEN, REMOVED = 0.5, 0.1
#: Under this clean accuracy a model has not learned the digits.
LEARNED = 0.5
#: Points of clean accuracy whose loss is worth a warning.
ACCURACY_LOSS = 0.05

_SCALE = 6
_DPI = 170
#: Okabe and Ito's palette, which colour-blind readers tell apart, in its darker and its lighter hues.
_THEMES = {
    "light": {"text": "#24292f", "grid": "#d0d7de", "clean": "#0072b2", "attack": "#d55e00", "target": "#009e73"},
    "dark": {"text": "#e2e6ea", "grid": "#3d444d", "clean": "#56b4e9", "attack": "#e69f00", "target": "#00b888"},
}


class Finding(NamedTuple):
    """One sentence on the results; its kind is `"result"` or `"warning"`."""

    text: str
    kind: str = "result"


class ModelEmbeddings(NamedTuple):
    """Embeddings of the test images as they are and with the trigger, each `(N, D)`."""

    clean: np.ndarray
    triggered: np.ndarray


@dataclass(frozen=True)
class PoisonedPair:
    """A poisoned training pair: its image with the trigger, its caption before and after."""

    image: Image.Image
    caption_before: str
    caption: str


@dataclass(frozen=True)
class Example:
    """A test image of class `name`, with and without trigger, and what each model calls it with the trigger."""

    name: str
    clean: Image.Image
    triggered: Image.Image
    predictions: Mapping[str, str]


def check_report_extra() -> None:
    """Raise `ModuleNotFoundError` with the way to install them unless jinja2 and matplotlib are there."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the report needs {' and '.join(missing)}, not installed here: pip install 'hf-robust-clip[report]'"
        )


def results_table(results: Mapping[str, Any]) -> list[list[str]]:
    """The figures of the models as text, a row of headings first."""
    rows = [["", "clean accuracy", "attack success", "triggered accuracy", "trigger distance", "seconds"]]
    for model, label in MODELS.items():
        figures = results[model]
        shares = (figures[name] for name in ("clean_accuracy", "attack_success_rate", "triggered_accuracy"))
        row = [label, *(f"{share:.1%}" for share in shares), f"{figures['trigger_distance']:.2f}"]
        rows.append([*row, f"{figures['seconds']:.0f}"])
    return rows


def findings(results: Mapping[str, Any]) -> list[Finding]:
    """What the results say, and what they do not allow to say, in plain sentences."""
    setup = results["setup"]
    target, attacked = setup["target"], setup["attacked_images"]
    before, control, after = (results[model]["attack_success_rate"] for model in MODELS)
    accuracy = {model: results[model]["clean_accuracy"] for model in MODELS}
    found = []
    if accuracy["poisoned"] < LEARNED:
        found.append(
            Finding(
                f"The poisoned model is right on only {accuracy['poisoned']:.1%} of the clean images: it has learned "
                "too little for a comparison.",
                "warning",
            )
        )
    poisons = f"{setup['poisons']} poisons among {setup['pairs']} pairs ({setup['poison_rate']:.1%})"
    if before < TAKEN:
        found.append(
            Finding(
                f"The attack did not take: with {poisons}, only {before:.1%} of {attacked} triggered images are "
                f"called “{target}” before any defence. What follows proves nothing about one.",
                "warning",
            )
        )
    else:
        found.append(
            Finding(
                f"The attack took: with {poisons}, {before:.1%} of {attacked} triggered images are called “{target}”."
            )
        )
    found.append(Finding(f"Plain fine-tuning on clean pairs, the control, leaves {control:.1%}."))
    if accuracy["cleanclip"] < LEARNED <= accuracy["poisoned"]:
        found.append(
            Finding(
                f"After CleanCLIP the model is right on only {accuracy['cleanclip']:.1%} of the clean images: it has "
                f"unlearned the classes, so an attack success of {after:.1%} says nothing good of the defence.",
                "warning",
            )
        )
    elif after > REMOVED:
        found.append(Finding(f"CleanCLIP did NOT remove the trigger: {after:.1%} are left.", "warning"))
    elif before >= TAKEN and accuracy["poisoned"] >= LEARNED:
        found.append(Finding(f"CleanCLIP leaves {after:.1%}: the trigger has next to no hold any more."))
    else:
        found.append(Finding(f"CleanCLIP leaves {after:.1%}."))
    if before >= TAKEN and after >= control:
        found.append(Finding("It removed no more than plain fine-tuning did, which costs less.", "warning"))
    cost = (
        f"Clean accuracy: {accuracy['poisoned']:.1%} poisoned, {accuracy['finetuned']:.1%} after plain fine-tuning, "
        f"{accuracy['cleanclip']:.1%} after CleanCLIP"
    )
    lost = max(accuracy["poisoned"], accuracy["finetuned"]) - accuracy["cleanclip"]
    if lost > ACCURACY_LOSS:
        found.append(Finding(f"{cost}: the defence costs accuracy.", "warning"))
    else:
        found.append(Finding(f"{cost}."))
    return found


def render_demo_report(
    results: Mapping[str, Any],
    pairs: Sequence[PoisonedPair],
    examples: Sequence[Example],
    embeddings: Mapping[str, ModelEmbeddings],
    is_target: np.ndarray,
    command: str,
) -> str:
    """
    The report as HTML, images and styles included.

    Args:
        results (mapping): As in `results.json`.
        pairs (sequence of [`PoisonedPair`]): A few training pairs.
        examples (sequence of [`Example`]): A few test images.
        embeddings (mapping of `str` to [`ModelEmbeddings`]): For each model.
        is_target (`np.ndarray` of shape `(N,)`, bool): Whether each test image is of the target class.
        command (`str`): What was run.
    """
    import jinja2

    # Autoescaping by file name would pass over the ending .j2.
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    table = results_table(results)
    return environment.get_template("demo_report.html.j2").render(
        setup=results["setup"],
        headings=table[0],
        rows=table[1:],
        findings=findings(results),
        models=MODELS,
        pairs=[{"image": _enlarged(pair.image), "pair": pair} for pair in pairs],
        examples=[
            {"clean": _enlarged(example.clean), "triggered": _enlarged(example.triggered), "example": example}
            for example in examples
        ],
        curves=_themed(partial(_draw_curves, results["curves"])),
        embedding_plot=_themed(partial(_draw_embeddings, embeddings, is_target, results["setup"]["target"])),
        command=command,
    )


def _enlarged(image: Image.Image) -> str:
    size = (image.width * _SCALE, image.height * _SCALE)
    buffer = BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return _data_uri(buffer)


def _data_uri(buffer: BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _themed(draw: Any) -> dict[str, str]:
    """The figure that `draw(colours)` returns, as data URIs for a light and for a dark page."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    images = {}
    for theme, colours in _THEMES.items():
        settings: Any = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["text"]),
            **dict.fromkeys(("grid.color", "axes.edgecolor"), colours["grid"]),
            **{"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False},
        }
        with matplotlib.rc_context(settings):
            figure = draw(colours)
            buffer = BytesIO()
            FigureCanvasAgg(figure)
            figure.savefig(buffer, format="png", dpi=_DPI, transparent=True, metadata={"Software": None})
        images[theme] = _data_uri(buffer)
    return images


def _draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]) -> Figure:
    """Clean accuracy and attack success after each epoch: a panel for each training, as wide as it is long."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    titles = {**MODELS, "poisoned": "Pre-training on poisoned pairs"}
    lengths = [max(curves[model][-1]["epoch"], 1) for model in MODELS]
    # A narrow panel would not hold its title.
    widths = [max(length, 0.5 * max(lengths)) for length in lengths]
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True, width_ratios=widths)
    for panel, model in zip(panels, MODELS, strict=True):
        epochs = [point["epoch"] for point in curves[model]]
        for measure, label, colour, marker, dash in (
            ("clean_accuracy", "clean accuracy", "clean", "o", "-"),
            ("attack_success_rate", "attack success rate", "attack", "s", "--"),
        ):
            values = [100 * point[measure] for point in curves[model]]
            panel.plot(epochs, values, dash, marker=marker, ms=4, lw=1.8, color=colours[colour], label=label)
        panel.set_title(titles[model], loc="left")
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(True, axis="y", lw=0.6)
    panels[0].set_ylim(-3, 103)
    panels[0].set_ylabel("% of test images")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_embeddings(
    embeddings: Mapping[str, ModelEmbeddings], is_target: np.ndarray, target: str, colours: Mapping[str, str]
) -> Figure:
    """The test images' embeddings in the plane in which they spread most, a panel and a plane for each model."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    figure = Figure(figsize=(9, 4), layout="constrained")
    # On one scale, or a model that the trigger hardly moves would look like one that it moves far.
    panels = figure.subplots(1, len(MODELS), sharex=True, sharey=True)
    for panel, (model, title) in zip(panels, MODELS.items(), strict=True):
        clean, triggered = embeddings[model]
        plane = PCA(n_components=2, svd_solver="full").fit(np.concatenate([clean, triggered]))
        for points, label, colour, marker in (
            (clean[~is_target], "other classes", "clean", "o"),
            (clean[is_target], f"“{target}”, the target", "target", "s"),
            (triggered[~is_target], "other classes with the trigger", "attack", "x"),
        ):
            x, y = plane.transform(points).T
            # A dollar sign in a name would start a formula.
            label = label.replace("$", r"\$")
            panel.scatter(x, y, s=13, marker=marker, lw=0.9, alpha=0.6, color=colours[colour], label=label)
        shares = plane.explained_variance_ratio_
        panel.set_title(title, loc="left")
        panel.set_xlabel(f"component 1 ({shares[0]:.0%}) across, 2 ({shares[1]:.0%}) up")
        panel.set_box_aspect(1)
    reach = 1.04 * max(abs(limit) for limit in (*panels[0].get_xlim(), *panels[0].get_ylim()))
    panels[0].locator_params(nbins=5)
    panels[0].set(xlim=(-reach, reach), ylim=(-reach, reach))
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, markerscale=1.6)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure
