"""Architecture search inside vision transformers. `import nas` gives the names below (docs/library.md).

Nothing else is imported until one of them is used: torch takes seconds, and the command lines print their help first.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.library import Architecture, Supernet, cut, load, pick, retrain, rewrite, save, search

__all__ = ["Architecture", "Supernet", "cut", "load", "pick", "retrain", "rewrite", "save", "search"]


def __getattr__(name: str) -> Any:
    """One of the names, at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'nas' has no attribute {name!r}")
    from nas import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
