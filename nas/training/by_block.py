"""Where a small network parts from the large one: how like their streams are after every block."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.slices import NetworkSlice
from supernets.coordinates import Coordinates, coordinates
from supernets.streams import first_read
from supernets.supernet import Supernet


@torch.no_grad()
def cosine_by_block(
    supernet: Supernet,
    subnet: NetworkSlice,
    compact: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Any,
) -> dict[str, list[float]]:
    """{"subnet": a value per block, "compact": likewise}: mean cosine similarity to the large network's stream.

    Over images and tokens, in the channels that the small network keeps, as they stand in its basis; without the mean
    over channels, where nothing reads it. A block that a compact network has lost leaves the stream as it was.
    """
    adapter, blocks = supernet.adapter, range(len(supernet.shapes))
    stages, where = [shape.stage for shape in supernet.shapes], coordinates(adapter, subnet)
    firsts = [first_read(adapter, stage, subnet.stage_widths[stage]) for stage in stages]
    sums = {name: [0.0] * len(blocks) for name in ("subnet", *([] if compact is None else ["compact"]))}
    seen = 0
    for images, _ in batches:
        images = images.to(device)
        with autocast():
            large = _streams(supernet.backbone, adapter.block_names, images)
            streams = {"subnet": supernet.small_with_streams(images, subnet, blocks)[1]}
            if compact is not None:
                found = _streams(compact, adapter.block_names, images)
                streams["compact"] = {i: _turned_back(found[i], where.get(stage)) for i, stage in enumerate(stages)}
        for name, found in streams.items():
            for i, first in enumerate(firsts):
                y = found[i]
                z = large[i][..., first : y.shape[-1]]
                sums[name][i] += float(F.cosine_similarity(z.float(), y[..., first:].float(), dim=-1).mean()) * len(y)
        seen += len(images)
    return {name: [value / max(seen, 1) for value in values] for name, values in sums.items()}


def _turned_back(y: Tensor, at: Coordinates | None) -> Tensor:
    """A compact network's stream in the channels of the basis that it was cut in."""
    return y if at is None or at.matrix is None else y @ at.matrix.to(y)


def _streams(network: nn.Module, names: Iterable[str], images: Tensor) -> Mapping[int, Tensor]:
    """{block: the stream after it} of a pass."""
    found: dict[int, Tensor] = {}

    def keep(i: int, _: Any, __: Any, tokens: Tensor) -> None:
        found[i] = tokens

    with ExitStack() as hooks:
        for i, name in enumerate(names):
            hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(keep, i)))
        network(images)
    return found
