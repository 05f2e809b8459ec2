"""Searches that train: the objective's parameters with the supernet's weights, then the last choice among finalists."""

from nas.machine.devices import autocast
from nas.machine.ranges import at_least_one
from nas.searchers.decide import decide
from nas.searchers.options import DecideOptions, ImportanceOptions, MixtureOptions, SearchOptions
from nas.searchers.searcher import Answer, Question, Run, Searcher
from nas.searchers.start import begin, to_begin
from nas.training.basis import find_basis
from nas.training.loop import fit
from nas.training.make import make_training
from nas.training.state import settle
from search_spaces.errors import UserError
from search_spaces.method import Method


class Trained(Searcher):
    """By the one training loop; what is minimised is the method's objective."""

    name, starts, banded, learns = "gradient", True, True, True

    def owned(self, method: Method) -> tuple[type, ...]:
        """Its mixture's, and those of a solution where it may begin at one that is measured."""
        return (MixtureOptions, DecideOptions, ImportanceOptions) if method.halves else (MixtureOptions,)

    def check(self, options: SearchOptions, question: Question) -> None:
        at_least_one(options, "epochs")
        if options.start == "importance" and question.budget is None:
            raise UserError("--start importance is a solution within a budget; give --budget or --gflops")
        super().check(options, question)

    def search(self, run: Run) -> Answer:
        options, prepared = run.options, run.prepared
        objective = run.objective()
        beginning = to_begin(run, objective)
        standing = find_basis(options, prepared)
        if beginning is not None:
            begin(run, beginning)
        training = make_training(options, objective, prepared, options.arch_lr or 1e-3)
        fit(training, options.resume, "search", run.on_epoch)
        settle(training, best=False)
        prepared.supernet.eval()
        print("choosing the architecture ...")  # up to a minute or two of integer programs for a Swin-B
        finalists = [objective.selection()] if prepared.loaders.val is None else objective.finalists()
        subnets = [objective.subnet_of(picks) for picks, _ in finalists]
        taken, measured = decide(subnets, prepared, lambda: autocast(options, prepared.device))
        picks, selection = finalists[taken]
        return Answer(
            picks=picks,
            kept=objective.kept_indices(picks),
            in_band=selection is None or selection.in_band,
            standing=standing,
            found=objective.found(),
            finalists=measured,
            trained=tuple(objective.networks()),
        )
