"""What a backbone family must tell the supernet. Its own adapter is one file, and one line of families.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.slices import BlockShape, BlockSlice
from supernets.axes import BlockAxes, HeadWidths, Params, layer_of, take_axis
from supernets.compact_block import CompactBlock
from supernets.feature_head import FeatureHead, feature_head
from supernets.flops import BlockCosts, NetworkCosts, StreamCosts, block_costs
from supernets.layers import norm
from supernets.rotated import STREAMS

OuterAxis = tuple[str, int] | None  # letters as in axes.py and the stage whose stream it is; None: not sliced


class Adapter(ABC):
    """One backbone family. Reads the backbone's own modules; holds no parameters and no widths.

    "Outer" parameters are all that lie outside the blocks: stem, patch merging, final norm, classifier. They are
    sliced by stage width and passed to every method, as a block's are by its slice.
    """

    block_axes: BlockAxes  # of every parameter that its blocks may have
    compact_block: type[CompactBlock] = CompactBlock  # in a compact network, where the backbone's own will not do
    block_names: tuple[str, ...]  # module path of each block, in order
    shapes: tuple[BlockShape, ...]
    costs: NetworkCosts
    input_size: tuple[int, int, int]  # channels, height, width
    outer_axes: Mapping[str, tuple[OuterAxis, ...]]  # of each outer parameter that has a stream axis
    outer_norms: Mapping[str, tuple[str, int]]  # name of each outer norm -> letters and stage of what it normalises
    classifiers: tuple[str, ...] = ()  # linear layers that read the pooled features, (B, w), or of several (B, n, w)
    # What a rotation of the streams needs to know (section 2.7); a family that does not say it is not rotated:
    outer_readers: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # outer norm -> layers that read through it
    outer_scalings: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # outer LayerScale -> parameters before it
    stem_norm: str | None = None  # a norm whose output is the first stage's stream
    before_stem: tuple[str, ...] = ()  # first letters of the parameters that lie before stem_norm
    stem_tokens: int = 0  # tokens that stem_norm runs on, or a stem's layer
    stem_layer: str | None = None  # of a compact network: the norm and layer that end its stem, which stays whole
    unrotated: Mapping[int, str] = MappingProxyType({})  # stage -> what stands against a rotation of its stream
    heads_stay: bool = False  # whether the heads of all blocks stand in one order, which is the network's own

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    @property
    def streams(self) -> dict[int, Tensor]:
        """The rotation (E, E) of each stage whose stream is rotated, rows from the old to the new channels."""
        held: Any = getattr(self.backbone, STREAMS, None)
        return {} if held is None else held.rotations

    @property
    def feature_head(self) -> FeatureHead | None:
        """The layer in the classifier's place where the network has none: its output are features then."""
        found = feature_head(self.backbone)
        return None if found is None else found[1]

    def stream_costs(self, costs: NetworkCosts) -> NetworkCosts:
        """The costs, with what the stages whose stream is rotated cost more when they are cut.

        And with what the network itself does without of what its compact networks have: `FeatureHead.added`.
        """
        added, head = {}, self.feature_head
        if head is not None and head.added:
            costs = replace(costs, spared=(head.weight.numel(), head.weight.numel() + head.bias.numel()))
        for stage in self.streams:
            found = StreamCosts()
            if stage == 0 and self.stem_norm is not None:
                E = self.shapes[0].embed_dim
                names = [n for n in self.outer_axes if n.startswith((*self.before_stem, self.stem_norm))]
                per = sum(self.backbone.get_parameter(name).numel() for name in names) // E
                flops = costs.flops.first
                found = StreamCosts((E * flops, self.stem_tokens * E - flops), (E * per, E - per))
            added[stage] = found
        return replace(costs, streams=added)

    def with_stem_layer(self, costs: NetworkCosts) -> NetworkCosts:
        """The costs, which count a stem's channels as the stage's, of a stem that runs whole before its layer."""
        if self.stem_layer is None:
            return costs
        names = [name for name in self.outer_axes if name.startswith((*self.before_stem, f"{self.stem_layer}.norm."))]
        E = self.backbone.get_submodule(self.stem_layer).linear.in_features
        whole = sum(self.backbone.get_parameter(name).numel() for name in names)
        flops, params = costs.flops, costs.params
        return replace(
            costs,
            flops=replace(flops, constant=flops.constant + E * flops.first, first=self.stem_tokens * E),
            params=replace(params, constant=params.constant + whole),
        )

    def outer(self, stage_widths: tuple[int, ...], gates: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Every outer parameter by its name in the backbone, sliced to the stage widths.

        gates: per stage (w,), how much of each channel exists; every outer norm gets its own as `name.gate`.
        """
        sliced: dict[str, Tensor] = {}
        whole: tuple[str, ...] = ()  # what precedes the rotation of a stem
        if self.stem_norm is not None and 0 in self.streams:
            whole = (*self.before_stem, self.stem_norm)
            rotation: Any = self.backbone.get_submodule(self.stem_norm).rotation
            sliced[f"{self.stem_norm}.rotation"] = rotation[: stage_widths[0]]
        for name in self.outer_axes:
            p: Tensor = self.backbone.get_parameter(name)
            sliced[name] = p if whole and name.startswith(whole) else self.slice_outer(name, p, stage_widths)
        if gates is not None:
            for name, (letters, stage) in self.outer_norms.items():
                if not (whole and name.startswith(whole)):
                    sliced[f"{name}.gate"] = gates[stage].repeat(4) if letters == "4S" else gates[stage]
        return sliced

    def slice_outer(self, name: str, p: Tensor, stage_widths: tuple[int, ...]) -> Tensor:
        """A tensor of the shape of an outer parameter, sliced as that is."""
        for dim, axis in enumerate(self.outer_axes[name]):
            if axis is not None:
                letters, stage = axis
                sizes = {"4": 4, "S": p.shape[dim] // 4 if letters == "4S" else p.shape[dim]}
                p = take_axis(p, dim, letters, {"S": stage_widths[stage]}, sizes)
        return p

    @abstractmethod
    def stem(self, params: Params, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the residual stream of the first block."""

    @abstractmethod
    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        """Patch merging before stage `stage` (> 0)."""

    @abstractmethod
    def attention_half(self, block: Any, shape: BlockShape, params: Params, kept: BlockSlice, z_S: Tensor) -> Tensor:
        """What a block's attention adds to its slice of the stream: norm, attention, LayerScale, in their order.

        params: the block's, sliced to `kept`; without those of the half's outputs (HalfAxes) the result is what its
        projection would read, without those of a norm at its end what that would. z_S: (B, N, S) or, in Swin,
        (B, H, W, S); so is the result.
        """

    @abstractmethod
    def mlp_half(self, block: Any, shape: BlockShape, params: Params, kept: BlockSlice, z_S: Tensor) -> Tensor:
        """What a block's MLP adds to its slice of the stream, zero in the channels outside kept.mlp_stream.

        Without the parameters of the half's outputs, what its second layer would read; without those of a norm at its
        end, what that would.
        """

    @abstractmethod
    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        """The attention of a block whose parameters were cut: the block's own, brought up to date, or one instead."""

    @abstractmethod
    def pool(self, params: Params, x: Tensor) -> Tensor:
        """Final norm and pooling: the stream -> the features that enter the classifier, (B, w)."""

    def pool_reads(self, params: Params, x: Tensor) -> Mapping[str, Tensor]:
        """What every layer of a pooling that has layers reads of a stream, behind its norm."""
        return {
            layer: norm(self.backbone.get_submodule(name), params, name, x)
            for name, layers in self.outer_readers.items()
            for layer in layers
        }

    @abstractmethod
    def classify(self, params: Params, features: Tensor) -> Tensor:
        """(B, w) -> logits (B, classes)."""

    @abstractmethod
    def resize(self, stage_widths: tuple[int, ...]) -> None:
        """Set the backbone's own attributes (embed_dim, num_features, ...) after it was cut."""

    def blocks(self) -> list[Any]:
        """The backbone's block modules, in order."""
        return [self.backbone.get_submodule(name) for name in self.block_names]

    def block_parameters(self, block: nn.Module) -> dict[str, Tensor]:
        """A block's parameters by name; KeyError where the family's axes lack one."""
        params: dict[str, Tensor] = dict(block.named_parameters())
        unknown = sorted(name for name in params if name not in self.block_axes)
        if unknown:
            raise KeyError(f"parameters that no axis table names: {', '.join(unknown)}")
        return params

    def one_draw(self, images: Tensor) -> AbstractContextManager[None]:
        """In training every pass over the same images sees the same draw of what is random of the network itself.

        images: the batch's tensor, which is known again by what it is and not by what it holds.
        """
        return nullcontext()

    def block_parameter(self, block: nn.Module, name: str) -> nn.Parameter:
        """One of a block's parameters, by which it and its gradient are read and written in place."""
        return block.get_parameter(name)

    def joined(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of a compact network by its own names, of those that blocks have (`<block>.<name>`)."""
        return values

    def pads_after_norm(self, block: Any) -> bool:
        """Whether attention sees tokens of zeros that its norm has not: they get the readers' bias, not the norm's."""
        return False

    def head_parts(self, block: Any) -> dict[str, str]:
        """What stands against a change of basis inside the heads: of "qk", of "v"; none by default but both said."""
        return {"qk": "the family does not say how its heads multiply", "v": "the family does not say it"}

    def cosine_qk(self, block: Any) -> bool:
        """Whether q and k are normalised inside the head and nothing more, so that both may be rotated, but alike."""
        return False

    def merging(self, stage: int) -> tuple[str, str | None]:
        """The layer that writes the stream of stage `stage` (> 0), and the norm that what it writes passes."""
        through = next(name for name in self.outer_readers if self.outer_norms[name] == ("4S", stage - 1))
        (layer,) = self.outer_readers[through]
        return layer, None

    def watch_qkv(self, block: Any, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Let `see` have a block's q, k and v (B, N, 3HD), not yet normed, whenever it runs; returns what ends that."""
        layer = layer_of(block, self.block_axes.attn.readers)
        return layer.register_forward_hook(lambda _, __, qkv: see(qkv)).remove  # type: ignore[no-any-return]

    def writers(self, block: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
        """The matrices from a block's heads and neurons to the stream: (S, H*V) and (R, M)."""
        (proj,), (fc2,) = self.block_axes.attn.writers, self.block_axes.mlp.writers
        return block.get_parameter(proj), block.get_parameter(fc2)

    def block_costs(
        self, block: nn.Module, shape: BlockShape, attn_tokens: int, attended: int, mlp_tokens: int
    ) -> BlockCosts:
        """The costs of a block that runs on so many tokens."""
        late = {*self.block_axes.attn.late_norms, *self.block_axes.mlp.late_norms}
        norms = [m for name, m in block.named_modules() if name in late and not isinstance(m, nn.Identity)]
        return block_costs(
            self.block_parameters(block),
            self.block_axes,
            shape,
            attn_tokens=attn_tokens,
            attended=attended,
            mlp_tokens=mlp_tokens,
            norm_after_gate=bool(norms),
        )


def refuse(backbone: nn.Module, feature: str, instead: str) -> UserError:
    """The error for a feature of a timm model that no adapter supports."""
    return UserError(
        f"{type(backbone).__name__}: {feature} is not supported; {instead} (docs/backbones.md lists what is supported)"
    )
