"""ViTs whose scores get a bias by relative positions: what Beit and VisionTransformerRelPos have in common.

Shape letters as in layers.py.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from supernets.axes import HeadWidths, Params
from supernets.layers import attention, norm
from supernets.relative import CachedBias
from supernets.timm_block import NarrowAttention
from supernets.vit import VitAdapter


class CompactBiasedAttention(CachedBias, NarrowAttention):
    """Attention of a compact network of these. Children and parameters keep timm's names."""

    def __init__(self, attn: Any, heads: HeadWidths) -> None:
        """attn: already cut, timm's or one of these, whose parameters and scale are taken over."""
        super().__init__(attn, heads)
        for name, p in attn.named_parameters(recurse=False):
            self.register_parameter(name, p)

    def position_bias(self) -> Tensor:
        """(1, h, N, N)."""
        raise NotImplementedError

    def bias(self, dtype: torch.dtype) -> Tensor:
        return self.position_bias().to(dtype)


class BiasedVitAdapter(VitAdapter):
    """As blocks, stem and classifier. Their average is over the patches, without the class token."""

    @abstractmethod
    def bias(self, block: Any, params: Params) -> Tensor | None:
        """What a block adds to the scores of its kept heads, (H, N, N)."""

    @abstractmethod
    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module: ...

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        return attention(block.attn, params, heads, x, bias_HNN=self.bias(block, params))

    def pool(self, params: Params, x: Tensor) -> Tensor:
        vit = self.backbone
        x = norm(vit.norm, params, "norm", x)
        x = x[:, vit.num_prefix_tokens :].mean(dim=1) if vit.global_pool == "avg" else x[:, 0]
        return norm(vit.fc_norm, params, "fc_norm", x)
