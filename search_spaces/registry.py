"""Every search space by name: <family>-<method>, and its -nano variant."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_spaces.an import AN
from search_spaces.architecture import load_architecture
from search_spaces.dan import DAN
from search_spaces.defaults import EVERYBODY, EVERYBODY_NANO, Defaults, combined
from search_spaces.errors import UserError
from search_spaces.families import FAMILIES, Family
from search_spaces.free import Free
from search_spaces.joint import Joint
from search_spaces.kcr import KCR
from search_spaces.method import Method
from search_spaces.uvc import UVC

METHODS: dict[str, Method] = {method.name: method for method in (AN(), DAN(), KCR(), Joint(), UVC(), Free())}
DEFAULT_SPACE = "swin-dan-nano"
AUTO = "auto-"  # before a method's name: of the family that --model turns out to be of


@dataclass(frozen=True)
class Space:
    """A backbone family and a method, with the defaults that were published or measured for the pair.

    model, model_kwargs: arguments of timm.create_model. alphas: candidate factors, None for all divisors of the
    heads up to 8. training: defaults of both stages' options; search and retrain: of one stage's. published: what the
    method's authors ran, with the family's rate, batch and candidates.
    """

    name: str
    family: str
    method: Method
    model: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    alphas: tuple[int, ...] | None = None
    nano: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Any] = field(default_factory=dict)
    published: Defaults | None = None


def _full(family: Family, method: Method) -> Space:
    defaults = combined(EVERYBODY, family.defaults, method.defaults)
    return Space(
        name=f"{family.name}-{method.name}",
        family=family.name,
        method=method,
        model=method.models.get(family.name, family.model),
        alphas=family.alphas,
        training=defaults.training,
        search=defaults.search,
        retrain=defaults.retrain,
        published=_published(family, method),
    )


def _published(family: Family, method: Method) -> Defaults | None:
    if method.published is None:
        return None
    searched = "alpha" in method.choice_names and not method.uniform and family.alphas is not None
    candidates = Defaults(search=dict(alphas=family.alphas) if searched else {})
    return combined(family.defaults, method.published, candidates)


def _nano(family: Family, method: Method) -> Space:
    defaults = combined(EVERYBODY_NANO, method.nano_defaults)
    return Space(
        name=f"{family.name}-{method.name}-nano",
        family=family.name,
        method=method,
        model=family.nano,
        model_kwargs=family.nano_kwargs,
        nano=True,
        training=defaults.training,
        search=defaults.search,
        retrain=defaults.retrain,
        published=_published(family, method),
    )


def all_spaces() -> dict[str, Space]:
    """Every family with every method, in both sizes, by name."""
    pairs = [(f, method) for method in METHODS.values() for f in FAMILIES.values() if f.name not in method.without]
    return {space.name: space for pair in pairs for space in (_full(*pair), _nano(*pair))}


SPACES: Mapping[str, Space] = all_spaces()


def get_space(name: str) -> Space:
    """The space of that name; UserError names near matches."""
    spaces = all_spaces()
    if name in spaces:
        return spaces[name]
    for method in METHODS.values():
        for family, why in method.without.items():
            if name in (f"{family}-{method.name}", f"{family}-{method.name}-nano"):
                raise UserError(f"there is no space {name}: {why}; take another method of {family}")
    if name.startswith(AUTO):
        raise UserError(f"{name} is a space of the family of --model, which is not named here; name a family's space")
    near = difflib.get_close_matches(name, spaces, n=3) or sorted(spaces)
    raise UserError(f"unknown space {name!r}; did you mean {', '.join(near)}? (search.py --list-spaces shows all)")


def space_of(space: str | None, arch: Path | None) -> str:
    """The space of a search: --space, the default, or with --arch free widths of the run's family and size.

    UserError where --space names another space than free widths of that family.
    """
    if arch is None:
        return space or DEFAULT_SPACE
    given = get_space(load_architecture(arch).space)
    free = [each for each in all_spaces().values() if each.family == given.family and each.method.halves]
    if space is not None and space not in {each.name for each in free}:
        names = " or ".join(sorted(each.name for each in free))
        raise UserError(f"--space {space}: the compact network of --arch {arch} is compressed in {names}; leave it out")
    return space or next(each.name for each in free if each.nano == given.nano)
