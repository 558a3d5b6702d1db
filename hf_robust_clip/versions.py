"""Which versions are at work, for whatever reports figures."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from . import __version__

#: The packages that figures depend on.
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "kornia")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """The versions of this package, of Python and of others; `None` for what is missing."""
    return {
        "hf_robust_clip": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
    }


def installed(package: str) -> str | None:
    """The version of a package; `None` if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
