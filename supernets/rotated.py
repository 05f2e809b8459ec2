"""The norms of a stream that stands in a rotated basis (section 2.7), in place of timm's.

Where the first of the rotated channels is the mean, LayerNorm drops it and is an RMS norm over the others; and so it
is over a prefix of them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from timm.layers.norm import rms_norm  # torch's own where there is one, as in RmsNorm
from torch import Tensor, nn

STREAMS = "streams"  # the module of a backbone that holds the rotations of its streams


class Streams(nn.Module):
    """The rotation (E, E) of each rotated stage, as buffers that are in no state dict."""

    def __init__(self, rotations: Mapping[int, Tensor]) -> None:
        super().__init__()
        for stage, rotation in rotations.items():
            self.register_buffer(str(stage), rotation, persistent=False)

    @property
    def rotations(self) -> dict[int, Tensor]:
        """By stage, as the buffers are now; every forward pass asks, so that no tree of modules is walked for it."""
        return {int(stage): q for stage, q in self._buffers.items() if q is not None}


class StreamNorm(nn.Module):
    """What a timm norm is in rotated channels, with its names, shapes and epsilon.

    LayerNorm: the first channel is the mean, which does not count; the others are divided by their root mean square.
    Before patch merging (quadrants) four tokens stand side by side, and only the mean of all four goes. RmsNorm: no
    channel is the mean. A slice of w channels of E is scaled by sqrt(E / w), as if those that it lacks were zero.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, module: Any, quadrants: bool = False) -> None:
        """module: timm's LayerNorm or RmsNorm, whose parameters are taken over."""
        super().__init__()
        self.eps, self.original, self.quadrants = module.eps, type(module), quadrants
        self.centred = isinstance(module, nn.LayerNorm)
        self.weight = module.weight
        self.register_parameter("bias", getattr(module, "bias", None))

    def forward(self, x: Tensor) -> Tensor:
        return self.sliced(x, self.weight, self.bias)

    def sliced(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """(..., w), with the parameters of these channels; before patch merging w are those of four tokens.

        gate (w,): how much of each channel exists; the mean square is over what exists, and so is the result.
        """
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        width: Any = x.shape[-1] if gate is None else gate.to(x.dtype).sum()
        if self.centred and self.quadrants:
            tokens = x.unflatten(-1, (4, -1))
            mean, rest = tokens.split([1, tokens.shape[-1] - 1], dim=-1)
            x = torch.cat([mean - mean.mean(-2, keepdim=True), rest], dim=-1).flatten(-2)
        square = x.square() if gate is None else x.square() * gate
        if self.centred and not self.quadrants:
            square = square[..., 1:]
            weight = torch.cat([weight.new_zeros(1), weight[1:]])
        scale = torch.rsqrt(square.sum(-1, keepdim=True) / width + self.eps)
        whole = self.weight.shape[0]
        if gate is not None:
            weight = weight * gate * torch.sqrt(whole / width)
            bias = None if bias is None else bias * gate
        elif width != whole:
            weight = weight * math.sqrt(whole / width)
        y = x * scale * weight
        y = y if bias is None else y + bias
        under_autocast = given != self.weight.dtype  # a norm then stays in float32, as timm's
        return y if under_autocast else y.to(given)

    def plain(self, width: int) -> nn.Module:
        """A norm of the class that stood here, over `width` channels, with weights of one; frozen where this one is."""
        norm: nn.Module = self.original(width, eps=self.eps).to(self.weight)
        for name, p in self.named_parameters():
            norm.get_parameter(name).requires_grad_(p.requires_grad)
        return norm

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class StemNorm(nn.Module):
    """A norm whose output is the stream itself, and the rotation that has to follow it.

    Parameters under timm's names and in timm's channels; `rotation` (E, E) is not trained and not in the state dict.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    rotation: Tensor

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.eps, self.original = module.eps, type(module)
        self.weight = module.weight
        self.register_parameter("bias", getattr(module, "bias", None))
        self.register_buffer("rotation", torch.eye(len(module.weight)).to(module.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.sliced(x, self.rotation)

    def sliced(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(..., E) -> (..., w), rotation (w, E): the leading rows."""
        if issubclass(self.original, RmsNorm):
            y = rms_norm(x, [x.shape[-1]], self.weight, self.eps)
        else:
            y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.linear(y, rotation)

    def plain(self) -> nn.Module:
        """The norm alone, of the class that stood here and with its parameters."""
        norm = self.original(len(self.weight), eps=self.eps).to(self.weight)
        norm.weight = self.weight
        if self.bias is not None:
            norm.bias = self.bias
        return norm  # type: ignore[no-any-return]


class StemLayer(nn.Sequential):
    """The norm that ends a stem, and the layer that takes what it gives to the narrowed stream."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.add_module("norm", norm)
        self.add_module("linear", layer)


def centred(module: nn.Module) -> bool:
    """Whether a norm, or what stands for it, takes the mean over channels away."""
    return module.centred if isinstance(module, StreamNorm) else isinstance(module, nn.LayerNorm)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one stood, in the same mode."""
    module.train(model.get_submodule(name).training)
    model.set_submodule(name, module)
