"""A network without classifier, whose output is its pooled feature: what stands in the classifier's place.

The features of a compact network are fewer, and in a rotated basis other ones. So it ends in a linear layer from the
kept channels to the features of the network that it was cut from: as many, in their order, comparable one by one. In
the supernet that layer is there from the start, and one; so everything that a classifier is to slices, costs, bases and
refits, it is too.
"""

from typing import Any

import torch
from torch import Tensor, nn


class FeatureHead(nn.Linear):
    """(B, w) -> (B, E).

    added: whether the network itself has no such layer, of which nothing is counted then; it has one where it is a
    compact network.
    """

    def __init__(self, width: int, like: Tensor) -> None:
        """like: of whose device and precision it is."""
        super().__init__(width, width, device=like.device, dtype=like.dtype)
        self.added = True

    def reset_parameters(self) -> None:
        """The features as they are; no random number is drawn."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


def with_feature_head(backbone: nn.Module) -> None:
    """Put the layer where a timm model without classifier has nothing, in place."""
    model: Any = backbone
    if getattr(model, "num_classes", None) != 0:
        return
    place = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is place), None)
    if name is None or type(place) is not nn.Identity:
        return
    head = FeatureHead(model.head_hidden_size, next(model.parameters()))
    model.set_submodule(name, head.train(model.training))


def feature_head(backbone: nn.Module) -> tuple[str, FeatureHead] | None:
    """The layer and its name; None of a network with a classifier."""
    return next(((name, m) for name, m in backbone.named_modules() if isinstance(m, FeatureHead)), None)


@torch.no_grad()
def without_feature_head(state: dict[str, Tensor], name: str, norm: str | None) -> dict[str, Tensor]:
    """A state dict in timm's own coordinates without the layer `name`: what was folded into it is the norm's again.

    norm: through which it reads. ValueError where the layer does more than a norm can.
    """
    weight, bias = (state[f"{name}.{leaf}"].double() for leaf in ("weight", "bias"))
    gain = weight.diagonal()
    rest = float((weight - gain.diag()).abs().max()) / float(gain.abs().max())
    if rest > 1e-4 or (norm is None and not torch.allclose(gain, torch.ones_like(gain))):
        raise ValueError(f"{name} was trained: it is no part of a timm model without classifier")
    state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
    if norm is not None:
        old = state.get(f"{norm}.bias")
        state[f"{norm}.weight"] = (state[f"{norm}.weight"].double() * gain).to(state[f"{norm}.weight"].dtype)
        if old is not None:
            state[f"{norm}.bias"] = (old.double() * gain + bias).to(old.dtype)
    return state
