"""The training of free widths: chosen by importance in seconds, or by gradient, refitted (sections 2.9 to 2.11)."""

from typing import ClassVar

from nas.machine.ranges import at_least_one
from nas.methods.method import MethodTraining, search_arguments
from nas.searchers.nested import NestedGradient
from nas.searchers.options import FreeOptions, ImportanceOptions, SearchOptions
from nas.searchers.searcher import Question
from nas.training.prepared import Prepared
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import Space


class FreeTraining(MethodTraining):
    """No training in its search, or one that begins at what importance finds; what is cut is refitted."""

    searchers = ("importance", "gradient", "evolution", "random", "uniform")
    options: ClassVar[tuple[type, ...]] = (FreeOptions, ImportanceOptions)
    recorded = ("granularity", "keep_block", "fix", "score", "decide", "evals", "labels", "refit_images")
    refits = True
    narrows = False  # a stage's width is a choice of its own

    def check(self, options: SearchOptions, space: Space) -> None:
        at_least_one(options, "evals")
        if not options.budget and not options.limits() and not options.front:
            raise UserError(f"{space.name} compresses to a budget; give --budget or --gflops")
        if options.alphas is not None:
            raise UserError(f"--alphas: {space.name} has no compression factor; --granularity says how fine widths are")
        if options.width != "stream" or options.stage_width != "widest":
            raise UserError(f"--width and --stage-width go with factors; --fix stream keeps the stream of {space.name}")
        scored = options.searcher not in ("random", "uniform")
        another = options.basis == "none" or options.importance not in (None, "error")
        if scored and options.score == "error" and another:
            raise UserError(
                "--score error needs units in a basis, ordered by --importance error; leave both out, or take"
                " --score taylor"
            )

    def settings(self, options: SearchOptions, space: Space) -> Settings:
        step = 8 if options.granularity is None else options.granularity
        return Settings(granularity=step, keep_blocks=options.keep_block, fixed=options.fix)

    def objective(self, options: SearchOptions, question: Question, prepared: Prepared) -> NestedGradient:
        return NestedGradient(prepared.supernet, question.priced, **search_arguments(options, question, prepared))
