"""Make the reference cards in `model_cards/`: train each defence on the embedded digits as the demo's `--defence all`
does, and render its record.

It takes about 20 minutes on one core.

    python scripts/model_cards.py [--render]

With `--render`, cards and pictures are made anew from the records that are there, and nothing is trained.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_robust_clip import CLIPTrainer
from hf_robust_clip.cli.demo_recipe import PRETRAINING, Recipe
from hf_robust_clip.cli.demo_steps import digit_evaluators, make_trainer, make_trigger, poison_digits
from hf_robust_clip.cli.progress import quiet_trainers
from hf_robust_clip.cli.rows import CLEAN_SEED_OFFSET
from hf_robust_clip.data.digits import digit_model, digit_processor, load_digit_pairs
from hf_robust_clip.record import RunRecord
from hf_robust_clip.telling import render_card
from hf_robust_clip.telling.picture import draw_picture

FOLDER = Path(__file__).parents[1] / "model_cards"
#: The defences, each with the other runs that its card compares it with, and what it calls them.
CARDS = {
    "cleanclip": {"finetuned": "plain fine-tuning on the same pairs"},
    "roclip": {"undefended": "undefended, on the same pairs", "augmentation": "augmentation alone"},
    "safeclip": {"undefended": "undefended, on the same pairs", "augmentation": "augmentation alone"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="render the records that are there")
    if not parser.parse_args().render:
        torch.set_num_threads(1)
        train(FOLDER)
    write(FOLDER)


def write(folder: Path) -> None:
    """Write the cards and their pictures next to the records in a folder."""
    for name in CARDS:
        picture = draw_picture(load(name, folder))
        assert picture is not None  # every run here is measured after each epoch
        (folder / f"{name}.png").write_bytes(picture)
        (folder / f"{name}.md").write_text(render(name, folder), encoding="utf-8")


def render(name: str, folder: Path) -> str:
    """The card of a defence, from the records in a folder."""
    others = {run: load(run, folder) for run in CARDS[name]}
    measured = [
        {"control": CARDS[name][run], "measures": record.measures, "figures": record.after}
        for run, record in others.items()
    ]
    return render_card(
        load(name, folder),
        license="apache-2.0",
        language="en",
        repo_id=f"you/digits-{name}",
        dataset_names="scikit-learn's handwritten digits (Alpaydin and Kaynak, UCI, 1998)",
        picture=f"{name}.png",
        measured=measured,
    )


def load(run: str, folder: Path) -> RunRecord:
    """The record of a run."""
    return RunRecord.from_json((folder / f"{run}.json").read_text(encoding="utf-8"))


def train(folder: Path, recipe: Recipe = PRETRAINING, pairs: int | None = None) -> None:
    """
    Train every model, and write the record of each into a folder.

    Args:
        folder (`Path`): The folder.
        recipe ([`Recipe`]): The numbers.
        pairs (`int`, *optional*): How many training pairs and test images at most.
    """
    test = _named(load_digit_pairs("test"), pairs)
    clean = _named(load_digit_pairs("train", recipe.renderings, seed=CLEAN_SEED_OFFSET), pairs)
    trigger = make_trigger("blended", seed=0)
    tampered = _named(load_digit_pairs("train", recipe.renderings), pairs)
    poisoned, _ = poison_digits(tampered, trigger, recipe, seed=0)
    poisoned.info.dataset_name = "digits"
    shared: dict[str, Any] = {
        "processing_class": digit_processor(),
        "evaluators": digit_evaluators(test, trigger, recipe.target),
    }
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, kind: str, model: Any, train_dataset: Dataset) -> CLIPTrainer:
            trainer = make_trainer(
                kind, recipe, Path(scratch, name), 0, model=model, train_dataset=train_dataset, **shared
            )
            with quiet_trainers():
                trainer.train()
            (folder / f"{name}.json").write_text(trainer.record().to_json(), encoding="utf-8")
            return trainer

        start = str(Path(scratch, "undefended"))
        run("undefended", "poisoned", digit_model(), poisoned).save_model()
        for name in ("finetuned", "cleanclip"):
            run(name, name, start, clean)
        for name in ("augmentation", "roclip", "safeclip"):
            run(name, name, digit_model(), poisoned)


def _named(dataset: Dataset, rows: int | None) -> Dataset:
    """The first rows of a dataset under the name that cards call it."""
    dataset = dataset.select(range(min(rows or len(dataset), len(dataset))))
    dataset.info.dataset_name = "digits"
    return dataset


if __name__ == "__main__":
    main()
