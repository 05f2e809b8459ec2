"""DAN, differentiable adjoined: a compression factor for every block (section 2.2)."""

from collections.abc import Mapping, Sequence

from search_spaces.defaults import ADJOINED_PUBLISHED, Defaults, combined
from search_spaces.method import Candidate, Method, Picks, Settings, alpha_candidates, whole
from search_spaces.slices import BlockShape, BlockSlice, prefix_slice


class DAN(Method):
    """Per block a Gumbel-softmax choice of alpha among the offered factors that divide its heads."""

    name = "dan"
    choice_names = ("alpha",)
    # tau is constant in the thesis, which does not say at what; 1 is a reading.
    published = combined(
        ADJOINED_PUBLISHED,
        Defaults(
            search=dict(
                searcher="gradient", start="uniform", epochs=100, gamma=1e-12, budget=0.0, stage_gates=False,
                arch_pace="constant", tau=(1.0,),
            )
        ),
    )  # fmt: skip

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        candidates, dropped = alpha_candidates(shape, settings)
        return {"alpha": candidates}, dropped

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        return prefix_slice(shape, whole(picks, "alpha", 1), settings.width)
