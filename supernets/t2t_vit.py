"""T2T-ViT (Yuan et al., Tokens-to-Token ViT, ICCV 2021), registered with timm under the original's names.

Three soft splits (overlapping unfolds), a thin attention layer after the first and the second, turn an image
into tokens; a deep, narrow ViT follows. Parameter names and outputs are those of the authors' implementation,
so published checkpoints load unchanged. Importing this module makes `timm.create_model("t2t_vit_14")` work.

Shape letters: B images, H and W of an image or grid, N tokens, C channels of an unfolded token,
D token width, M random features, E embedding width.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    clean_state_dict,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from search_spaces.errors import UserError
from supernets.t2t_tokens import REDUCTION, SOFT_SPLITS, ScaledAttention, T2TModule


def sinusoid_table(num_positions: int, dim: int) -> Tensor:
    """The fixed position embedding (1, num_positions, dim) of Vaswani et al., section 3.5, in float32.

    Channels 2i and 2i + 1 hold sin and cos of position / 10000^(2i / dim).
    """
    position = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None]
    channel = torch.arange(dim, device="cpu")
    angle = position / 10000.0 ** (2 * (channel // 2).double() / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class T2TViT(nn.Module):
    """T2T-ViT with the constructor, attributes and methods of timm's VisionTransformer.

    img_size: pixels, int or (H, W), at least 3 a side. qk_scale: factor on q k^T; None is embed_dim ** -0.5,
    that of the published checkpoints (other ViTs: head_dim ** -0.5). drop_rate: before the classifier.
    token_drop_rate: inside the Token Performer, 0.1 in the original. The position embedding and the
    Performer's W are parameters without gradient. Raises UserError for a pooling other than the class token,
    an unknown tokens_type, or heads that do not divide embed_dim.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        tokens_type: str = "performer",
        token_dim: int = 64,
        token_drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"T2T-ViT: num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = _class_token(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        self.tokens_to_token = T2TModule(img_size, in_chans, embed_dim, token_dim, tokens_type, token_drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = self._sinusoids()
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path,
                    norm_layer=nn.LayerNorm,
                    attn_layer=ScaledAttention,
                )
                for drop_path in calculate_drop_path_rates(drop_path_rate, depth)
            )
        )
        block: Any
        for block in self.blocks:
            block.attn.scale = embed_dim**-0.5 if qk_scale is None else qk_scale
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": REDUCTION} for i in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def _sinusoids(self) -> nn.Parameter:
        table = sinusoid_table(self.num_prefix_tokens + self.tokens_to_token.num_patches, self.embed_dim)
        return nn.Parameter(table.to(self.cls_token), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        """Parameters that take no weight decay."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of timm's layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|tokens_to_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes leave the pooled features. Raises UserError for another pooling."""
        if global_pool is not None:
            self.global_pool = _class_token(global_pool)
        self.num_classes = num_classes
        if num_classes > 0:
            head = nn.Linear(self.embed_dim, num_classes)
            self.head = head.to(self.cls_token).train(self.training)
        else:
            self.head = nn.Identity()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of another size, in pixels; the sinusoids are recomputed for its number of tokens.

        Trained weights know their own grid. To move them, load their checkpoint into a model made at the new
        size: checkpoint_filter_fn then interpolates the table, as the original does.
        """
        self.tokens_to_token.set_input_size(img_size)
        self.pos_embed = self._sinusoids()
        with contextlib.suppress(ImportError):  # timm versions that track a model's input size
            from timm.models._input import update_model_input_size

            update_model_input_size(self, self.tokens_to_token.img_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Class token first, then the sinusoids: (B, N, E) -> (B, 1 + N, E)."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + self.pos_embed)  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """timm's: the outputs of some blocks, by default beside the final features.

        indices: the last n blocks, or a list of blocks; None is all. norm: apply the final norm to each.
        output_fmt: "NCHW" (B, E, H, W) or "NLC" (B, N, E), without the class token; return_prefix_tokens
        pairs each with its class token (B, 1, E). Returns (features, intermediates), the intermediates alone,
        or a dict of image_features, image_intermediates and image_intermediates_prefix.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f'T2T-ViT: output_fmt "{output_fmt}"; use NCHW or NLC')
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self._pos_embed(self.tokens_to_token(x))
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = self.tokens_to_token.grid_size
            taken = [y.transpose(1, 2).reshape(len(y), -1, *grid) for y in taken]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": taken}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                found["image_features"] = self.norm(x)
            return found
        intermediates = list(zip(taken, prefixes, strict=True)) if return_prefix_tokens else taken
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1 + N, E), class token first, after the final norm."""
        x = self._pos_embed(self.tokens_to_token(x))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, E) -> logits (B, num_classes), or the class token (B, E) that enters the classifier."""
        x = self.head_drop(x[:, 0])
        out: Tensor = x if pre_logits else self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _class_token(global_pool: str) -> str:
    if global_pool != "token":
        raise UserError(f'T2T-ViT: global_pool "{global_pool}"; it classifies from its class token, use token')
    return global_pool


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: T2TViT) -> dict[str, Tensor]:
    """A published or training checkpoint as the model's state dict.

    Takes the averaged weights where there are any, strips DDP's `module.`, and interpolates (bicubic, as the
    original does) a position embedding made for another, square, input size. Raises UserError for weights of
    another network or of another number of input channels, and for positions of another size on no square.
    """
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if state_dict.get(key) is not None:
            state_dict = state_dict[key]
            break
    weights: dict[str, Tensor] = clean_state_dict(dict(state_dict))

    first_norm, pos_embed = weights.get("tokens_to_token.attention1.norm1.weight"), weights.get("pos_embed")
    if first_norm is None or pos_embed is None:
        raise UserError("T2T-ViT: the checkpoint has no tokens_to_token or no pos_embed; use one of a T2T-ViT")
    in_chans = first_norm.numel() // SOFT_SPLITS[0][0] ** 2
    if in_chans != model.in_chans:
        raise UserError(
            f"T2T-ViT: the checkpoint has {in_chans} input channels, the model {model.in_chans}; "
            f"make the model with in_chans={in_chans}"
        )
    if pos_embed.shape[1] != model.pos_embed.shape[1]:
        num_patches = pos_embed.shape[1] - model.num_prefix_tokens
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise UserError(
                f"T2T-ViT: the checkpoint's {num_patches} positions are no square and cannot be resized to "
                f"{model.tokens_to_token.grid_size}; make the model at the checkpoint's img_size"
            )
        weights["pos_embed"] = resample_abs_pos_embed(
            pos_embed, list(model.tokens_to_token.grid_size), [side, side], antialias=False
        )
    return weights


