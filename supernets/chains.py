"""Parts of compact networks by themselves, for timing: chains of one half, and all that is no block (section 2.13).

Everything is cut by the compact network's own cutter, so that what is timed is what runs. Of the backbone's blocks only
one of each kind is kept: the others run alike.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice
from supernets.basis import install_stages
from supernets.compact import cut
from supernets.flops import BlockCosts
from supernets.supernet import Supernet

ATTENTION = ("stream", "heads", "qk", "v")  # the widths of a half, by the names of their choices
MLP = ("stream", "hidden")


@dataclass(frozen=True, order=True)
class Kind:
    """What tells a half from others of its network, its widths aside: the tokens that it runs on, and how.

    attended: tokens that each attends to, 0 of an MLP. shifted: whether its windows are.
    """

    half: str  # "attention" or "mlp"
    tokens: int
    attended: int = 0
    shifted: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The widths that it has."""
        return ATTENTION if self.half == "attention" else MLP

    def words(self) -> str:
        """Its name in a message."""
        windows = f", {'shifted windows' if self.shifted else 'windows'} of {self.attended}"
        of = windows if self.half == "attention" and self.attended != self.tokens else ""
        return f"{self.half} over {self.tokens} tokens{of}"


def kinds_of_block(costs: BlockCosts) -> tuple[Kind, Kind]:
    """Of a block's attention and of its MLP."""
    attention = Kind("attention", costs.attn_tokens, costs.attended, costs.shifted)
    return attention, Kind("mlp", costs.mlp_tokens)


def widths_of(kind: Kind, shape: BlockShape) -> dict[str, int]:
    """The widths of a whole block's half."""
    whole = {"stream": shape.embed_dim, "heads": shape.num_heads, "qk": shape.head_dim, "v": shape.v_dim}
    return {name: (whole | {"hidden": shape.hidden})[name] for name in kind.names}


def half_slice(kind: Kind, shape: BlockShape, widths: Mapping[str, int]) -> BlockSlice:
    """The slice of a block that has this half alone, at these widths."""
    attention = kind.half == "attention"
    qk, v = widths.get("qk", shape.head_dim), widths.get("v", shape.v_dim)
    return BlockSlice(
        stream=widths["stream"],
        heads=widths.get("heads", shape.num_heads),
        hidden=widths.get("hidden", shape.hidden),
        qk=None if qk == shape.head_dim else qk,
        v_channels=None if v == shape.v_dim else v,
        attn=attention,
        mlp=not attention,
    )


class Chain(nn.Module):
    """Copies of a block one after the other, each with what blocks are handed beside the stream."""

    def __init__(self, block: nn.Module, length: int, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(length))
        self.given = dict(given)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, S), Swin's (B, H, W, S), to the same."""
        for block in self.blocks:
            x = block(x, **self.given)
        return x


class Parts:
    """What can be timed of a backbone. blocks: of each kind the index of the widest block, by its kind."""

    def __init__(self, backbone: nn.Module) -> None:
        """backbone: a timm model, whose blocks are left out but for one of each kind."""
        whole = Supernet(backbone)
        self.shapes, self.costs, self.input_size = whole.shapes, whole.adapter.costs, whole.adapter.input_size
        found: dict[Kind, int] = {}
        for i, costs in enumerate(self.costs.blocks):
            for kind in kinds_of_block(costs):
                if kind not in found or self.shapes[i].embed_dim > self.shapes[found[kind]].embed_dim:
                    found[kind] = i
        names = whole.adapter.block_names
        self.blocks = {kind: names[i] for kind, i in sorted(found.items())}
        self.stages = 1 + self.shapes[-1].stage
        self._shape_of = {names[i]: self.shapes[i] for i in found.values()}
        _leave_out(backbone, set(self.blocks.values()), names)
        self.supernet = Supernet(backbone).eval()
        self.rotated: Supernet | None = None  # whose stem ends in a layer where its stage is cut
        if self.supernet.adapter.stem_norm is not None:
            self.rotated = Supernet(copy.deepcopy(backbone))
            install_stages(self.rotated, (0,))
            self.rotated = Supernet(self.rotated.backbone).eval()
        self._given: dict[tuple[Kind, int, int], tuple[Tensor, dict[str, Any]]] = {}

    def shape(self, kind: Kind) -> BlockShape:
        """The backbone's block of that kind."""
        return self._shape_of[self.blocks[kind]]

    @torch.no_grad()
    def chain(self, kind: Kind, widths: Mapping[str, int], length: int, images: Tensor) -> tuple[Chain, Tensor]:
        """So many such halves, and what the first of them reads when the network sees the images (B, C, H, W)."""
        name, shape = self.blocks[kind], self.shape(kind)
        network = cut(self.supernet.backbone, self._with(name, half_slice(kind, shape, widths))).eval()
        x, given = self._input(kind, network, widths["stream"], images)
        return Chain(network.get_submodule(name), length, given).eval(), x

    @torch.no_grad()
    def without_blocks(self, stage_widths: Sequence[int], rotated: bool = False) -> nn.Module:
        """The compact network of these stage widths with every block skipped: stem, merging, classifier."""
        supernet = self.supernet if not rotated or self.rotated is None else self.rotated
        return cut(supernet.backbone, self._skipped(stage_widths)).eval()

    def _skipped(self, stage_widths: Sequence[int]) -> NetworkSlice:
        blocks = [
            BlockSlice(stage_widths[s.stage], s.num_heads, s.hidden, attn=False, mlp=False)
            for s in self.supernet.shapes
        ]
        return NetworkSlice(tuple(blocks), tuple(stage_widths))

    def _with(self, name: str, kept: BlockSlice) -> NetworkSlice:
        """One block, the others skipped; other stages as narrow as they come."""
        names, shapes = self.supernet.adapter.block_names, self.supernet.shapes
        place = names.index(name)
        widths = [min(8, next(s.embed_dim for s in shapes if s.stage == stage)) for stage in range(self.stages)]
        widths[shapes[place].stage] = kept.stream
        skipped = self._skipped(widths)
        blocks = (*skipped.blocks[:place], kept, *skipped.blocks[place + 1 :])
        return NetworkSlice(blocks, skipped.stage_widths)

    def _input(self, kind: Kind, network: nn.Module, stream: int, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        key = kind, stream, len(images)
        if key not in self._given:
            seen: list[tuple[Tensor, dict[str, Any]]] = []

            def see(_: nn.Module, args: tuple[Tensor, ...], given: dict[str, Any]) -> None:
                seen.append((args[0], given))

            hook = network.get_submodule(self.blocks[kind]).register_forward_pre_hook(see, with_kwargs=True)
            network(images)
            hook.remove()
            self._given[key] = seen[0]
        return self._given[key]


def _leave_out(backbone: nn.Module, kept: set[str], names: Sequence[str]) -> None:
    """Take the blocks out that stand behind the last one to be kept, container by container."""
    containers: dict[str, int] = {}
    for name in names:
        path, _, place = name.rpartition(".")
        containers[path] = max(containers.get(path, 0), int(place) + 1 if name in kept else 1)
    for path, length in containers.items():
        parent, _, leaf = path.rpartition(".")
        blocks: Any = backbone.get_submodule(path)
        setattr(backbone.get_submodule(parent), leaf, blocks[:length])
