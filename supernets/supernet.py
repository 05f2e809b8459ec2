"""The supernet: a timm backbone's own parameters, used at every candidate's slice at once."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from search_spaces.slices import BlockShape, NetworkSlice, identity_slice, network_slice
from supernets.adapter import Adapter
from supernets.elastic import BlockMixture, Term, mixed_block
from supernets.families import adapter_for
from supernets.flops import network_flops, network_params

Small = NetworkSlice | Sequence[BlockMixture]
Gates = Sequence[Tensor] | None


class Supernet(nn.Module):
    """Large and small networks over one set of parameters.

    backbone: a timm model, under timm's names; rewritten in a basis (basis.py) or as it came. Every small network is
    described by the argument of the call, never by state.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """Raises UserError when the family or a feature of the backbone is not supported."""
        super().__init__()
        self.backbone = backbone
        self.adapter: Adapter = adapter_for(backbone)
        self.shapes: tuple[BlockShape, ...] = self.adapter.shapes
        self.basis: Any = None  # the Basis in which it was rewritten (basis.py, which imports this file)
        self.sorted: Any = {}  # the Orders in which its units stand without one (importance.py, which does too)

    def identity(self) -> NetworkSlice:
        """The backbone itself as a slice."""
        return network_slice(self.shapes, [identity_slice(shape) for shape in self.shapes])

    def flops(self, subnet: NetworkSlice | None = None) -> int:
        """MACs of one image through a subnet, or through the backbone."""
        if subnet is None:
            return network_flops(self.shapes, self.adapter.costs, self.identity()) - self.adapter.costs.spared[0]
        return network_flops(self.shapes, self.adapter.costs, subnet)

    def params(self, subnet: NetworkSlice | None = None) -> int:
        """Parameters of a subnet's compact network, or of the backbone."""
        if subnet is None:
            return network_params(self.shapes, self.adapter.costs, self.identity()) - self.adapter.costs.spared[1]
        return network_params(self.shapes, self.adapter.costs, subnet)

    def large(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, classes) of the large network: timm's own forward."""
        with self.adapter.one_draw(images):
            return self.backbone(images)  # type: ignore[no-any-return]

    def small(self, images: Tensor, small: Small, gates: Gates = None) -> Tensor:
        """Logits (B, classes) of a subnet, or of a mixture.

        gates: per stage (E,), how much of each channel exists in a mixture; by default all of it.
        """
        return self.small_with_features(images, small, gates)[0]

    def small_with_features(self, images: Tensor, small: Small, gates: Gates = None) -> tuple[Tensor, Tensor]:
        """As `small`, and the pooled features that enter the classifier, (B, w)."""
        features, outer, _ = self._features(images, small, gates)
        return self.adapter.classify(outer, features), features

    def small_with_streams(
        self, images: Tensor, small: NetworkSlice, after: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `small`, and its stream after these blocks, (B, N, w) or, in Swin, (B, H, W, w)."""
        features, outer, streams = self._features(images, small, None, after)
        return self.adapter.classify(outer, features), streams

    def _features(
        self, images: Tensor, small: Small, gates: Gates, after: Sequence[int] = ()
    ) -> tuple[Tensor, dict[str, Tensor], dict[int, Tensor]]:
        """The pooled features, the outer parameters, and the stream after some blocks."""
        adapter, streams = self.adapter, {}
        if isinstance(small, NetworkSlice):
            mixtures: Sequence[BlockMixture] = [BlockMixture((Term(kept),)) for kept in small.blocks]
            widths = small.stage_widths
        else:
            mixtures, widths = small, self.identity().stage_widths
        outer = adapter.outer(widths, gates)
        x, stage = images, -1
        with adapter.one_draw(images):
            for i, (block, shape, mixture) in enumerate(zip(adapter.blocks(), self.shapes, mixtures, strict=True)):
                if shape.stage != stage:
                    stage = shape.stage
                    x = adapter.enter_stage(stage, outer, x) if stage else adapter.stem(outer, images)
                    if gates is not None:
                        x = x * gates[stage].to(x.dtype)
                x = mixed_block(adapter, block, shape, mixture, x)
                if i in after:
                    streams[i] = x
        return adapter.pool(outer, x), outer, streams

    def stream_order(self, stage: int) -> Sequence[int] | None:
        """The old places of a stage's channels, where they were sorted and not rotated."""
        orders = self.sorted if self.basis is None else self.basis.orders
        return orders.get(f"stream.{stage}")  # type: ignore[no-any-return]

    def forward(self, images: Tensor, small: Small | None = None, gates: Gates = None) -> tuple[Tensor, Tensor]:
        """Logits of the large network and of a small one: p and q of equation (3.4)."""
        return self.large(images), self.small(images, self.identity() if small is None else small, gates)

    def extra_repr(self) -> str:
        return f"{self.params() / 1e6:.2f} M parameters, {self.flops() / 1e9:.2f} GFLOPs (MACs)"
