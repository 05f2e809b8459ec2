"""timm's rotary embeddings where blocks keep other heads and pairs each, and where two networks see one draw.

Shape letters: H heads, P pairs of channels that turn together, D = 2 P, N positions, K pairs of all heads and blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    _apply_coord_augs,
    get_mixed_freqs,
    get_mixed_grid,
)
from torch import Tensor, nn

FREQS = "rope.freqs"  # of RotaryEmbeddingMixed: timm's name in the network, and ours among a block's parameters


class OneDraw(nn.Module):
    """Of a rotary embedding whose coordinates are augmented in training: a draw can be held, for several passes.

    Without one it is timm's own, which draws anew in every pass.
    """

    held: Tensor | None = None

    def drawn(self, shape: Sequence[int]) -> Tensor:
        """A new draw over a grid: sines and cosines (N, 2 D)."""
        return super().get_embed(shape)  # type: ignore[no-any-return, misc]

    def get_embed(self, shape: Any = None, dtype: torch.dtype | None = None) -> Any:
        """timm's, or of what is held."""
        return super().get_embed(shape, dtype) if self.held is None else self.of_draw(self.held)  # type: ignore[misc]

    def of_draw(self, draw: Tensor) -> Tensor:
        """Sines and cosines of a draw."""
        return draw

    @contextmanager
    def holding(self, draw: Tensor) -> Iterator[None]:
        """Every pass inside sees that draw."""
        self.held = draw
        try:
            yield
        finally:
            self.held = None


class OneDrawCat(OneDraw, RotaryEmbeddingCat):  # type: ignore[misc]
    """rope_type="cat"."""


class OneDrawDinoV3(OneDraw, RotaryEmbeddingDinoV3):  # type: ignore[misc]
    """rope_type="dinov3"."""


class OneDrawMRope(OneDraw, RotaryEmbeddingMRope):  # type: ignore[misc]
    """rope_type="mrope"."""


class MixedTurns(OneDraw, RotaryEmbeddingMixed):  # type: ignore[misc]
    """timm's RotaryEmbeddingMixed, of which every block may have other heads and pairs.

    freqs: timm's (2, blocks, H, P), or (2, K, 1) where blocks differ; `sizes` then says H and P of each.
    """

    freqs: nn.Parameter
    sizes: tuple[tuple[int, int], ...] = ()

    def of_block(self, t: Tensor, index: int) -> Tensor:
        """A block's part (2, H, P) of a tensor of freqs' shape, a view."""
        if t.dim() == 4:
            return t[:, index]
        first = sum(h * p for h, p in self.sizes[:index])
        h, p = self.sizes[index]
        part: Tensor = t[:, first : first + h * p, 0].unflatten(1, (h, p))
        return part

    def parameter_of(self, index: int) -> nn.Parameter:
        """A block's part as a parameter, which shares its memory and that of its gradient with freqs."""
        part = nn.Parameter(self.of_block(self.freqs.detach(), index), requires_grad=self.freqs.requires_grad)
        if self.freqs.grad is not None:
            part.grad = self.of_block(self.freqs.grad, index)
        return part

    def joined(self, parts: Sequence[Tensor], blocks: int) -> Tensor:
        """freqs of so many blocks from the parts (2, H, P) of those that have attention, in their order."""
        if len(parts) == blocks and len({part.shape for part in parts}) == 1:
            return torch.stack(tuple(parts), dim=1)
        return torch.cat([self.freqs.new_zeros(2, 0), *(part.flatten(1) for part in parts)], dim=1)[..., None]

    def turns(self, freqs_2HP: Tensor, shape: Sequence[int]) -> Tensor:
        """Sines and cosines (H, N, 2 D), side by side, of one block's frequencies over a grid."""
        if self.held is not None:
            return _augmented(freqs_2HP, self.held)
        grid = (self.t_x, self.t_y) if self.t_x is not None else self._grid(shape)
        return get_mixed_freqs(freqs_2HP, *grid)  # type: ignore[no-any-return]

    def _grid(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return get_mixed_grid(shape, self.grid_indexing, self.freqs.device)  # type: ignore[no-any-return]

    def drawn(self, shape: Sequence[int]) -> Tensor:
        """A new draw over a grid: coordinates (N, 2), as the frequencies are learned."""
        grid = torch.stack(self._grid(shape), dim=-1)
        return _apply_coord_augs(grid, self.shift_coords, self.jitter_coords, self.rescale_coords)  # type: ignore[no-any-return]

    def of_draw(self, draw: Tensor) -> Tensor:
        return _augmented(self.freqs, draw)

    def get_embed(self, shape: Any = None, dtype: torch.dtype | None = None) -> Any:
        """timm's, of every block: (blocks, H, N, 2 D), or one by one."""
        turns_KN4: Tensor = super().get_embed(shape, dtype)
        if self.freqs.dim() == 4:
            return turns_KN4
        each = zip(turns_KN4.split([h * p for h, p in self.sizes]), self.sizes, strict=True)
        return [t.view(h, p, t.shape[1], 2, 2).permute(0, 2, 3, 1, 4).flatten(2) for t, (h, p) in each]


def _augmented(freqs: Tensor, grid_N2: Tensor) -> Tensor:
    """Sines and cosines of frequencies at coordinates, in timm's precision of augmented training."""
    dtype = torch.promote_types(freqs.dtype, torch.float32)
    return get_mixed_freqs(freqs, *grid_N2.unbind(-1), dtype=dtype)  # type: ignore[no-any-return]


OWN = {
    RotaryEmbeddingCat: OneDrawCat,
    RotaryEmbeddingDinoV3: OneDrawDinoV3,
    RotaryEmbeddingMRope: OneDrawMRope,
    RotaryEmbeddingMixed: MixedTurns,
}


def adopt(rope: Any) -> Any:
    """A network's rotary embedding as one of these, in place, where it needs it."""
    if type(rope) is RotaryEmbeddingMixed or getattr(rope, "aug_active", False):
        rope.__class__ = OWN.get(type(rope), type(rope))
    return rope
