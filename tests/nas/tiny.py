"""The smallest things that train: a ViT of two blocks on 16-px noise with four classes."""

from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from nas.config import RetrainConfig
from nas.data.datasets import Splits
from nas.data.images import Images, Source
from nas.data.loaders import Batching, Loaders, make_loaders
from nas.networks.backbone import Start, TimmModel
from nas.objectives.adjoined import Adjoined
from nas.training.make import make_training
from nas.training.objective import Objective
from nas.training.prepared import Prepared
from nas.training.training import Training
from search_spaces.registry import get_space
from search_spaces.slices import NetworkSlice, network_slice, prefix_slice
from supernets.supernet import Supernet

CPU = torch.device("cpu")
VIT = ("vit_tiny_patch16_224", dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2))


def supernet(num_classes: int = 4, seed: int = 0, **extra: Any) -> Supernet:
    torch.manual_seed(seed)
    return Supernet(timm.create_model(VIT[0], num_classes=num_classes, **VIT[1] | extra))


def half(net: Supernet) -> NetworkSlice:
    """AN at alpha 2."""
    return network_slice(net.shapes, [prefix_slice(shape, 2, "stream") for shape in net.shapes])


def noise(n: int, classes: int = 4, seed: int = 0) -> Images:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    names = tuple(f"class{i}" for i in range(classes))
    return Images(Source(lambda i: Image.fromarray(pixels[i]), "image {}".format, np.arange(n) % classes, names))


def config(folder: Any, **options: Any) -> RetrainConfig:
    """A run of two epochs of four batches of eight, at a constant rate."""
    own: dict[str, Any] = dict(
        dataset="folder", output=folder, epochs=2, batch_size=8, lr=1e-2, workers=0, sched="none", color_jitter=0.0
    )
    return RetrainConfig(**own | options)


def loaders(options: RetrainConfig, net: Supernet, n: int = 32) -> Loaders:
    names = tuple(f"class{i}" for i in range(4))
    splits = Splits(noise(n), noise(8, seed=1), noise(8, seed=2), 4, names, "test split")
    batching = Batching(options.batch_size or 64, options.seed, options.smoothing or 0.0)
    return make_loaders(options, batching, splits, net, CPU)


def prepared(options: RetrainConfig, net: Supernet, **known: Any) -> Prepared:
    """A run before it trains: untrained weights, a new classifier, unless known otherwise."""
    assert options.output is not None
    splits = Splits(None, None, None, 4, None, "test split")  # type: ignore[arg-type]
    own: dict[str, Any] = dict(start=Start(), fresh_classifier=True, splits=splits)
    own["loaders"] = known.pop("loaders", None) or loaders(options, net)
    space, model = get_space("vit-an-nano"), TimmModel(*VIT)
    return Prepared(space=space, model=model, device=CPU, folder=options.output, supernet=net, **own | known)


def training(options: RetrainConfig, objective: Objective | None = None) -> Training:
    if objective is None:
        net = supernet()
        objective = Adjoined(net, half(net))
    options.output.mkdir(parents=True, exist_ok=True)
    return make_training(options, objective, prepared(options, objective.supernet))
