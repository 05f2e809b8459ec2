"""A search space: one backbone's blocks and the candidates of every choice in each of them.

The grammar is nni.mutable's: one labelled Categorical per block and choice. nni is imported only when the
grammar itself is asked for; slices and sizes need nothing but this file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search_spaces.errors import UserError
from search_spaces.method import WIDTHS, Candidate, Choices, Method, Picks, Settings
from search_spaces.slices import BlockShape, BlockSlice


@dataclass(frozen=True)
class SearchSpace:
    """Choices of every block. candidates[l][name] are block l's candidates of choice `name`."""

    name: str
    method: Method
    settings: Settings
    shapes: tuple[BlockShape, ...]
    candidates: tuple[Choices, ...]
    dropped: tuple[str, ...] = ()

    def size(self) -> int:
        """Number of architectures, at most the 1e300 that a float still holds."""
        sizes = {
            self.label(i, name): len(options)
            for i, block in enumerate(self.candidates)
            for name, options in block.items()
        }
        return min(math.prod(sizes.values()), 10**300)

    def label(self, block: int, choice: str) -> str:
        """The label of a choice in the grammar, "block3/alpha"; blocks of a stage that choose alike share it."""
        return "/".join(self._scope(block, choice))

    def _scope(self, block: int, choice: str) -> tuple[str, str]:
        of_stage = choice in self.method.stage_choices
        return f"stage{self.shapes[block].stage}" if of_stage else f"block{block}", choice

    def block_slices(
        self, picks: Sequence[Picks], kept: Sequence[Mapping[str, Sequence[int]]] | None = None
    ) -> list[BlockSlice]:
        """The slice of every block at one candidate per choice."""
        return block_slices(self.name, self.method, self.settings, self.shapes, picks, kept)

    def mutable(self) -> Any:
        """The space as an nni.mutable MutableList of one MutableDict per block, labelled as in `label`."""
        from nni.mutable import Categorical, MutableDict, MutableList, label_scope

        blocks = []
        for block, choices in enumerate(self.candidates):
            grammar = {}
            for name, options in choices.items():
                scope, own = self._scope(block, name)
                with label_scope(scope):  # nni takes no slash in a name, it joins scopes with one
                    grammar[name] = Categorical(list(options), label=own)
            blocks.append(MutableDict(grammar))
        return MutableList(blocks)

    def freeze(self, sample: Mapping[str, Candidate]) -> list[dict[str, Candidate]]:
        """Picks of a sample {"block3/alpha": 2, ...}; nni validates it against the grammar."""
        return list(self.mutable().freeze(dict(sample)))

    def validated(self, picks: Sequence[Picks]) -> list[dict[str, Candidate]]:
        """Picks of every block, checked against the grammar."""
        check_stages(self.name, self.method, self.shapes, picks)
        sample = {self.label(i, name): option for i, pick in enumerate(picks) for name, option in pick.items()}
        return self.freeze(sample)

    def random(self, seed: int) -> list[dict[str, Candidate]]:
        """Picks drawn uniformly."""
        import numpy as np

        return list(self.mutable().random(random_state=np.random.RandomState(seed)))


def spell(candidates: Sequence[Candidate]) -> str:
    """Candidates in words: all of a few, the ends of a long run of whole numbers."""
    if len(candidates) > 12 and set(candidates) == set(range(int(min(candidates)), int(max(candidates)) + 1)):
        return f"{min(candidates)} to {max(candidates)}"
    return ", ".join(map(str, candidates))


def check_stages(name: str, method: Method, shapes: Sequence[BlockShape], picks: Sequence[Picks]) -> None:
    """UserError where blocks of a stage differ in what they are to choose alike."""
    for choice in method.stage_choices:
        first: dict[int, tuple[int, Candidate]] = {}
        for i, (shape, pick) in enumerate(zip(shapes, picks, strict=True)):
            block, option = first.setdefault(shape.stage, (i, pick[choice]))
            if pick[choice] != option:
                raise UserError(
                    f"{name}: block {i} has {choice} {pick[choice]:g}, block {block} of the same stage {option:g};"
                    " they are to be the same"
                )