_PERFORMER_LITE = {"embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0}
_WIDTHS: dict[int, dict[str, Any]] = {
    14: {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    19: {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
    24: {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0},
}
# name: (constructor arguments, published file of ImageNet-1k weights, named after its top-1 accuracy)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "t2t_vit_7": ({**_PERFORMER_LITE, "depth": 7}, "71.7_T2T_ViT_7"),
    "t2t_vit_10": ({**_PERFORMER_LITE, "depth": 10}, "75.2_T2T_ViT_10"),
    "t2t_vit_12": ({**_PERFORMER_LITE, "depth": 12}, "76.5_T2T_ViT_12"),
    "t2t_vit_14": (_WIDTHS[14], "81.5_T2T_ViT_14"),
    "t2t_vit_19": (_WIDTHS[19], "81.9_T2T_ViT_19"),
    "t2t_vit_24": (_WIDTHS[24], "82.3_T2T_ViT_24"),
    "t2t_vit_t_14": ({**_WIDTHS[14], "tokens_type": "transformer"}, "81.7_T2T_ViTt_14"),
    "t2t_vit_t_19": ({**_WIDTHS[19], "tokens_type": "transformer"}, "82.4_T2T_ViTt_19"),
    "t2t_vit_t_24": ({**_WIDTHS[24], "tokens_type": "transformer"}, "82.6_T2T_ViTt_24"),
}

default_cfgs = generate_default_cfgs(
    {
        f"{variant}.in1k": {
            "url": f"https://github.com/yitu-opensource/T2T-ViT/releases/download/main/{file}.pth.tar",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "classifier": "head",
            "license": "bsd-3-clause-clear",
            "paper_ids": "arXiv:2101.11986",
            "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
        }
        for variant, (_, file) in VARIANTS.items()
    }
)


def _register(variant: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> T2TViT:
        model: T2TViT = build_model_with_cfg(
            T2TViT,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **{**VARIANTS[variant][0], **kwargs},
        )
        return model

    create.__name__ = variant  # the name under which timm registers it
    globals()[variant] = register_model(create)


for _variant in VARIANTS:
    _register(_variant)
