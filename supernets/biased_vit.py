"""ViTs whose scores get a bias by relative positions: what Beit and VisionTransformerRelPos have in common.

Every block may have one of its own, whose heads go with the block's, and the network one that all blocks read: a block
takes its kept heads of that, which stays whole. Shape letters as in layers.py.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from search_spaces.slices import Kept
from supernets.axes import HeadWidths, Params, take
from supernets.flops import PerWidth
from supernets.layers import attention, norm
from supernets.relative import CachedBias
from supernets.timm_block import NarrowAttention
from supernets.vit import VitAdapter


def columns(attn: Any, heads: HeadWidths) -> Kept:
    """Which heads of the network's bias the kept ones of a block are. attn: timm's, or a compact network's."""
    own = getattr(attn, "columns", None)
    if own is None or (isinstance(own, int) and heads.kept is None):
        return heads.number if heads.kept is None else heads.kept
    own = range(own) if isinstance(own, int) else own
    return tuple(own[head] for head in (range(heads.number) if heads.kept is None else heads.kept))


class CompactBiasedAttention(CachedBias, NarrowAttention):
    """Attention of a compact network of these. Children and parameters keep timm's names.

    columns: its heads in the bias that all blocks read. has_own: whether it has one of its own.
    """

    has_own: bool
    index: Tensor | None

    def __init__(self, attn: Any, heads: HeadWidths) -> None:
        """attn: already cut, timm's or one of these, whose parameters and scale are taken over."""
        super().__init__(attn, heads)
        for name, p in attn.named_parameters(recurse=False):
            self.register_parameter(name, p)
        self.columns = columns(attn, heads)
        prefix = isinstance(self.columns, int)
        index = None if prefix else torch.tensor(self.columns, device=self.proj.weight.device)
        self.register_buffer("index", index, persistent=False)

    def position_bias(self) -> Tensor:
        """Its own, (1, h, N, N)."""
        raise NotImplementedError

    def bias(self, dtype: torch.dtype) -> Tensor:
        return self.position_bias().to(dtype)

    def attend(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """(B, N, S) -> (B, N, S). shared: the network's bias (..., H, N, N), of as many heads as the backbone's."""
        bias = self._cached_bias(x.dtype) if self.has_own else None
        if shared is not None:
            index, shared = self.index, shared.to(x.dtype)
            shared = shared[..., : self.num_heads, :, :] if index is None else shared.index_select(-3, index)
            bias = shared if bias is None else bias + shared
        return NarrowAttention.forward(self, x, bias)


class BiasedVitAdapter(VitAdapter):
    """As blocks, stem and classifier. Their average is over the patches, without the class token.

    shared: the module of the bias that all blocks read, where there is one; their heads stay in its order then.
    """

    shared: str

    def __init__(self, backbone: Any) -> None:
        self.heads_stay = getattr(backbone, self.shared) is not None
        super().__init__(backbone)

    @abstractmethod
    def own_bias(self, block: Any, params: Params) -> Tensor | None:
        """What a block itself adds to the scores of its kept heads, (H, N, N)."""

    @abstractmethod
    def shared_bias(self) -> Tensor:
        """What the network adds to those of all heads, (H, N, N)."""

    def shared_flops(self) -> int:
        """MACs of `shared_bias`, which is made once a batch and counted with every image."""
        return 0

    def _last_costs(self, num_tokens: int) -> tuple[PerWidth, PerWidth]:
        flops, params = super()._last_costs(num_tokens)
        if not self.heads_stay:
            return flops, params
        entries = sum(p.numel() for p in self.backbone.get_submodule(self.shared).parameters())
        more = flops.constant + self.shared_flops(), params.constant + entries
        return replace(flops, constant=more[0]), replace(params, constant=more[1])

    def _is_whole(self, name: str) -> bool:
        return super()._is_whole(name) or name.startswith(f"{self.shared}.")

    def join(self, prefix: list[Tensor], x: Tensor) -> Tensor:
        return torch.cat([*prefix, x], dim=1) if prefix else x  # a copy has other strides

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        bias = self.own_bias(block, params)
        if self.heads_stay:
            shared = take(self.shared_bias(), 0, columns(block.attn, heads))
            bias = shared if bias is None else bias + shared
        return attention(block.attn, params, heads, x, bias_HNN=bias)

    def pool(self, params: Params, x: Tensor) -> Tensor:
        vit = self.backbone
        x = norm(vit.norm, params, "norm", x)
        x = x[:, vit.num_prefix_tokens :].mean(dim=1) if vit.global_pool == "avg" else x[:, 0]
        return norm(vit.fc_norm, params, "fc_norm", x)
