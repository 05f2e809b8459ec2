"""Small random supernets of every family, in float64 and eval mode, and DAN's spaces over them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor

from nas.prices.costs import PricedSpace, priced
from nas.prices.flops import FLOPS
from nas.prices.price import Price
from search_spaces.dan import DAN
from search_spaces.method import Picks, Settings
from search_spaces.slices import NetworkSlice
from search_spaces.space import SearchSpace, make_space
from search_spaces.uvc import UVC
from supernets.basis import rewrite
from supernets.supernet import Supernet
from supernets.t2t_vit import T2TViT
from tests.oracle import randomise
from tests.strategies import expected_logits, random_basis

VIT = dict(img_size=32, patch_size=16, num_classes=5, embed_dim=24, depth=3, num_heads=6, mlp_ratio=2)
EVA = dict(use_rot_pos_emb=True, swiglu_mlp=True, swiglu_align_to=4, qkv_fused=False, init_values=1.0, num_reg_tokens=1)
REL_POS = dict(rel_pos_dim=16, init_values=1.0, class_token=True)  # without which a constant bias does nothing
MIXED = dict(rope_type="mixed", qkv_fused=True, attn_type="rope")  # an Eva's frequencies by block and head
FAMILIES: dict[str, Any] = {
    "vit": lambda **kwargs: VisionTransformer(**VIT | dict(init_values=1.0) | kwargs),
    "swin": lambda **kwargs: SwinTransformer(
        **dict(img_size=36, embed_dim=16, depths=(2, 1), num_heads=(4, 8), window_size=4, mlp_ratio=2, num_classes=5)
        | kwargs
    ),
    "swinv2": lambda **kwargs: SwinTransformerV2(
        **dict(img_size=36, embed_dim=16, depths=(2, 1), num_heads=(4, 8), window_size=4, mlp_ratio=2, num_classes=5)
        | kwargs
    ),
    "t2t": lambda **kwargs: T2TViT(
        **dict(img_size=32, num_classes=5, embed_dim=24, depth=3, num_heads=6, mlp_ratio=2, token_dim=8) | kwargs
    ),
    "eva": lambda **kwargs: Eva(**VIT | EVA | kwargs),
    "cait": lambda **kwargs: Cait(**VIT | dict(depth_token_only=1) | kwargs),
    "beit": lambda **kwargs: Beit(**VIT | dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=1.0) | kwargs),
    "relpos": lambda **kwargs: VisionTransformerRelPos(**VIT | REL_POS | kwargs),
}
UVC_FAMILIES = [family for family in FAMILIES if family not in UVC.without]


def small_supernet(family: str, seed: int = 0, basis: str = "own", **kwargs: Any) -> Supernet:
    """A randomised backbone of the family, float64, eval mode, in its own basis or a rotated one."""
    supernet = Supernet(randomise(FAMILIES[family](**kwargs), seed)).double().eval()
    if basis == "rotated":
        rewrite(supernet, random_basis(supernet, seed))
    return supernet


def oracle_of(family: str, supernet: Supernet, subnet: NetworkSlice, x: Tensor) -> Tensor:
    """The oracle's logits of a small_supernet of the family, in its basis."""
    return expected_logits(FAMILIES[family]().double(), supernet, subnet, x)


def small_costs(
    supernet: Supernet,
    width: str,
    alphas: tuple[int, ...] | None = None,
    full_stage_width: bool = False,
    price: Price = FLOPS,
) -> PricedSpace:
    """DAN's space over a supernet, priced."""
    space = make_space("small-dan", DAN(), Settings(width=width, alphas=alphas), supernet.shapes)
    return priced(space, supernet.adapter.costs, price, full_stage_width)


def soft_etas(costs: PricedSpace, seed: int) -> list[Tensor]:
    """Random logits of every block's alpha, float64, that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(len(block["alpha"]), generator=generator, dtype=torch.float64).requires_grad_()
        for block in costs.space.candidates
    ]


def soft_draw(etas: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Weights g of every choice: positive, summing to one."""
    return [{"alpha": eta.softmax(0)} for eta in etas]


def one_hot(space: SearchSpace, picks: Sequence[Picks]) -> list[Mapping[str, Tensor]]:
    """The draw that takes exactly the given candidates."""
    return [
        {name: torch.tensor([float(option == pick[name]) for option in options]) for name, options in choices.items()}
        for choices, pick in zip(space.candidates, picks, strict=True)
    ]


def hard_draw(costs: PricedSpace, picks: Sequence[Picks]) -> list[Mapping[str, Tensor]]:
    """one_hot in float64, with gradients."""
    return [{n: g.double().requires_grad_() for n, g in block.items()} for block in one_hot(costs.space, picks)]
