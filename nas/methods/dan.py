"""DAN's training: a factor for every block, by gradient (section 2.2)."""

from nas.methods.method import MethodTraining
from nas.searchers.options import SearchOptions
from search_spaces.errors import UserError
from search_spaces.registry import Space


class DANTraining(MethodTraining):
    """Everybody's objective."""

    def check(self, options: SearchOptions, space: Space) -> None:
        if options.alpha is not None and options.searcher != "uniform":
            raise UserError(f"--alpha is one factor; {space.name} searches, offer it candidates with --alphas")
