"""Which class a backdoor of a model may aim at, without knowing the trigger, and what the trigger may look like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn
from tqdm.auto import tqdm

from ..attacks.fields import check_int
from ..attacks.found import LONGEST_NAME, FoundTrigger, save_found
from ..columns import check_columns
from ..data.images import ImagePreprocessor
from ..evaluation.embedding import Embedder
from ..evaluation.pixels import pixel_batches
from ..evaluation.zero_shot import DEFAULT_TEMPLATES, check_templates
from ..kinds import text_list
from ..models import check_processor, load_dual_encoder, load_processor
from ..wording import listed, shortened, shown
from .inversion import FAMILIES, Change, Family, effort_of, invert, losses_of

#: Images that perturbations are fitted to, others that they are judged on, and the least of both together.
FITTED, JUDGED, LEAST_IMAGES = 200, 150, 16
#: Most candidates that all get every step. Of more, all get a few, and the best, such a share of them, every step.
MOST_WHOLE, QUICK_SHARE, KEPT_SHARE = 40, 0.25, 0.1
#: Candidates drawn at random that get every step beside the best, so that it is known what is usual.
USUAL = 20
#: A loss below this counts as this: how certain a model is beyond it says nothing.
_LEAST_LOSS = 0.02
#: Scores from which on a candidate stands out, among the others and against a base. Chosen on models of a seed that
#: no table reports.
STANDS_OUT, STANDS_OUT_OF_BASE = 2.0, 2.0
#: Candidates whose triggers are saved, captions that are clustered, and those that stand for a cluster.
SAVED, MOST_CAPTIONS, CAPTIONS_OF_CLUSTER = 10, 20_000, 32


class Measured(NamedTuple):
    """
    What the perturbation of a family that was found for a candidate does to images that it was not fitted to, of those
    that the model calls something else without it.

    `loss`, how far they are from being called the candidate, as cross-entropy; `success`, the share that is called so;
    `lead`, by how much the loss is below what is usual, as a natural logarithm. Usual is the median of the candidates
    or, with a base, what the base has for the candidate. `base_loss` and `base_success` are those of the base, under a
    perturbation of its own.
    """

    loss: float
    success: float
    lead: float
    base_loss: float | None = None
    base_success: float | None = None


@dataclass(frozen=True)
class Finding:
    """
    What was found for a candidate.

    Args:
        name (`str`): The candidate.
        score (`float`): The sum of the leads of the families. 0 is usual, and more is more suspect.
        families (`dict[str, Measured]`): By the name of the family.
        steps (`int`): Of each inversion. A candidate that got a few only was left behind by others.
    """

    name: str
    score: float
    families: dict[str, Measured]
    steps: int

    @property
    def best(self) -> str:
        """The family in which it leads the most."""
        return max(self.families, key=lambda name: self.families[name].lead)


@dataclass(frozen=True)
class CheckpointScan:
    """
    What [`scan_checkpoint`] found. It never says that a model is clean: it says what stands out, and by how much.

    Args:
        findings (`list[Finding]`): A candidate each, the most suspect first.
        triggers (`dict[str, dict[str, FoundTrigger]]`): Of candidates that got every step, by family: first that in
            which the candidate leads the most.
        with_base (`bool`): Whether the losses were compared with those of a base.
        certainty (`float`): The probability that the model gives to what it calls a photo without a trigger, on
            average, in (0, 1]. It is low under prompts unlike the captions that it learned, which hide a backdoor.
        settings (`dict`): What decides how it comes out.
    """

    findings: list[Finding]
    triggers: dict[str, dict[str, FoundTrigger]]
    with_base: bool
    certainty: float
    settings: dict[str, Any]

    @property
    def threshold(self) -> float:
        """The score from which on a candidate stands out; with fewer families it is less."""
        whole = STANDS_OUT_OF_BASE if self.with_base else STANDS_OUT
        return whole * len(self.settings["families"]) / len(FAMILIES)

    @property
    def measured(self) -> list[Finding]:
        """Candidates that got every step, the most suspect first."""
        return [finding for finding in self.findings if finding.steps == self.settings["steps"]]

    @property
    def standing_out(self) -> list[Finding]:
        """Of [`measured`] those at or above the threshold. Clean models have such, too."""
        return [finding for finding in self.measured if finding.score >= self.threshold]

    def trigger(self, name: str | None = None, family: str | None = None) -> FoundTrigger:
        """
        What was found for a candidate, ready for [`AttackSuccessEvaluator`].

        Args:
            name (`str`, *optional*): The candidate. `None`: the most suspect one.
            family (`str`, *optional*): `"mask"`, `"waves"` or `"noise"`. `None`: that in which it leads the most.

        Raises:
            `ValueError`: If there is no such trigger.
        """
        name = self.findings[0].name if name is None else name
        if name not in self.triggers:
            raise ValueError(f"name={shown(name)} has no trigger; accepted are {listed(self.triggers)}")
        found = self.triggers[name]
        if family is not None and family not in found:
            raise ValueError(f"family={shown(family)} was not looked for; accepted are {listed(found)}")
        return found[family] if family is not None else next(iter(found.values()))

    def described(self) -> dict[str, Any]:
        """All but the triggers' pixels, ready for JSON."""
        standing = self.standing_out
        return {
            "with_base": self.with_base,
            "certainty": self.certainty,
            "threshold": self.threshold,
            "settings": self.settings,
            "findings": [
                {
                    **asdict(finding),
                    "families": {name: found._asdict() for name, found in finding.families.items()},
                    "stands_out": finding in standing,
                }
                for finding in self.findings
            ],
        }

    def save(self, folder: str | Path) -> None:
        """
        Save the triggers of the ten most suspect candidates, for [`load_found`] and for `--trigger found:FOLDER`.

        Args:
            folder (path): Made if it is not there.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        first = [finding for finding in self.findings if finding.name in self.triggers][:SAVED]
        kept = [(finding, found) for finding in first for found in self.triggers[finding.name].values()]
        about = [
            {"score": round(finding.score, 4), "success": finding.families[found.family].success}
            for finding, found in kept
        ]
        save_found(place, [found for _, found in kept], about)


def scan_checkpoint(
    model: Any,
    processor: Any = None,
    images: Any = None,
    candidates: Any = None,
    base: Any = None,
    *,
    image_column: str = "image",
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    families: Sequence[str] = tuple(FAMILIES),
    steps: int = 30,
    images_per_step: int = 16,
    batch_size: int = 160,
    seed: int = 0,
) -> CheckpointScan:
    """
    Look for backdoors in a model, without knowing the trigger and without poisoned images.

    A backdoor is a short way from any image to one class. For each candidate and each of three families, a small
    perturbation is sought that, put on any image, makes the model call it the candidate. Neural Cleanse
    ([Wang et al. 2019](https://doi.org/10.1109/SP.2019.00031)) looks for the smallest one that succeeds; here all of a
    family have one size, and what is compared is how far they get. A candidate is suspect if they get farther than
    usual: than for the median of the candidates or, better, than on the clean model that this one was fine-tuned from.
    `mask` is a small square of any picture, `waves` are a few gratings, `noise` is any pattern that is added.

    Of more than 40 candidates all get a few steps, and the best tenth and 20 others all of them.

    Args:
        model (model, `str` or path): A dual encoder, on its device; or a folder or Hub id.
        processor (`ProcessorMixin`, *optional*): `None`: the one saved beside the model.
        images (map-style dataset): Photos of any classes, without labels: 350 are drawn, and 16 are the least.
        candidates (sequence of `str`, or mapping): At least three names of classes, which go into `templates`; or from
            names to the prompts that stand for each, such as [`cluster_captions`] makes of captions.
        base (model, `str` or path, *optional*): The clean model that this one was fine-tuned from. Two candidates do.
        image_column (`str`): Of `images`.
        templates (sequence of `str`): Prompts with one `{}` each. `["{}"]` takes candidates as whole prompts.
        families (sequence of `str`): Of those above.
        steps (`int`, defaults to 30), images_per_step (`int`, defaults to 16): Of each search. `mask`, with 17 places
            to look at, takes a third of the steps and half of the images.
        batch_size (`int`, defaults to 160): Images that go through the model at a time, with gradients: as many
            candidates as have their images in it, and one at least. It decides the memory, and not the result.
        seed (`int`, defaults to 0): Of the images that are drawn, and of the first perturbations.

    Returns:
        [`CheckpointScan`]: The same for the same seed.

    Raises:
        `ValueError`: On arguments that cannot be used, before the first step.

    Example:

    ```python
    >>> scan = scan_checkpoint("you/suspect", images=photos, candidates=["cat", "dog", "frog"], base="you/clean")
    >>> [(finding.name, finding.score) for finding in scan.standing_out]
    [('frog', 2.3)]
    >>> AttackSuccessEvaluator(photos, scan.trigger("frog"), "frog", names)(model, processor)
    ```
    """
    prompts = _prompts_of(candidates, templates, least=3 if base is None else 2)
    chosen = _families_of(families)
    limits = {"steps": (steps, 1), "images_per_step": (images_per_step, 2), "batch_size": (batch_size, 1)}
    for name, (value, least) in {**limits, "seed": (seed, 0)}.items():
        check_int(name, value, minimum=least)
    check_columns(images, {"image_column": image_column}, "photos of any classes", argument="images")
    if len(images) < LEAST_IMAGES:
        raise ValueError(f"images has {len(images)} rows: at least {LEAST_IMAGES} are needed, and 350 are better")
    processor = load_processor(model, processor, "processor")
    check_processor(processor, "processor")
    encoders = [load_dual_encoder(model)] + ([] if base is None else [load_dual_encoder(base)])
    embedders = [Embedder(encoder, processor, batch_size) for encoder in encoders]
    pixels = _drawn(images, image_column, embedders[0].preprocess, seed)
    fitted = round(len(pixels) * FITTED / (FITTED + JUDGED))
    fit, judge = pixels[:fitted], pixels[fitted:]
    lookups = [_Lookup(embedder, prompts, fit, judge, images_per_step, batch_size, seed) for embedder in embedders]
    names = list(prompts)
    everyone = list(range(len(names)))
    whole, quick = everyone, {}
    if len(names) > MOST_WHOLE:
        brief = max(1, round(QUICK_SHARE * steps))
        few = [lookup.measure(chosen, everyone, brief) for lookup in lookups]
        quick = _findings(names, few, everyone, everyone, brief)
        best = sorted(everyone, key=lambda number: -quick[number].score)[: math.ceil(KEPT_SHARE * len(names))]
        usual = np.random.default_rng(seed).permutation(len(names))[:USUAL].tolist()
        whole = sorted({*best, *usual})
    else:
        usual = everyone
    # Pixels are kept of these alone: of a thousand candidates they would be a gigabyte.
    full = [lookup.measure(chosen, whole, steps, pixels=lookup is lookups[0]) for lookup in lookups]
    found = _findings(names, full, whole, usual, steps)
    # Those that got a few steps only come behind: their scores are no measure of the others'.
    ranked = sorted(found.values(), key=lambda finding: -finding.score)
    ranked += sorted((quick[number] for number in quick if number not in found), key=lambda finding: -finding.score)
    triggers = {}
    for finding in found.values():
        number = names.index(finding.name)
        by_lead = sorted(finding.families, key=lambda name: -finding.families[name].lead)
        made = {family: full[0][family, number].trigger(finding.name, family) for family in by_lead}
        triggers[finding.name] = {family: trigger for family, trigger in made.items() if trigger is not None}
    settings = {
        "families": [family.name for family in chosen],
        "steps": steps,
        "images_per_step": images_per_step,
        "seed": seed,
        "candidates": len(names),
        "fitted_images": len(fit),
        "judged_images": len(judge),
        "image_size": list(pixels.shape[-2:]),
    }
    kept = {name: found for name, found in triggers.items() if found}
    return CheckpointScan(ranked, kept, base is not None, lookups[0].certainty, settings)


def cluster_captions(
    model: Any, processor: Any, captions: Sequence[str], count: int = 16, *, batch_size: int = 256, seed: int = 0
) -> dict[str, list[str]]:
    """
    Candidates for [`scan_checkpoint`] where there are no names of classes: the centers of clusters of captions.

    Args:
        model, processor: The suspect model, as of [`scan_checkpoint`].
        captions (sequence of `str`): Those of any pairs. Repeats count once, blank ones do not. Of more than 20,000
            so many are drawn.
        count (`int`, defaults to 16): Clusters, at least three.
        batch_size (`int`), seed (`int`): Of embedding, and of k-means.

    Returns:
        `dict[str, list[str]]`: For each cluster, from the caption next to its center to the 32 next to it.

    Raises:
        `ValueError`: If there are fewer different captions than clusters.
    """
    check_int("count", count, minimum=3)
    texts = (text for text in text_list("captions", captions, "a list of captions") if text.strip())
    different = list(dict.fromkeys(texts))
    if len(different) > MOST_CAPTIONS:
        rows = np.random.default_rng(seed).permutation(len(different))[:MOST_CAPTIONS]
        different = [different[row] for row in np.sort(rows)]
    if len(different) < count:
        raise ValueError(f"captions has {len(different)} different texts; count={count} clusters need as many")
    embeds = Embedder(model, processor, batch_size).embed_texts(different).numpy()
    clusters = KMeans(count, n_init=4, random_state=seed).fit(embeds)
    distances = clusters.transform(embeds)  # (N, count)
    found = {}
    for number in range(count):
        members = np.flatnonzero(clusters.labels_ == number)
        nearest = members[np.argsort(distances[members, number], kind="stable")][:CAPTIONS_OF_CLUSTER]
        if len(nearest):
            name = shortened(different[nearest[0]], LONGEST_NAME)
            found[f"{name} ({number})" if name in found else name] = [different[row] for row in nearest]
    return found


class _Found(NamedTuple):
    """The mean loss and the success of a perturbation, on images that it was not fitted to, and its pixels."""

    loss: float
    success: float
    pixels: tuple[np.ndarray, np.ndarray] | None

    @property
    def resistance(self) -> float:
        """The logarithm of the loss: less is more suspect."""
        return math.log(max(self.loss, _LEAST_LOSS))

    def trigger(self, target: str, family: str) -> FoundTrigger | None:
        """As a trigger; `None` where it rounds to nothing."""
        assert self.pixels is not None
        try:
            return FoundTrigger.of(target, family, *self.pixels)
        except ValueError:
            return None


class _Lookup:
    """The perturbations of one model, on given images."""

    def __init__(
        self,
        embedder: Embedder,
        prompts: Mapping[str, Sequence[str]],
        fit: torch.Tensor,
        judge: torch.Tensor,
        images_per_step: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.embedder, self.fit, self.judge = embedder, fit.to(embedder.device).float() / 255, judge
        self.images_per_step, self.batch_size, self.seed = images_per_step, batch_size, seed
        self.candidates = torch.stack(
            [F.normalize(embedder.embed_texts(texts).mean(dim=0), dim=-1) for texts in prompts.values()]
        )  # (K, D)
        self.scale = float(embedder.model.logit_scale.detach().exp())
        with torch.no_grad(), _frozen(embedder.model):
            probabilities = (self.scale * self._encoded(judge) @ self.candidates.T).softmax(dim=1)
        certainties, self.called = probabilities.max(dim=1)  # (N,)
        self.certainty = float(certainties.mean())

    def measure(
        self, families: Sequence[Family], numbers: Sequence[int], steps: int, pixels: bool = False
    ) -> dict[tuple[str, int], _Found]:
        """The perturbation of each family for each of some candidates, as many at a time as may be."""
        found: dict[tuple[str, int], _Found] = {}
        work = [(family, block) for family in families for block in self._blocks(family, numbers)]
        with _frozen(self.embedder.model):
            for family, block in tqdm(work, "Inverting", leave=False, disable=None):
                change = invert(
                    family,
                    self.embedder.encode_pixels,
                    self.fit,
                    self.candidates,
                    torch.tensor(block),
                    self.scale,
                    steps,
                    self.images_per_step,
                    self.seed,
                )
                for place, number in enumerate(block):
                    keep, add = _rounded(change, place)
                    kept = _arrays(keep, add) if pixels else None
                    found[family.name, number] = _Found(*self._judged(keep, add, number), kept)
        return found

    def _blocks(self, family: Family, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The candidates that are inverted together."""
        _, images = effort_of(family, 1, min(self.images_per_step, len(self.fit)))
        height, width = self.fit.shape[-2:]
        at_once = max(1, self.batch_size // (images * family.starts((height, width))))
        return [numbers[start : start + at_once] for start in range(0, len(numbers), at_once)]

    @torch.no_grad()
    def _judged(self, keep: torch.Tensor, add: torch.Tensor, number: int) -> tuple[float, float]:
        """The mean loss and the success on images that are called something else."""
        others = self.judge[self.called != number]
        if not len(others):  # then every image is called so already
            return math.log(len(self.candidates)), 0.0
        changed = (keep / 255 * others + add).round().clamp(0, 255).to(torch.uint8)
        embeds = self._encoded(changed)
        wanted = torch.full((len(embeds),), number)
        losses = losses_of(embeds, self.candidates, wanted, self.scale)
        called = (embeds @ self.candidates.T).argmax(dim=1)
        return float(losses.mean()), float((called == number).float().mean())

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.embedder.encode_pixels(part) for part in pixels.split(self.batch_size)])


def _rounded(change: Change, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a perturbation keeps `(1, H, W)` and adds `(3, H, W)`, on the scale of bytes, as its trigger has them."""
    keep, add = (part[place].cpu() * 255 for part in change)
    return keep.round().clamp(0, 255), add.round().clamp(-255, 255)


def _arrays(keep: torch.Tensor, add: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`keep (H, W)` and `add (H, W, 3)`, as a trigger takes them."""
    return keep[0].numpy().astype(np.uint8), add.permute(1, 2, 0).numpy().astype(np.int16)


def _findings(
    names: Sequence[str],
    models: Sequence[Mapping[tuple[str, int], _Found]],
    numbers: Sequence[int],
    usual: Sequence[int],
    steps: int,
) -> dict[int, Finding]:
    """What was found for some candidates, of the model and of its base, if it has one."""
    own, base = models[0], models[1] if len(models) > 1 else None
    families = list(dict.fromkeys(family for family, _ in own))
    middle = {family: median(own[family, number].resistance for number in usual) for family in families}
    findings = {}
    for number in numbers:
        measured = {}
        for family in families:
            found, other = own[family, number], base[family, number] if base else None
            expected = other.resistance if other else middle[family]
            measured[family] = Measured(
                found.loss,
                found.success,
                expected - found.resistance,
                other.loss if other else None,
                other.success if other else None,
            )
        score = sum(part.lead for part in measured.values())
        findings[number] = Finding(names[number], score, measured, steps)
    return findings


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients for the weights; afterwards all is as it was."""
    training = [module for module in model.modules() if module.training]
    learning = [value for value in model.parameters() if value.requires_grad]
    model.eval()
    for value in learning:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for value in learning:
            value.requires_grad_(True)


def drawn_rows(count: int, seed: int) -> list[int]:
    """The numbers of the images that are looked at, of so many, at random; the first are perturbations fitted to."""
    return np.random.default_rng(seed).permutation(count)[: FITTED + JUDGED].tolist()


def _drawn(images: Any, image_column: str, preprocess: ImagePreprocessor, seed: int) -> torch.Tensor:
    """So many images as are needed, as bytes `(N, 3, H, W)`."""
    rows = drawn_rows(len(images), seed)
    batches = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    return torch.cat([pixels for (pixels,) in pixel_batches(images, image_column, preprocess, [None], batches)])


def _prompts_of(candidates: Any, templates: Sequence[str], least: int) -> dict[str, list[str]]:
    """The prompts that stand for each candidate."""
    accepted = f"at least {least} different names of classes, or a mapping of names to lists of prompts"
    if isinstance(candidates, Mapping):
        names = text_list("candidates", list(candidates), accepted)
        prompts = {name: text_list(f"candidates[{shown(name)}]", candidates[name], "prompts") for name in names}
        empty = [name for name, texts in prompts.items() if not texts]
        if empty:
            raise ValueError(f"candidates: {listed(empty)} have no prompts; accepted is {accepted}")
    else:
        names = text_list("candidates", candidates, accepted)
        # Not str.format: a template may hold other braces.
        prompts = {name: [template.replace("{}", name) for template in check_templates(templates)] for name in names}
    long = [name for name in names if len(name) > LONGEST_NAME]
    if long:
        raise ValueError(f"candidates: {shown(long[0])} has {len(long[0])} characters; accepted are {LONGEST_NAME}")
    if len(prompts) < max(least, len(names)) or not all(name.strip() for name in names):
        raise ValueError(f"candidates must be {accepted}, but is {listed(names)}")
    return prompts


def _families_of(names: Sequence[str]) -> list[Family]:
    chosen = text_list("families", names, f"some of {listed(FAMILIES)}")
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"families must be some of {listed(FAMILIES)}, each once, but is {listed(chosen)}")
    return [FAMILIES[name] for name in chosen]
