"""Pictures that colours tell apart, and networks that were trained on them: what searches of free widths begin with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import nas.stages.retrain
import nas.stages.search
from nas.config import RetrainConfig, SearchConfig
from nas.stages.retrain import run_retrain

CLASSES = 5
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=20, patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2),
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        dict(img_size=20, patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2),
    ),
    "t2t": ("t2t_vit_7", dict(img_size=32, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0, token_dim=4)),
    "eva": (
        "eva02_tiny_patch14_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=3),
    ),
    "cait": (
        "cait_xxs24_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, depth_token_only=1, init_values=0.5),
    ),
    "beit": ("beit_base_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)),
    "relpos": (
        "vit_relpos_small_patch16_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, rel_pos_dim=16, init_values=0.5),
    ),
}
COMMON: dict[str, Any] = dict(dataset="folder", workers=0, val_fraction=0.25, threads=1, device="cpu", batch_size=16)


def model_options(family: str, **more: Any) -> dict[str, Any]:
    name, options = FAMILIES[family]
    return dict(model=name, model_kwargs=tuple(f"{key}={value!r}" for key, value in (options | more).items()))


def draw(root: Path, number: int = 18, noise: int = 70, constant: bool = False) -> Path:
    """A folder of a class each; all pictures alike where constant."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / str(label)).mkdir(parents=True)
        colour = random.integers(90, 165, (1, 1, 3))
        for i in range(number):
            pixels = colour + random.integers(-noise, noise, (16, 16, 3))
            pixels = np.full((16, 16, 3), 128) if constant else np.clip(pixels, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / str(label) / f"{i}.png")
    return root


@dataclass(frozen=True)
class World:
    """root: of all folders. trained: the checkpoint of a ViT, found by --train plain; others are drawn."""

    root: Path
    trained: Path

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    def checkpoint(self, family: str, **more: Any) -> Path:
        """Of the family; of the ViT the trained one, unless it is another."""
        if family == "vit" and not more:
            return self.trained
        path = self.root / f"{family}-{'-'.join(map(str, more))}.safetensors"
        if not path.exists():
            name, options = FAMILIES[family]
            torch.manual_seed(0)
            network = timm.create_model(name, num_classes=CLASSES, **options | more)
            with torch.no_grad():  # else timm starts every bias at 0 and every norm at 1
                for p in network.parameters():
                    p.add_((0.2 if p.dim() == 1 else 0.3 / p[0].numel() ** 0.5) * torch.randn_like(p))
            save_file(network.state_dict(), path)
        return path

    def search(self, output: Path, family: str = "vit", more: dict[str, Any] | None = None, **options: Any) -> Any:
        """more: of the model."""
        own = COMMON | dict(data_dir=self.pictures, checkpoint=self.checkpoint(family, **more or {}), evals=3)
        own |= dict(budget=0.75 if family == "t2t" else 0.5) | model_options(family, **more or {}) | options
        return SearchConfig(space=f"{family}-free-nano", output=output, **own)

    def retrain(self, output: Path, **options: Any) -> RetrainConfig:
        own = COMMON | dict(data_dir=self.pictures, epochs=2, lr=1e-3) | options
        return RetrainConfig(output=output, **own)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Drawing and timing take longer than a tiny run."""
    for stage in (nas.stages.search, nas.stages.retrain):
        patch.setattr(stage, "plot_run", lambda folder: None)
    patch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("free")
    draw(root / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        own = COMMON | dict(data_dir=root / "pictures", epochs=10, lr=3e-3, train="plain", scale=(1.0, 1.0))
        config = RetrainConfig(space="vit-free-nano", output=root / "plain", **own | model_options("vit"))
        yield World(root, run_retrain(config) / "large.safetensors")
