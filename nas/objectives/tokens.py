"""Tokens of the original network in the channels that a small one keeps of its stream (section 2.14)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.objectives.teacher import Teacher
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice
from supernets.streams import first_read
from supernets.supernet import Supernet

LEAST = 1e-6  # of a mean square that an error is divided by


@dataclass(frozen=True)
class Kept:
    """The channels of a stage that a subnet keeps, of those of the network as timm has it.

    rows (n, E): of a rotated stream, without its mean, which nothing reads; else order (n,): the channels' places.
    """

    rows: Tensor | None
    order: Tensor | None
    first: int
    width: int

    def of_large(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., n)."""
        if self.rows is not None:
            return x @ self.rows.to(x.dtype).T
        return x[..., : self.width] if self.order is None else x.index_select(-1, self.order)

    def of_small(self, x: Tensor) -> Tensor:
        """(..., w) -> (..., n)."""
        return x[..., self.first : self.width]


def kept_channels(supernet: Supernet, stage: int, width: int) -> Kept:
    """Of the first `width` channels of a stage."""
    rotation = supernet.adapter.streams.get(stage)
    if rotation is not None:
        first = first_read(supernet.adapter, stage, width)
        return Kept(rotation[first:width].detach(), None, first, width)
    order = supernet.stream_order(stage)
    device = next(supernet.parameters()).device
    return Kept(None, None if order is None else torch.tensor(order[:width], device=device), 0, width)


class Tokens:
    """The streams of a teacher after some of its blocks, and what a subnet's lack of them.

    No module: the teacher's weights are in no checkpoint. after: indices of blocks, the last among them.
    """

    def __init__(self, supernet: Supernet, subnet: NetworkSlice, teacher: Teacher, blocks: Sequence[int] = ()) -> None:
        """blocks: besides the last one. UserError where the network has no such block, or drops tokens in training."""
        adapter, last = supernet.adapter, len(supernet.shapes) - 1
        if wrong := [block for block in blocks if block > last]:
            raise UserError(f"--distill-blocks {wrong[0]}: the network has blocks 0 to {last}")
        drop: Any = getattr(supernet.backbone, "patch_drop", None)
        if drop is not None and not isinstance(drop, nn.Identity):
            raise UserError("tokens are matched one by one, and patch_drop_rate leaves some of them out; leave it out")
        self.teacher, self.after = teacher, tuple(sorted({*blocks, last}))
        self.stages = {block: supernet.shapes[block].stage for block in self.after}
        self.widths = subnet.stage_widths
        self.kept: dict[int, Kept] = {}
        self.seen: dict[int, Tensor] = {}
        for block in self.after:
            teacher.network.get_submodule(adapter.block_names[block]).register_forward_hook(self._watch(block))

    def _watch(self, block: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, tokens: Tensor) -> None:
            self.seen[block] = tokens

        return hook

    def expected(self, images: Tensor) -> Tensor:
        """The teacher's output; what it has after its blocks is kept for `error`."""
        self.seen.clear()
        return self.teacher.output(images)

    def error(self, supernet: Supernet, streams: Mapping[int, Tensor]) -> Tensor:
        """Squared error by what is expected, token by token: its mean over images, tokens and blocks; float32.

        Of every token by itself, lest few large ones be all that counts.
        """
        terms = []
        for block in self.after:
            stage = self.stages[block]
            if stage not in self.kept:  # the basis is there by now
                self.kept[stage] = kept_channels(supernet, stage, self.widths[stage])
            target = self.kept[stage].of_large(self.seen[block]).float()
            lacking = self.kept[stage].of_small(streams[block]).float() - target
            terms.append((lacking.square().sum(-1) / target.square().sum(-1).clamp_min(LEAST)).mean())
        return torch.stack(terms).mean()
