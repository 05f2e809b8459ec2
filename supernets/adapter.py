"""What a backbone family must tell the supernet, and which family a timm model belongs to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.slices import BlockShape
from supernets.axes import take_axis
from supernets.flops import NetworkCosts

Params = Mapping[str, Tensor]
OuterAxis = tuple[str, int] | None  # letters as in axes.py and the stage whose stream it is; None: not sliced


class Adapter(ABC):
    """One backbone family. Reads the backbone's own modules; holds no parameters and no widths.

    "Outer" parameters are all that lie outside the blocks: stem, patch merging, final norm, classifier. They are
    sliced by stage width and passed to every method, as a block's are by its slice.
    """

    block_names: tuple[str, ...]  # module path of each block, in order
    shapes: tuple[BlockShape, ...]
    costs: NetworkCosts
    input_size: tuple[int, int, int]  # channels, height, width
    outer_axes: Mapping[str, tuple[OuterAxis, ...]]  # of each outer parameter that has a stream axis
    outer_norms: Mapping[str, tuple[str, int]]  # name of each outer norm -> letters and stage of what it normalises

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    def outer(self, stage_widths: tuple[int, ...], gates: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Every outer parameter by its name in the backbone, sliced to the stage widths.

        gates: per stage (w,), how much of each channel exists; every outer norm gets its own as `name.gate`.
        """
        sliced: dict[str, Tensor] = {}
        for name, axes in self.outer_axes.items():
            p: Tensor = self.backbone.get_parameter(name)
            for dim, axis in enumerate(axes):
                if axis is not None:
                    letters, stage = axis
                    sizes = {"4": 4, "S": p.shape[dim] // 4 if letters == "4S" else p.shape[dim]}
                    p = take_axis(p, dim, letters, {"S": stage_widths[stage]}, sizes)
            sliced[name] = p
        if gates is not None:
            for name, (letters, stage) in self.outer_norms.items():
                sliced[f"{name}.gate"] = gates[stage].repeat(4) if letters == "4S" else gates[stage]
        return sliced

    @abstractmethod
    def stem(self, params: Params, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the residual stream of the first block."""

    @abstractmethod
    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        """Patch merging before stage `stage` (> 0)."""

    @abstractmethod
    def attend(self, block: Any, params: Params, widths: Sequence[int], x: Tensor) -> Tensor:
        """The block's attention on its normed slice, before LayerScale and the residual.

        widths: channels of V in each kept head.
        """

    @abstractmethod
    def pool(self, params: Params, x: Tensor) -> Tensor:
        """Final norm and pooling: the stream -> the features that enter the classifier, (B, w)."""

    @abstractmethod
    def classify(self, params: Params, features: Tensor) -> Tensor:
        """(B, w) -> logits (B, classes)."""

    @abstractmethod
    def resize(self, stage_widths: tuple[int, ...]) -> None:
        """Set the backbone's own attributes (embed_dim, num_features, ...) after it was cut."""

    def blocks(self) -> list[Any]:
        """The backbone's block modules, in order."""
        return [self.backbone.get_submodule(name) for name in self.block_names]

    def num_stages(self) -> int:
        return self.shapes[-1].stage + 1


def refuse(backbone: nn.Module, feature: str, instead: str) -> UserError:
    """The error for a feature of a timm model that no adapter supports."""
    return UserError(
        f"{type(backbone).__name__}: {feature} is not supported; {instead} (docs/backbones.md lists what is supported)"
    )


def adapter_for(backbone: nn.Module) -> Adapter:
    """The adapter of a timm model's family; UserError names the family or the feature that is not supported."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    from supernets.swin import SwinAdapter
    from supernets.t2t import T2TAdapter
    from supernets.t2t_vit import T2TViT
    from supernets.vit import VitAdapter

    if type(backbone) in (VisionTransformer, VisionTransformerDistilled):
        return VitAdapter(backbone)
    if type(backbone) is SwinTransformer:
        return SwinAdapter(backbone)
    if type(backbone) is T2TViT:
        return T2TAdapter(backbone)
    raise UserError(
        f"{type(backbone).__name__} is not a supported backbone; choose a timm model of the class"
        " VisionTransformer (ViT, DeiT), SwinTransformer or T2TViT"
    )
