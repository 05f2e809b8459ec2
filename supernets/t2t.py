"""T2T-ViT as a backbone: the token module is shared whole, its projection is cut to the stream. One stage."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernets.adapter import refuse
from supernets.axes import HeadWidths, Params
from supernets.flops import NetworkCosts, PerWidth
from supernets.layers import attention, norm
from supernets.t2t_tokens import TokenPerformer, token_macs
from supernets.timm_block import TimmBlockAdapter, check_compact, num_params, shape_of

PROJECT = "tokens_to_token.project"


class T2TAdapter(TimmBlockAdapter):
    """T2TViT as blocks, stem and classifier."""

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        if not isinstance(backbone.head, nn.Linear):
            raise refuse(backbone, "a network without classifier", "use num_classes > 0")
        if not len(backbone.blocks):
            raise refuse(backbone, "a network without blocks", "use a depth of 1 or more")
        tokens = backbone.tokens_to_token
        E, classes = backbone.embed_dim, backbone.head.out_features
        num_tokens = tokens.num_patches + backbone.num_prefix_tokens
        self.input_size = (backbone.in_chans, *tokens.img_size)
        self.block_names = tuple(f"blocks.{i}" for i in range(len(backbone.blocks)))
        for name, block in zip(self.block_names, backbone.blocks, strict=True):
            check_compact(backbone, block, name, E)
        self.shapes = tuple(shape_of(0, E, block) for block in backbone.blocks)
        self.outer_axes = {
            "cls_token": (None, None, ("S", 0)),  # (1, 1, E), as pos_embed (1, 1 + N, E)
            "pos_embed": (None, None, ("S", 0)),
            f"{PROJECT}.weight": (("S", 0), None),  # (E, 9 D)
            f"{PROJECT}.bias": (("S", 0),),
            "norm.weight": (("S", 0),),
            "norm.bias": (("S", 0),),
            "head.weight": (None, ("S", 0)),  # (classes, E)
            "head.bias": (None,),
        }
        self.outer_norms = {"norm": ("S", 0)}
        self.classifiers = ("head",)
        self.outer_readers = {"norm": self.classifiers}
        token_params = sum(p.numel() for name, p in tokens.named_parameters() if not name.startswith("project"))
        costs = NetworkCosts(
            blocks=tuple(
                self.block_costs(block, shape, num_tokens, num_tokens, num_tokens)
                for block, shape in zip(backbone.blocks, self.shapes, strict=True)
            ),
            flops=PerWidth(
                constant=token_macs(
                    tokens.img_size,
                    backbone.in_chans,
                    tokens.project.in_features // 9,
                    "performer" if isinstance(tokens.attention1, TokenPerformer) else "transformer",
                ),
                first=tokens.num_patches * tokens.project.in_features,
                last=classes,
            ),
            params=PerWidth(
                constant=token_params + classes,
                first=num_params(tokens.project, E) + num_params(backbone.norm, E) + 1 + num_tokens,
                last=classes,
            ),
        )
        self.costs = self.stream_costs(costs)

    def stem(self, params: Params, images: Tensor) -> Tensor:
        x = self.backbone.tokens_to_token.forward_tokens(images)  # (B, N, 9 D)
        x = F.linear(x, params[f"{PROJECT}.weight"], params[f"{PROJECT}.bias"])
        x = torch.cat([params["cls_token"].expand(x.shape[0], -1, -1), x], dim=1)
        return self.backbone.pos_drop(x + params["pos_embed"])  # type: ignore[no-any-return]

    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        raise AssertionError("a T2T-ViT has one stage")

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        # published checkpoints scale by the width of the whole stream, whatever the slice
        return attention(block.attn, params, heads, x, scale=block.attn.scale)

    def pool(self, params: Params, x: Tensor) -> Tensor:
        return norm(self.backbone.norm, params, "norm", x)[:, 0]

    def classify(self, params: Params, features: Tensor) -> Tensor:
        return F.linear(self.backbone.head_drop(features), params["head.weight"], params["head.bias"])

    def resize(self, stage_widths: tuple[int, ...]) -> None:
        (w,) = stage_widths
        self.backbone.embed_dim = self.backbone.num_features = self.backbone.head_hidden_size = w
        for info in self.backbone.feature_info:
            info["num_chs"] = w
