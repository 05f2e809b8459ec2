"""How an architecture is found: what a searcher is asked, and what it answers (section 2.12)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nas.prices.costs import PricedSpace
from nas.prices.options import BAND
from nas.prices.selection import check_budget
from nas.searchers.options import SearchOptions
from nas.searchers.supernet_search import Search
from nas.training.basis import Standing
from nas.training.loop import OnEpoch
from nas.training.prepared import Prepared
from search_spaces.method import Method, Picks
from search_spaces.space import require_search


@dataclass(frozen=True)
class Question:
    """Which architecture of a priced space? budget: a fraction of the backbone's price; None: there is none.

    band: as much of it, as a fraction of the same, may be left unused for a better architecture.
    """

    priced: PricedSpace
    budget: float | None
    band: float = BAND


@dataclass(frozen=True)
class Answer:
    """One architecture.

    kept: per block the indices of choices that are no prefix, by their name in arch.json. in_band: whether it uses the
    budget up. standing: the basis or order that it stands in. found: what else the search says about it, for
    arch.json; value: what measuring it gave, where that decided; finalists: those that were measured, likeliest first.
    seconds: that parts of the search took. trained: the networks that the search trained, large or subnet or both;
    where it did, the supernet holds other weights than it began with.
    """

    picks: Sequence[Picks]
    kept: Sequence[Mapping[str, list[int]]]
    in_band: bool = True
    standing: Standing = field(default_factory=Standing)
    found: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    finalists: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


class Searcher(ABC):
    """One way to answer. Either prices alone give the answer (`pick`), or a prepared run does (`search`).

    starts: whether --start says where it begins. banded: whether --band says what it may choose among. measures:
    whether it measures candidates, on images that nothing else may look at. untrained: whether options of a training
    are refused, for it has none. learns: whether it trains, from labels. defaults: of options that were left open,
    before the space's own.
    """

    name: ClassVar[str]
    starts: ClassVar[bool] = False
    banded: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    untrained: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}

    def owned(self, method: Method) -> tuple[type, ...]:
        """The records of options that it reads in spaces of a method; others' searchers may not be given them."""
        return ()

    def defaults_of(self, options: SearchOptions) -> Mapping[str, Any]:
        """Options that were left open, before the space's own."""
        return self.defaults

    def check(self, options: SearchOptions, question: Question) -> None:
        """Refuse what cannot be answered, before weights are loaded."""
        require_search(question.priced.space)
        if question.budget is not None:
            check_budget(question.priced.uniform(), question.priced.full, question.budget, question.priced.price)

    def pick(self, options: SearchOptions, question: Question) -> Answer | None:
        """The answer where it needs no weights; otherwise None."""
        return None

    @abstractmethod
    def search(self, run: "Run") -> Answer:
        """The answer from a run whose weights are loaded."""


@dataclass(frozen=True)
class Run:
    """What a searcher works with. objective: the method's, made when it is asked for."""

    options: SearchOptions
    question: Question
    prepared: Prepared
    objective: Callable[[], Search]
    on_epoch: OnEpoch | None = None
