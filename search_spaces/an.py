"""AN, adjoined training: one compression factor for the whole network (section 2.1)."""

from collections.abc import Mapping, Sequence

from search_spaces.defaults import ADJOINED_PUBLISHED, Defaults, combined
from search_spaces.method import Candidate, Method, Picks, Settings, divisors, whole
from search_spaces.slices import BlockShape, BlockSlice, prefix_slice


class AN(Method):
    """Nothing to search inside a block: alpha is given, or is the smallest that fits a budget."""

    name = "an"
    choice_names = ("alpha",)
    uniform = True
    published = combined(ADJOINED_PUBLISHED, Defaults(search=dict(searcher="uniform")))

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        return {"alpha": tuple(divisors(shape, settings))}, []

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        return prefix_slice(shape, whole(picks, "alpha", 1), settings.width)
