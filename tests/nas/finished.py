"""A folder as a retrain leaves it, without the training: a tiny Swin with padded and shifted windows, ten classes."""

from pathlib import Path

import timm
import torch

from nas.networks.architecture import architecture_of, slices_of
from nas.networks.compact_file import save_compact
from nas.networks.weights import save_weights
from search_spaces.architecture import Architecture
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.oracle import randomise

SWIN = (
    "swin_tiny_patch4_window7_224",
    dict(img_size=36, embed_dim=16, depths=(2, 1), num_heads=(4, 8), window_size=4, mlp_ratio=2),
)


def finished_run(folder: Path, num_classes: int = 10) -> tuple[Architecture, Supernet]:
    """Write arch.json, compact.safetensors, config.json and large.safetensors; alpha is 2 and 1 in turn."""
    model, options = SWIN
    supernet = Supernet(randomise(timm.create_model(model, num_classes=num_classes, **options), 0)).eval()
    picks = [{"alpha": 2 - i % 2} for i in range(len(supernet.shapes))]
    arch = architecture_of(supernet, "swin-dan-nano", model, options, picks)
    save_compact(cut(supernet.backbone, slices_of(arch, supernet.shapes)), folder, arch)
    save_weights(supernet.backbone.state_dict(), folder / "large.safetensors")
    return arch, supernet


def pictures(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 36, 36, generator=torch.Generator().manual_seed(seed))


def free_architecture(depth: int = 3) -> Architecture:
    """A ViT-Ti whose blocks have widths of their own; its second attention and its last MLP are removed."""
    model, options = "vit_tiny_patch16_224", dict(depth=depth)
    supernet = Supernet(timm.create_model(model, num_classes=10, **options))
    blocks = []
    for i in range(depth):
        inside = dict(qk=24 + 8 * (i % 6), v=56 - 8 * (i % 3))
        blocks.append(dict(stream=144, heads=3 * (i != 1), **inside, hidden=96 * (depth - 1 - i) % 864))
    return architecture_of(supernet, "vit-free", model, options, blocks)
