"""The architecture logits of a search, and the mixture that a draw of them stands for."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nas.searchers.gumbel import gumbel_softmax
from search_spaces.method import Choices, Picks
from search_spaces.slices import BlockSlice, count
from search_spaces.space import SearchSpace
from supernets.elastic import BlockMixture, Term
from supernets.flops import BlockCosts


class ChoiceLogits(nn.Module):
    """eta of every choice: (candidates,) each, zero at the start. What the blocks of a stage choose alike has one.

    labels: of the choices, as in the space's grammar.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.candidates = space.candidates
        sizes: dict[str, int] = {}
        for i, choices in enumerate(space.candidates):
            sizes |= {space.label(i, name): len(options) for name, options in choices.items()}
        self.labels = tuple(sizes)
        places = {label: k for k, label in enumerate(sizes)}
        self._places = [
            {name: places[space.label(i, name)] for name in choices} for i, choices in enumerate(space.candidates)
        ]
        self.eta = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes.values())

    def _by_block(self, values: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [{name: values[k] for name, k in places.items()} for places in self._places]

    @torch.no_grad()
    def begin(self, probabilities: Mapping[str, Sequence[float]]) -> None:
        """Logits of these probabilities, (candidates,) by label, all above 0."""
        for label, eta in zip(self.labels, self.eta, strict=True):
            eta.copy_(torch.tensor(probabilities[label], dtype=torch.float64).log())

    def once(self) -> list[tuple[range, str]]:
        """Every choice by its name, and the blocks that make it alike."""
        blocks: dict[int, list[int]] = {}
        names: dict[int, str] = {}
        for i, places in enumerate(self._places):
            for name, k in places.items():
                blocks.setdefault(k, []).append(i)
                names[k] = name
        return [(range(blocks[k][0], blocks[k][-1] + 1), names[k]) for k in blocks]

    def sample(self, tau: float, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """One draw of g per choice, equation (3.6)."""
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


def nested_mixture(widest: BlockSlice, candidates: Choices, weights: Mapping[str, Tensor]) -> BlockMixture:
    """All candidates of a block that chooses every width by itself, in one gated pass at its widest (section 2.9).

    weights g: (candidates,) of each choice. What is not chosen, having one candidate, has no gate.
    """

    def gate(name: str) -> Tensor | None:
        counts = [int(option) for option in candidates[name]]
        return gates(weights[name], counts) if len(counts) > 1 else None

    heads, hidden = gate("heads"), gate("hidden")
    term = Term(
        widest,
        head_gate=heads,
        hidden_gate=hidden,
        qk_gate=gate("qk"),
        v_gate=gate("v"),
        stream_gate=gate("stream"),
        attn_there=None if heads is None else heads[0],
        mlp_there=None if hidden is None else hidden[0],
    )
    return BlockMixture((term,))
