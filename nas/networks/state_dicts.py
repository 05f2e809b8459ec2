"""The state dict in what training scripts save: out of the dictionary around it, without the names of wrappers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

AVERAGED = re.compile(r"(^|_)ema(_|$)")
# under which scripts keep the weights, beside what else they save; before them averaged weights, under any key
KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "backbone", "weights", "shadow")
WRAPPER = re.compile(r"(module|_orig_mod|model|net|network|backbone|encoder|ema_model|model_ema|ema)\.")


def unwrapped(state: Any) -> dict[str, Tensor] | None:
    """The tensors by name; None where there is no state dict. Averaged weights are preferred to the last ones."""
    if not isinstance(state, Mapping) or not state:
        return None
    tensors = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    if len(tensors) == len(state) - sum(str(name).endswith("_extra_state") for name in state):
        return tensors
    averaged = [key for key in state if AVERAGED.search(str(key))]
    for key in (*averaged, *KEYS):
        found = unwrapped(state.get(key))
        if found:
            return found
    return None


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without `module.`, `_orig_mod.`, `model.`, `net.`, `backbone.`, `encoder.` and the like, however nested.

    Where two networks lie side by side under such names, the averaged one is taken, or else the one of more tensors.
    """
    chains: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        rest = name
        while (wrapper := WRAPPER.match(rest)) is not None:
            rest = rest[wrapper.end() :]
        chains.setdefault(name.removesuffix(rest), {})[rest] = tensor
    result: dict[str, Tensor] = {}
    for chain in sorted(chains, key=lambda chain: ("ema" in chain, len(chains[chain]))):  # the last one stands
        result |= chains[chain]
    return result
