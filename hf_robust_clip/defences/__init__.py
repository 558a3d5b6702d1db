"""A method a file, as an object that the trainer calls; `DEFENCES` is the list of those that ship."""

from __future__ import annotations

from .base import Defence
from .cleanclip import CleanCLIP
from .clip import CLIP
from .roclip import RoCLIP
from .safeclip import SafeCLIP

#: By the names that the command line, the bench and the cards call them.
DEFENCES: dict[str, type[Defence]] = {"clip": CLIP, "cleanclip": CleanCLIP, "roclip": RoCLIP, "safeclip": SafeCLIP}
