"""What methods share that choose channels by their scores, under the kernel term (section 2.3)."""

from typing import ClassVar

from nas.machine.ranges import share
from nas.methods.method import MethodTraining, search_arguments
from nas.objectives.kernel import KernelAdjoined, kernel_term
from nas.objectives.options import KernelOptions
from nas.searchers.channels import FLOPS_WEIGHT, KernelSearch, TopK
from nas.searchers.options import ScoreOptions, SearchOptions
from nas.searchers.searcher import Question
from nas.training.prepared import Prepared
from search_spaces.errors import UserError
from search_spaces.registry import Space


class KernelTraining(MethodTraining):
    """Both stages under the kernel term; by --no-adjoined the small network alone."""

    options: ClassVar[tuple[type, ...]] = (KernelOptions, ScoreOptions)
    trained: ClassVar[tuple[type, ...]] = (KernelOptions, ScoreOptions)
    recorded = ("fractions", "selection", "adjoined", "eta_kc", "rho", "flops_weight", "mask_warmup")
    objectives = {"adjoined": KernelAdjoined.of}  # noqa: RUF012

    def check(self, options: SearchOptions, space: Space) -> None:
        share(options, "mask_warmup")
        if options.flops_weight is not None and not options.alone():
            raise UserError("--flops-weight goes with --no-adjoined; the adjoined objective has --gamma or --budget")
        if options.flops_weight is not None and options.flops_weight < 0:
            raise UserError(f"--flops-weight {options.flops_weight}; expected 0 or more")

    def objective(self, options: SearchOptions, question: Question, prepared: Prepared) -> KernelSearch:
        arguments = search_arguments(options, question, prepared)
        if options.alone():
            arguments["flops_weight"] = FLOPS_WEIGHT if options.flops_weight is None else options.flops_weight
        arguments["mask_warmup"] = options.mask_warmup or 0.0
        kind = self.search_kind(options)
        return kind(prepared.supernet, question.priced, kernel=kernel_term(options), **arguments)

    def search_kind(self, options: SearchOptions) -> type[KernelSearch]:
        """Counts by Gumbel-softmax, the channels of highest score."""
        return TopK
