"""KCR's training: which channels by their scores, under the kernel term (section 2.3)."""

from typing import ClassVar

from nas.methods.kernel import KernelTraining
from nas.objectives.options import KernelOptions
from nas.searchers.channels import Bernoulli, KernelSearch
from nas.searchers.options import ScoreOptions, SearchOptions, SelectionOptions
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import Space


class KCRTraining(KernelTraining):
    """Counts of channels, or every channel by itself."""

    options: ClassVar[tuple[type, ...]] = (KernelOptions, ScoreOptions, SelectionOptions)
    trained: ClassVar[tuple[type, ...]] = options
    narrows = False

    def check(self, options: SearchOptions, space: Space) -> None:
        super().check(options, space)
        if options.selection == "bernoulli" and options.fractions is not None:
            raise UserError("--fractions offers counts to choose from; --selection bernoulli has none")
        if options.selection == "bernoulli" and len(options.limits()) + bool(options.budget) > 1:
            raise UserError("--selection bernoulli holds one price; give --budget or one limit")
        if options.alphas is not None:
            raise UserError(f"--alphas: {space.name} has no compression factor; offer channel counts with --fractions")
        if options.width != "stream":
            raise UserError(
                f"--width {options.width}: {space.name} keeps the whole stream in every block; leave it out"
            )

    def settings(self, options: SearchOptions, space: Space) -> Settings:
        settings = super().settings(options, space)
        return settings if options.selection != "bernoulli" else Settings(settings.width, settings.alphas, None)

    def search_kind(self, options: SearchOptions) -> type[KernelSearch]:
        return Bernoulli if options.selection == "bernoulli" else super().search_kind(options)
