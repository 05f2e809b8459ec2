"""Weights of a network with other input channels, or with a distillation token more or less."""

from typing import Any

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor

CLASS, DISTILLATION = ("cls_token", "head."), ("dist_token", "head_dist.")  # a token, its classifier


def adapted(state: dict[str, Tensor], backbone: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights as the backbone takes them, and what was made of them, in words."""
    lines = []
    wanted = backbone.state_dict()
    if {"pos_embed", "cls_token"} <= set(state) & set(wanted):
        if DISTILLATION[0] in set(state) - set(wanted):
            state = _without_distillation(state)
            lines.append(f"dist_token: left out from {source}, with its position and its classifier")
        elif DISTILLATION[0] in set(wanted) - set(state):
            state = _with_distillation(state)
            lines.append(
                f"dist_token: not in {source}; begins as the class token, with its position and its classifier"
            )
    stem = f"{getattr(backbone, 'pretrained_cfg', {}).get('first_conv')}.weight"
    if stem in state and stem in wanted and state[stem].dim() == 4:
        found, here = state[stem].shape[1], wanted[stem].shape[1]
        if found != here:
            state = state | {stem: adapt_input_conv(here, state[stem], base_chans=found)}
            lines.append(f"{stem}: {found} input channels in {source}, {here} here; adapted as timm does")
    return state, lines


def _without_distillation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The distillation token stands behind the class token."""
    positions = state["pos_embed"]
    kept = {name: t for name, t in state.items() if not name.startswith(DISTILLATION)}
    return kept | {"pos_embed": torch.cat([positions[:, :1], positions[:, 2:]], dim=1)}


def _with_distillation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    positions = state["pos_embed"]
    token, head = zip(CLASS, DISTILLATION, strict=True)
    added = {head[1] + name.removeprefix(head[0]): t.clone() for name, t in state.items() if name.startswith(head[0])}
    added |= {token[1]: state[token[0]].clone(), "pos_embed": torch.cat([positions[:, :1], positions], dim=1)}
    return state | added
