"""What a method adds to the two stages; as it stands here, what one adds that has no file of its own."""

from collections.abc import Mapping
from typing import Any, ClassVar

from nas.objectives.table import Make
from nas.searchers.gradient import Gradient
from nas.searchers.gumbel import TAU
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Question
from nas.searchers.supernet_search import Mixing, Search
from nas.training.optim import updates_per_epoch
from nas.training.prepared import Prepared
from search_spaces.method import FRACTIONS, Settings
from search_spaces.registry import Space

GAMMA = 1e-12  # equation (3.7), on raw MACs


class MethodTraining:
    """How the spaces of a method are searched and retrained.

    searchers: those that it allows, its own first. options: records of options that its search reads and others' may
    not; trained: those of them that only a search reads which trains; recorded: options that its arch.json keeps
    beside everybody's. kernel_term: whether both stages have one.
    objectives: its own, where a way to train in stage 2 is another one for it. rotates: whether its
    networks may stand in a rotated basis. refits: whether they are refitted when they are cut (section 2.11), and when
    they begin to be distilled. narrows: whether its blocks choose, by factors, how wide their stage is.
    """

    searchers: ClassVar[tuple[str, ...]] = ("gradient", "evolution", "random", "uniform")
    options: ClassVar[tuple[type, ...]] = ()
    trained: ClassVar[tuple[type, ...]] = ()
    recorded: ClassVar[tuple[str, ...]] = ()
    objectives: ClassVar[Mapping[str, Make]] = {}
    rotates: ClassVar[bool] = True
    refits: ClassVar[bool] = False
    narrows: ClassVar[bool] = True

    def check(self, options: SearchOptions, space: Space) -> None:
        """Refuse option values that a search of this method cannot use."""

    def settings(self, options: SearchOptions, space: Space) -> Settings:
        """What is offered to every block."""
        alphas = space.alphas if options.alphas is None else tuple(options.alphas)
        return Settings(options.width, alphas, options.fractions or FRACTIONS)

    def resolved(self, options: SearchOptions, prepared: Prepared) -> Mapping[str, Any]:
        """Options whose default depends on the weights that the search starts from. {option: value}"""
        return {}

    def objective(self, options: SearchOptions, question: Question, prepared: Prepared) -> Search:
        """What the search minimises."""
        return Gradient(prepared.supernet, question.priced, **search_arguments(options, question, prepared))

    def remarks(self, found: Mapping[str, Any]) -> str:
        """What is worth saying of a result, after its share of the FLOPs; empty for nothing."""
        return ""


def search_arguments(options: SearchOptions, question: Question, prepared: Prepared) -> dict[str, Any]:
    """The arguments of Search that the options decide."""
    return {
        "budget": question.budget,
        "band": question.band,
        "gamma": GAMMA if options.gamma is None else options.gamma,
        "seed": options.seed,
        "total_steps": options.total_epochs() * updates_per_epoch(options, prepared.loaders.train),
        "smoothing": options.smoothing or 0.0,
        "detach_teacher": options.detach_teacher,
        "mixing": Mixing(options.tau or TAU, options.arch_pace, options.stage_gates is not False),
    }