def block_slices(
    name: str,
    method: Method,
    settings: Settings,
    shapes: Sequence[BlockShape],
    picks: Sequence[Picks],
    kept: Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> list[BlockSlice]:
    """Every block's slice. UserError names the block and what it allows when a pick does not fit it."""
    if len(picks) != len(shapes):
        raise UserError(f"{name}: {len(picks)} blocks in the architecture, {len(shapes)} in the backbone")
    for i, pick in enumerate(picks):
        for choice, value in pick.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name}: block {i} has {choice} {value!r:.60}; expected a number")
    check_stages(name, method, shapes, picks)
    kept = kept or [{}] * len(shapes)
    slices = []
    for i, (shape, pick, indices) in enumerate(zip(shapes, picks, kept, strict=True)):
        try:
            slices.append(method.block_slice(shape, settings, pick, indices))
        except ValueError as error:
            allowed, _ = method.choices(shape, Settings(settings.width, granularity=1))
            options = "; ".join(f"{n}: {spell(c)}" for n, c in allowed.items())
            raise UserError(f"{name}: block {i}: {error}; allowed: {options}") from None
    return slices


def make_space(name: str, method: Method, settings: Settings, shapes: Sequence[BlockShape]) -> SearchSpace:
    """The space over a backbone's blocks; UserError when a block is left without a candidate."""
    if settings.width not in WIDTHS:
        raise UserError(f"width {settings.width!r}; expected one of {', '.join(WIDTHS)}")
    for a in settings.alphas or ():
        if a < 1:
            raise UserError(f"{name}: alpha {a}; a compression factor is a whole number of at least 1")
    for f in settings.fractions or ():
        if not 0 < f <= 1:
            raise UserError(f"{name}: fraction {f:g}; expected a share of the channels, above 0, at most 1")
    check_kept(name, method, settings, len(shapes))
    candidates, dropped = [], []
    for i, shape in enumerate(shapes):
        kept = kept_whole(method) if i in settings.keep_blocks else ()
        own = replace(settings, fixed=(*settings.fixed, *kept))
        choices, left_out = method.choices(shape, own)
        for choice, options in choices.items():
            if not options:
                raise UserError(f"{name}: block {i} has no candidate of {choice}: {'; '.join(left_out)}")
        candidates.append(choices)
        dropped += [f"block {i}: {line}" for line in left_out]
    return SearchSpace(name, method, settings, tuple(shapes), tuple(candidates), tuple(dropped))


def check_kept(name: str, method: Method, settings: Settings, blocks: int) -> None:
    """Refuse blocks and choices to leave alone that are not there."""
    outside = [i for i in settings.keep_blocks if not 0 <= i < blocks]
    if outside:
        raise UserError(f"{name}: --keep-block {outside[0]}; the backbone has blocks 0 to {blocks - 1}")
    unknown = [choice for choice in settings.fixed if choice not in method.choice_names]
    if unknown:
        raise UserError(f"{name}: --fix {unknown[0]}; expected some of {', '.join(method.choice_names)}")
    if settings.granularity < 1:
        raise UserError(f"{name}: --granularity {settings.granularity}; expected a whole number of at least 1")


def kept_whole(method: Method) -> tuple[str, ...]:
    """The choices that a block which is kept does not make: all that are its own."""
    return tuple(choice for choice in method.choice_names if choice not in method.stage_choices)


def require_search(space: SearchSpace) -> None:
    """Refuse a search in which no block has two candidates."""
    if space.size() < 2:
        raise UserError(
            f"{space.name}: no block has two candidates, there is nothing to search; offer more with"
            f" {space.method.offers} (block 0 has {space.shapes[0].num_heads} heads,"
            f" {space.shapes[0].embed_dim} channels)"
        )


def uniform_alphas(space: SearchSpace) -> list[int]:
    """The alpha that every block allows, ascending."""
    common = set.intersection(*({int(a) for a in block["alpha"]} for block in space.candidates))
    return sorted(common)


def check_uniform_alpha(space: SearchSpace, alpha: int) -> None:
    """Refuse an alpha that some block does not allow, naming the blocks and the alpha that would do."""
    blocks = [i for i, choices in enumerate(space.candidates) if alpha not in choices["alpha"]]
    if blocks:
        heads = sorted({space.shapes[i].num_heads for i in blocks})
        raise UserError(
            f"{space.name}: alpha {alpha} does not divide blocks {', '.join(map(str, blocks))}"
            f" (heads: {', '.join(map(str, heads))}); allowed: {', '.join(map(str, uniform_alphas(space)))}"
        )
