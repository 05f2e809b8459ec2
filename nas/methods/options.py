"""The option of how a method is run: by its authors' settings, or by this toolkit's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RecipeOptions:
    """Whose settings fill what is left open."""

    recipe: Literal["toolkit", "published"] = "toolkit"
    """what fills options that are left open: this toolkit's defaults, or what the method's authors ran, which refuses a
    flag that contradicts it (docs/fidelity.md)"""
