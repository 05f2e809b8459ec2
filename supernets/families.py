"""Which code knows which family's backbones, one line each. Importing this registers T2T-ViT with timm."""

from dataclasses import dataclass

from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from search_spaces.errors import UserError
from supernets.adapter import Adapter
from supernets.beit import BeitAdapter
from supernets.cait import CaitAdapter
from supernets.eva import EvaAdapter
from supernets.feature_head import with_feature_head
from supernets.relpos import RelPosAdapter
from supernets.swin import SwinAdapter
from supernets.swin_v2 import SwinV2Adapter
from supernets.t2t import T2TAdapter
from supernets.t2t_vit import T2TViT
from supernets.vit import VitAdapter


@dataclass(frozen=True)
class Adapted:
    """The classes of network that a family takes, not their subclasses, and what tells the supernet about them."""

    classes: tuple[type[nn.Module], ...]
    adapter: type[Adapter]

    def takes(self, backbone: nn.Module) -> bool:
        """Whether a network is of this family."""
        return type(backbone) in self.classes

    def names(self) -> list[str]:
        """The classes' names."""
        return [cls.__name__ for cls in self.classes]


ADAPTED: dict[str, Adapted] = {
    "swin": Adapted((SwinTransformer,), SwinAdapter),
    "swinv2": Adapted((SwinTransformerV2,), SwinV2Adapter),
    "vit": Adapted((VisionTransformer, VisionTransformerDistilled), VitAdapter),
    "deit": Adapted((VisionTransformer, VisionTransformerDistilled), VitAdapter),
    "t2t": Adapted((T2TViT,), T2TAdapter),
    "eva": Adapted((Eva,), EvaAdapter),
    "beit": Adapted((Beit,), BeitAdapter),
    "relpos": Adapted((VisionTransformerRelPos,), RelPosAdapter),
    "cait": Adapted((Cait,), CaitAdapter),
}


def families_of(backbone: nn.Module) -> list[str]:
    """The names of the families that take a network."""
    return [name for name, adapted in ADAPTED.items() if adapted.takes(backbone)]


def adapter_for(backbone: nn.Module) -> Adapter:
    """The adapter of a timm model's family; UserError names the family or the feature that is not supported.

    A model without classifier gets a layer in its place (feature_head.py), which changes nothing yet.
    """
    for family in ADAPTED.values():
        if family.takes(backbone):
            with_feature_head(backbone)
            return family.adapter(backbone)
    names = dict.fromkeys(name for family in ADAPTED.values() for name in family.names())
    raise UserError(
        f"{type(backbone).__name__} is not a supported backbone; choose a timm model of one of the classes"
        f" {', '.join(names)}"
    )
