"""The architecture logits of a search, and the mixture that a draw of them stands for."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nas.searchers.gumbel import gumbel_softmax
from search_spaces.method import Picks
from search_spaces.slices import BlockSlice, count
from search_spaces.space import SearchSpace
from supernets.elastic import BlockMixture, Term
from supernets.flops import BlockCosts


class ChoiceLogits(nn.Module):
    """eta of every block and choice: (candidates,) each, zero at the start."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.candidates = space.candidates
        self.eta = nn.ParameterList(
            nn.Parameter(torch.zeros(len(options))) for choices in space.candidates for options in choices.values()
        )

    def _by_block(self, values: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        remaining = iter(values)
        return [{name: next(remaining) for name in choices} for choices in self.candidates]

    def sample(self, tau: float, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """One draw of g per block and choice, equation (3.6)."""
        return self._by_block([gumbel_softmax(eta, tau, generator) for eta in self.eta])

    def probabilities(self) -> list[dict[str, Tensor]]:
        """softmax(eta): how often a hard draw takes each candidate."""
        return self._by_block([torch.softmax(eta, dim=-1) for eta in self.eta])

    def argmax(self) -> list[Picks]:
        """The likeliest candidate of every choice; the first of equals."""
        return [
            {name: self.candidates[i][name][int(p.argmax())] for name, p in block.items()}
            for i, block in enumerate(self.probabilities())
        ]


def gated_pass_allowed(slices: Sequence[BlockSlice], costs: BlockCosts) -> bool:
    """Whether nested candidates can run as one gated pass: same stream, and no norm between gate and projection."""
    same_stream = len({s.stream for s in slices}) == 1
    prefixes = all(isinstance(s.heads, int) and isinstance(s.hidden, int) for s in slices)
    return same_stream and prefixes and not costs.norm_after_gate


def gates(weights: Tensor, counts: Sequence[int]) -> Tensor:
    """gate_j = sum of g_i over the candidates that keep unit j: (max(counts),)."""
    units = torch.arange(max(counts), device=weights.device)
    keeps = units[None, :] < torch.tensor(counts, device=weights.device)[:, None]  # (candidates, units)
    return weights @ keeps.to(weights.dtype)


def mixture_of(slices: Sequence[BlockSlice], weights: Tensor, costs: BlockCosts) -> BlockMixture:
    """What one block computes at a draw, equation (3.5). weights g: (candidates,).

    Stream width: one term per candidate, on slices. Inner width: one gated pass over the widest.
    """
    if not gated_pass_allowed(slices, costs):
        return BlockMixture(tuple(Term(s, weight=g) for s, g in zip(slices, weights, strict=True)))
    widest = max(slices, key=lambda s: count(s.heads))
    term = Term(
        widest,
        head_gate=gates(weights, [count(s.heads) for s in slices]),
        hidden_gate=gates(weights, [count(s.hidden) for s in slices]),
    )
    return BlockMixture((term,))
