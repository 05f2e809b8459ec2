"""The backbone families: the timm models and the defaults of each. Their code is supernets/'s, one adapter each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search_spaces.defaults import Defaults


@dataclass(frozen=True)
class Family:
    """model: its default, by timm's name. nano, nano_kwargs: the 32-px network of its -nano spaces.

    alphas: candidate factors, None for all divisors of the heads up to 8. defaults: of its full-size spaces.
    """

    name: str
    model: str
    nano: str
    nano_kwargs: Mapping[str, Any]
    alphas: tuple[int, ...] | None = None
    defaults: Defaults = field(default_factory=Defaults)


SMALL_RATE = Defaults(training=dict(lr=1e-5, batch_size=64))
NANO_VIT = dict(img_size=32, patch_size=4, embed_dim=72, depth=6, num_heads=6)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "swin",
            "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
            "swin_tiny_patch4_window7_224",
            dict(img_size=32, patch_size=4, window_size=4, embed_dim=48, depths=(2, 4), num_heads=(4, 8)),
            (1, 2, 4, 8),
            SMALL_RATE,
        ),
        Family(
            "swinv2",
            "swinv2_base_window8_256.ms_in1k",
            "swinv2_tiny_window8_256",
            dict(img_size=32, patch_size=4, window_size=4, embed_dim=48, depths=(2, 4), num_heads=(4, 8)),
            (1, 2, 4, 8),
            SMALL_RATE,
        ),
        Family(
            "vit",
            "vit_base_patch16_224",
            "vit_tiny_patch16_224",
            dict(NANO_VIT, class_token=False, global_pool="avg"),
            defaults=SMALL_RATE,
        ),
        Family("deit", "deit_small_patch16_224", "deit_tiny_patch16_224", NANO_VIT, defaults=SMALL_RATE),
        Family(
            "t2t",
            "t2t_vit_14",
            "t2t_vit_7",
            dict(img_size=32, embed_dim=72, depth=6, num_heads=6, mlp_ratio=3.0, token_dim=16, token_drop_rate=0.0),
            (1, 2, 3),
            Defaults(training=dict(lr=1e-3, batch_size=128)),
        ),
        Family(
            "eva",
            "eva02_small_patch14_336.mim_in22k_ft_in1k",
            "eva02_tiny_patch14_224",
            NANO_VIT,
            defaults=SMALL_RATE,
        ),
        Family(
            "cait",
            "cait_s24_224.fb_dist_in1k",
            "cait_xxs24_224",
            dict(NANO_VIT, init_values=0.1),  # of its depth, from scratch
            defaults=SMALL_RATE,
        ),
        Family(
            "beit",
            "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
            "beitv2_base_patch16_224",
            NANO_VIT,
            defaults=SMALL_RATE,
        ),
        Family(
            "relpos",
            "vit_relpos_base_patch16_224.sw_in1k",
            "vit_relpos_small_patch16_224",
            dict(NANO_VIT, init_values=0.1),
            defaults=SMALL_RATE,
        ),
    )
}
