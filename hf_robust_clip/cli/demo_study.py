"""What the demo's reports say of the experiment beside its figures."""

from __future__ import annotations

from ..telling import Study
from .demo_recipe import LABELS, MANIFEST, RESULTS, title_of
from .demo_steps import Demo

_LIMITS = (
    "It is one trigger, one target and one seed, on grey digits of 16 x 16 pixels, with a model three hundred times "
    "smaller than CLIP. It shows how the package is used and what the phenomenon is. How well the defence does on "
    "photos is another question.",
    "Another processor, number of threads or version of a library gives somewhat other figures.",
)
_FINE_TUNING = (
    "The fine-tuning pairs are clean because we made them. Five poisons left among them are reported to keep the "
    "attack success above 32% (arXiv 2311.14948).",
    "They are also the very digits of pre-training, rendered anew. A defender seldom has pairs that match so well.",
    "The augmentation of fine-tuning matters: the noise in it acts against a trigger of noise, and may do nothing "
    "about another.",
    "The control has the learning rate of CleanCLIP. At a rate of its own, plain fine-tuning may do better.",
)
_PRETRAINING = (
    "The augmentation decides much: a fixed patch in a corner is removed by a shift of one pixel, without any "
    "defence. Its settings, and those of the defence, were chosen on digits like these.",
    "There are ten classes and seven captions for each, so that an image has many right captions besides its own. "
    "Photos and their captions are seldom so alike.",
)
_OWN = {
    "roclip": "With another pool, or another first matching epoch, RoCLIP does better or worse, or collapses.",
    "safeclip": "How far SafeCLIP's safe set may grow depends on how well similarities tell poisons apart, which a "
    "defender, who does not know the poisons, cannot see. A step of SafeCLIP works on two augmented views of each "
    "pair: as many epochs as the control take it longer.",
}


def study_of(demo: Demo, defence: str, quick: bool, command: str) -> Study:
    """What the report of one of a demo's defences says of the experiment; `command` is what was run."""
    counts, recipe = demo.manifest["counts"], demo.recipe
    fine_tuned = defence == "cleanclip"
    steps = [
        f"{counts['count']} of {counts['dataset_length']} image-caption pairs of handwritten digits "
        f"({counts['rate']:.1%}) got the {demo.trigger.name} trigger on the image and a caption that says "
        f"“{recipe.target}”.",
        f"An undefended CLIP was trained on them from nothing, for {recipe.pretrain_epochs} epochs.",
    ]
    if fine_tuned:
        steps.append(
            f"It was fine-tuned for {recipe.finetune_epochs} epochs on {counts['dataset_length']} clean pairs, twice "
            "from the same weights: plainly, which is the control, and with CleanCLIP."
        )
    else:
        steps += [
            "Another was trained on the same poisoned pairs, from the same initial weights and for as many epochs, "
            "with its images and captions augmented. That is the control: augmentation alone removes some "
            "backdoors, and what it removes is no merit of the defence.",
            f"Another, with the same augmentation, was trained with {LABELS[defence]}.",
        ]
    steps += [
        f"All were measured on {len(demo.test)} digits that no training saw; {demo.attack.attacked_images} of them "
        f"are not of “{recipe.target}” and were attacked.",
        f"To do it again: {command}. Beside this file, {RESULTS} has every figure, {MANIFEST} every poison, and a "
        "folder for each model its weights.",
    ]
    return Study(
        title=title_of(defence),
        steps=steps,
        limits=[*(_FINE_TUNING if fine_tuned else _PRETRAINING), *filter(None, [_OWN.get(defence)]), *_LIMITS],
        pairs=demo.pairs,
        banner="Quick run: the models are hardly trained, and the figures mean little." if quick else None,
    )
