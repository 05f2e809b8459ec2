"""Every search space by name: <backbone>-<method>, and its -nano variant."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search_spaces.an import AN
from search_spaces.dan import DAN
from search_spaces.errors import UserError
from search_spaces.joint import Joint
from search_spaces.kcr import KCR
from search_spaces.method import Method
from search_spaces.uvc import UVC

METHODS: dict[str, Method] = {method.name: method for method in (AN(), DAN(), KCR(), Joint(), UVC())}


@dataclass(frozen=True)
class Space:
    """A backbone family and a method, with the defaults that were published or measured for the pair.

    model, model_kwargs: arguments of timm.create_model. alphas: candidate factors, None for all divisors of the
    heads up to 8. training: defaults of both stages' options; search and retrain: of one stage's.
    """

    name: str
    family: str
    method: Method
    model: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    alphas: tuple[int, ...] | None = None
    nano: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "swin": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "vit": "vit_base_patch16_224",
    "deit": "deit_small_patch16_224",
    "t2t": "t2t_vit_14",
}
ALPHAS: dict[str, tuple[int, ...] | None] = {"swin": (1, 2, 4, 8), "t2t": (1, 2, 3)}

NANO_VIT = dict(img_size=32, patch_size=4, embed_dim=72, depth=6, num_heads=6)
NANO: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, patch_size=4, window_size=4, embed_dim=48, depths=(2, 4), num_heads=(4, 8)),
    ),
    "vit": ("vit_tiny_patch16_224", dict(NANO_VIT, class_token=False, global_pool="avg")),
    "deit": ("deit_tiny_patch16_224", NANO_VIT),
    "t2t": (
        "t2t_vit_7",
        dict(img_size=32, embed_dim=72, depth=6, num_heads=6, mlp_ratio=3.0, token_dim=16, token_drop_rate=0.0),
    ),
}

# The backbone authors' augmentation (Swin and DeiT share it), used by both stages of the full-size spaces.
AUTHORS = dict(
    aa="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, remode="pixel", opt="adamw"
)
FULL = dict(AUTHORS, pretrained=True, sched="none", warmup_epochs=0, weight_decay=0.05, drop_path=0.1)
# KCR's published recipe (section 2.3), whose batch of 4 x 64 is 64 on each of four devices; five epochs of warm-up
# are timm's own. Everything that it does not name is as in FULL.
KCR_FULL = dict(
    FULL,
    lr=1e-4, min_lr=1e-5, warmup_lr=1e-4, warmup_epochs=5, sched="cosine", weight_decay=0.01, batch_size=64,
    aa="rand-m9-mstd0.5", reprob=0.2, mixup=0.0, cutmix=0.0, amp=True,
)  # fmt: skip
KCR_RETRAIN = dict(epochs=300, model_ema=True, model_ema_decay=0.9995)
GATES_LR = 0.01  # a tenth of the published rate, at which gates do nearly all of the work (docs/uvc.md)
# UVC's published recipe (section 2.5); warm-up, search and retrain in epochs.
UVC_FULL = dict(
    FULL,
    lr=1e-4, weight_decay=0.05, sched="cosine", warmup_epochs=5, batch_size=256, importance="none", distill_weight=0.1,
)  # fmt: skip
UVC_SEARCH = dict(epochs=30, arch_lr=GATES_LR, budget=0.5)
KERNEL = dict(eta_kc=5e-4, rho=0.3)  # docs/kcr.md says why
RATES = {"swin": dict(lr=1e-5, batch_size=64), "t2t": dict(lr=1e-3, batch_size=128)}
# From scratch on a few thousand small images, in minutes on two cores.
NANO_TRAINING = dict(
    pretrained=False,
    dataset="digits",
    opt="adamw",
    lr=2e-3,
    weight_decay=0.05,
    batch_size=64,
    sched="cosine",
    warmup_epochs=2,
    aa=None,
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.1,
    reprob=0.0,
    hflip=0.0,
    color_jitter=0.0,
    scale=(0.8, 1.0),
    drop_path=0.0,
)
NANO_KERNEL = dict(eta_kc=5e-3, rho=0.15)
NANO_OWN: dict[str, dict[str, Any]] = {
    "kcr": NANO_KERNEL,
    "joint": NANO_KERNEL,
    "uvc": dict(importance="none", distill_weight=0.1),
}


def _full_training(family: str, method: str) -> dict[str, Any]:
    if method == "uvc":
        return UVC_FULL
    if method == "kcr":
        return KCR_FULL | KERNEL
    return FULL | RATES.get(family, RATES["swin"]) | (KERNEL if method == "joint" else {})


def _full(family: str, method: Method) -> Space:
    uvc = method.name == "uvc"
    return Space(
        name=f"{family}-{method.name}",
        family=family,
        method=method,
        model="deit_tiny_patch16_224" if uvc and family == "deit" else MODELS[family],
        alphas=ALPHAS.get(family),
        training=_full_training(family, method.name),
        search=UVC_SEARCH if uvc else dict(epochs=100, arch_lr=1e-3),
        retrain=KCR_RETRAIN if method.name == "kcr" else dict(epochs=120 if uvc else 50),
    )


def _nano(family: str, method: Method) -> Space:
    model, model_kwargs = NANO[family]
    return Space(
        name=f"{family}-{method.name}-nano",
        family=family,
        method=method,
        model=model,
        model_kwargs=model_kwargs,
        nano=True,
        training=NANO_TRAINING | NANO_OWN.get(method.name, {}),
        # KCR's quarter of the channels leaves attention whole: 0.55 to 0.68 of the FLOPs is the least it reaches
        # The rate stays up during the search: nothing has to settle before the retrain, which starts from there.
        search=dict(epochs=15, sched="none", lr=1e-3, arch_lr=2e-2, budget=0.75 if method.name == "kcr" else 0.5)
        | (dict(arch_lr=GATES_LR) if method.name == "uvc" else {}),
        retrain=dict(epochs=30, warmup_epochs=1),
    )


SPACES: dict[str, Space] = {
    space.name: space
    for method in METHODS.values()
    for family in MODELS
    for space in (_full(family, method), _nano(family, method))
}


def get_space(name: str) -> Space:
    """The space of that name; UserError names near matches."""
    if name in SPACES:
        return SPACES[name]
    near = difflib.get_close_matches(name, SPACES, n=3) or sorted(SPACES)
    raise UserError(f"unknown space {name!r}; did you mean {', '.join(near)}? (search.py --list-spaces shows all)")
