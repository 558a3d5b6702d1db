"""What is known of each method whatever the run: what it does, what it does not stop, its paper."""

from __future__ import annotations

from dataclasses import dataclass

_ANYTHING = (
    "Nobody can measure a trigger that they did not think of: low success of those tried says nothing of others."
)
_WORDS = (
    "It was not made against words in captions as triggers; no defence in hf_robust_clip was. ToxicTextCLIP, which "
    "poisons captions, kept {} attack success under it (arXiv 2511.00446)."
)
_CONSISTENT = (
    "It does not stop label-consistent poisons, whose caption fits the image: they look like clean pairs, and nothing "
    "in hf_robust_clip stops them."
)
_FIRST = (
    "It comes too late for what was learned before {}: what a model has learned of poisons by then it tends to keep."
)


@dataclass(frozen=True)
class Method:
    """
    A method of training.

    Args:
        name (`str`): As the paper writes it.
        what (`str`): What it does, in a sentence or two.
        kind (`str`): `"none"`, no defence; `"fine-tuning"`, which cleans a model that may be poisoned;
            `"pre-training"` on pairs that may be; `"own"`, one that this package does not know.
        limits (`tuple[str, ...]`): What it is known not to stop, and what it costs, a sentence each.
        paper (`str`, *optional*): In a few words, with the arXiv number.
        bibtex (`str`, *optional*): Its entry.
    """

    name: str
    what: str
    kind: str
    limits: tuple[str, ...]
    paper: str | None = None
    bibtex: str | None = None


METHODS: dict[str, Method] = {
    "CLIPTrainer": Method(
        name="CLIP",
        what="Trained with the contrastive loss of CLIP on image-caption pairs.",
        kind="none",
        limits=("It stops nothing: no poisoned pair, and no backdoor of the model that training started from.",),
        paper="Radford et al., ICML 2021, arXiv 2103.00020",
        bibtex="""@inproceedings{radford2021learning,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal,
    Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen and
    Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2021},
  eprint = {2103.00020},
  archivePrefix = {arXiv}
}""",
    ),
    "CleanCLIPTrainer": Method(
        name="CleanCLIP",
        what="Fine-tuned with CleanCLIP on pairs taken to be clean: to the loss of CLIP it adds self-supervision "
        "within images and within captions, which loosens what a trigger has tied together.",
        kind="fine-tuning",
        limits=(
            "It needs clean pairs: poisons that are left among them undo it (arXiv 2311.14948).",
            "It does not clean models that were pre-trained with a self-supervised term as well, however it is tuned "
            "(arXiv 2311.14948).",
            "It is weak against structured triggers: stripes, triangles, text (arXiv 2412.00727).",
            "It does not stop BadCLIP, whose trigger is optimized: 99.8% attack success became 89.7% "
            "(arXiv 2412.20392).",
            "It leaves something, and costs accuracy: on a ViT-B/32 the success of the patch went from 82.7% to "
            "23.8%, zero-shot accuracy from 63.0% to 57.9%, in a third party's re-run (RVPT, arXiv 2412.20392, table "
            "1).",
            _WORDS.format("75%"),
            _ANYTHING,
        ),
        paper="Bansal et al., ICCV 2023, arXiv 2303.03323",
        bibtex="""@inproceedings{bansal2023cleanclip,
  title = {{CleanCLIP}: Mitigating Data Poisoning Attacks in Multimodal Contrastive Learning},
  author = {Bansal, Hritik and Singhi, Nishad and Yang, Yu and Yin, Fan and Grover, Aditya and Chang, Kai-Wei},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023},
  eprint = {2303.03323},
  archivePrefix = {arXiv}
}""",
    ),
    "RoCLIPTrainer": Method(
        name="RoCLIP",
        what="Trained with RoCLIP on pairs that may be poisoned: in matching epochs an image learns from the caption "
        "nearest to it in a pool of earlier ones instead of from its own.",
        kind="pre-training",
        limits=(
            _FIRST.format("the first matching epoch"),
            "Poisons that are many enough to be matched with each other get through.",
            _CONSISTENT,
            _WORDS.format("71%"),
            _ANYTHING,
        ),
        paper="Yang, Gao and Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854",
        bibtex="""@inproceedings{yang2023robust,
  title = {Robust Contrastive Language-Image Pretraining against Data Poisoning and Backdoor Attacks},
  author = {Yang, Wenhan and Gao, Jingdong and Mirzasoleiman, Baharan},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year = {2023},
  eprint = {2303.06854},
  archivePrefix = {arXiv}
}""",
    ),
    "SafeCLIPTrainer": Method(
        name="SafeCLIP",
        what="Trained with SafeCLIP on pairs that may be poisoned: a Gaussian mixture over the pairs' similarities "
        "tells safe ones, which get the loss of CLIP, from risky ones, whose image and caption learn each by itself. "
        "Not to be confused with aimagelab's safe-clip, which is about unsafe content.",
        kind="pre-training",
        limits=(
            _FIRST.format("the first split"),
            _CONSISTENT,
            "It costs accuracy where data is scarce, since risky pairs teach no words: an independent run on 500,000 "
            "pairs went from 25.3% to 13.9% on CIFAR-10.",
            _WORDS.format("64%"),
            _ANYTHING,
        ),
        paper="Yang, Gao and Mirzasoleiman, ICML 2024, arXiv 2310.05862",
        bibtex="""@inproceedings{yang2024better,
  title = {Better Safe than Sorry: Pre-training {CLIP} against Targeted Data Poisoning and Backdoor Attacks},
  author = {Yang, Wenhan and Gao, Jingdong and Mirzasoleiman, Baharan},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2024},
  eprint = {2310.05862},
  archivePrefix = {arXiv}
}""",
    ),
}


def method_of(trainer: str, base: str) -> Method:
    """
    The method of a trainer.

    Args:
        trainer (`str`): Its class's name.
        base (`str`): The class of this package that it is or derives from; empty where that is not recorded.
    """
    base = base or trainer
    if base in METHODS and (trainer == base or base != "CLIPTrainer"):
        return METHODS[base]
    return Method(
        name=trainer,
        what="Trained with a method of its author's own on top of hf_robust_clip, which knows nothing of what that "
        "method stops.",
        kind="own",
        limits=(_ANYTHING,),
    )
