"""CLIP itself: the undefended baseline."""

from __future__ import annotations

import torch

from ..batch import Batch, Embeddings
from ..methods import Method
from .base import Defence


class CLIP(Defence):
    """The loss of CLIP (Radford et al., ICML 2021), and nothing else."""

    method = Method(
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
    )

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (view,) = views.values()
        return {"clip_loss": self.contrast(*view, scale, batch)}
