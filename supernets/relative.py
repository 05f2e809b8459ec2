"""Biases of attention by the relative position of two tokens, which a compact network in evaluation makes once for all.

T tokens of an image or of a window, h heads.
"""

from typing import Any

import torch
from torch import Tensor, nn


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """(offsets, h) by the offset of two tokens (T, T) -> (h, T, T)."""
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)


class CachedBias(nn.Module):
    """Attention of a compact network with such a bias. What the bias is made of may change, or become other layers."""

    _bias: tuple[tuple[nn.Parameter, ...], list[Tensor], Any, Tensor] | None = None  # of what, memory, key, bias

    def bias_parameters(self) -> tuple[nn.Parameter, ...]:
        """What the bias is made of."""
        raise NotImplementedError

    def bias(self, dtype: torch.dtype) -> Tensor:
        """As attention adds it to its scores."""
        raise NotImplementedError

    def _cached_bias(self, dtype: torch.dtype) -> Tensor:
        """`bias`, computed again only when what it is made of has changed; kept where nothing is being differentiated.

        A change in place through `.data` goes unnoticed, as it does in autograd.
        """
        made_of, live = self.bias_parameters(), torch.is_grad_enabled() or torch.compiler.is_compiling()
        if live or self.training or any(p.is_inference() for p in made_of):
            return self.bias(dtype)
        cached, key = self._bias, (*((id(p), p.data_ptr(), p._version) for p in made_of), dtype)
        if cached is None or cached[2] != key:
            memory = [p.detach() for p in made_of]  # as long as it is held, nothing else comes to lie at its address
            self._bias = cached = made_of, memory, key, self.bias(dtype)
        return cached[3]

    def __getstate__(self) -> dict[str, Any]:
        """A copy's parameters count their versions anew: it starts without a cached bias."""
        return self.__dict__ | {"_bias": None}
