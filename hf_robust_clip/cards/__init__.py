"""Model cards: what a run did, what was measured, and what it does not stop."""

from .rendering import MARKER, render_card
from .writing import PICTURE, kept_card, license_of, write_card

__all__ = ["MARKER", "PICTURE", "kept_card", "license_of", "render_card", "write_card"]
