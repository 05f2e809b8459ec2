"""What a method says about a block: its choices, and the slice that a candidate stands for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from search_spaces.defaults import Defaults
from search_spaces.slices import BlockShape, BlockSlice

Candidate = int | float  # one option of a choice
Choices = Mapping[str, tuple[Candidate, ...]]  # choice name -> its candidates, for one block
Picks = Mapping[str, Candidate]  # choice name -> the candidate taken, for one block
WIDTHS = ("stream", "inner")
FRACTIONS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Settings:
    """What the user may set about a search space.

    width: "stream" or "inner" (section 2.1). alphas: compression factors offered to every block; None: the
    space's own. fractions: channel fractions offered to every block; None: every multiple of 8 channels
    (Bernoulli gates, where counts are not candidates but outcomes). granularity: what free widths are multiples of;
    keep_blocks: blocks that stay whole but for their stream; fixed: choices that are not made (section 2.9).
    """

    width: str = "stream"
    alphas: tuple[int, ...] | None = None
    fractions: tuple[float, ...] | None = FRACTIONS
    granularity: int = 8
    keep_blocks: tuple[int, ...] = ()
    fixed: tuple[str, ...] = ()


class Method(ABC):
    """One search method: what it may choose about a block, and the defaults that belong to it. One file each.

    choice_names: the choices of a block, by their names in arch.json; kept_names: the index lists beside them.
    stage_choices: those that all blocks of a stage make alike. halves: those of attention and those of the MLP, where
    the two halves of a block choose each for itself.
    counted: choices whose candidates are numbers of units, so that the same of two blocks is the same share of them.
    uniform: one candidate serves all blocks, so that there is nothing to search inside one. listed: whether all
    combinations of a block's candidates are few enough to be listed; otherwise their ends stand for them.
    offers: the flags that offer candidates. models: where a family's default model is another one for this method.
    without: families that have no space of it, and why.
    defaults: of its full-size spaces; nano_defaults: of its -nano ones; published: what its authors ran, None where it
    is nobody's but this toolkit's.
    """

    name: ClassVar[str]
    choice_names: ClassVar[tuple[str, ...]]
    kept_names: ClassVar[tuple[str, ...]] = ()
    stage_choices: ClassVar[tuple[str, ...]] = ()
    halves: ClassVar[tuple[tuple[str, ...], ...]] = ()
    counted: ClassVar[tuple[str, ...]] = ()
    uniform: ClassVar[bool] = False
    listed: ClassVar[bool] = True
    offers: ClassVar[str] = "--alphas"
    models: ClassVar[Mapping[str, str]] = {}
    without: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Defaults] = Defaults()
    nano_defaults: ClassVar[Defaults] = Defaults()
    published: ClassVar[Defaults | None] = None

    @abstractmethod
    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        """Each choice's candidates for a block, and what was left out, in words."""

    @abstractmethod
    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        """The slice of a block at one candidate per choice. kept: indices, where a choice is no prefix."""


def whole(picks: Picks, name: str, least: int = 0) -> int:
    """The candidate of a choice that counts something. ValueError when it is no whole number from `least` on."""
    value = picks[name]
    if value != value // 1 or value < least:
        raise ValueError(f"{name} {value:g} is no whole number of at least {least}")
    return int(value)


def divisors(shape: BlockShape, settings: Settings) -> list[int]:
    """The alpha that a block allows: divisors of its heads (sections 2.1 and 2.2), up to 8."""
    sizes = [shape.num_heads, shape.hidden] + ([shape.embed_dim] if settings.width == "stream" else [])
    return [a for a in range(1, min(shape.num_heads, 8) + 1) if all(size % a == 0 for size in sizes)]


def alpha_candidates(shape: BlockShape, settings: Settings) -> tuple[tuple[Candidate, ...], list[str]]:
    """The offered alpha that divide a block, ascending, and a line for each that was left out."""
    allowed = divisors(shape, settings)
    offered = sorted(set(settings.alphas if settings.alphas is not None else allowed))
    dropped = [a for a in offered if a not in allowed]
    reason = f"{shape.num_heads} heads allow {', '.join(map(str, allowed))}"
    return tuple(a for a in offered if a in allowed), [f"alpha {a} left out ({reason})" for a in dropped]


def picks_of(block: Mapping[str, Any], names: Sequence[str]) -> Picks:
    """The candidates of a block's entry in arch.json."""
    return {name: block[name] for name in names}
