"""The training images on which bases, refits and decisions rest, prepared as in evaluation, in an order of the seed."""

from collections.abc import Iterable, Iterator

import torch

from nas.data.loader import Loader
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from nas.training.training import Batch
from supernets.supernet import Supernet


def calibration_images(options: LoopOptions, prepared: Prepared, count: int) -> Iterator[Batch]:
    """Batches of the first so many that decide nothing."""
    first = prepared.plan.deciding
    return images_from(prepared.loaders.calibration(options.seed), prepared.device, first, first + count)


def deciding_images(options: LoopOptions, prepared: Prepared) -> Iterator[Batch]:
    """Batches of those that decide between candidates."""
    return images_from(prepared.loaders.calibration(options.seed), prepared.device, 0, prepared.plan.deciding)


def images_from(loader: Loader, device: torch.device, first: int, end: int) -> Iterator[Batch]:
    """Of a loader the images from `first` to before `end`, (B, C, H, W), and their labels (B,)."""
    seen = 0
    for images, labels in loader:
        own = slice(max(first - seen, 0), max(end - seen, 0))
        if len(labels[own]):
            yield images[own].to(device), labels[own].to(device)
        seen += len(images)
        if seen >= end:
            return


@torch.no_grad()
def with_drawn_labels(supernet: Supernet, batches: Iterable[Batch], seed: int) -> Iterator[Batch]:
    """The same images; labels (B,) drawn from the large network's own prediction, by one generator for all batches."""
    generator = torch.Generator().manual_seed(seed)
    for images, _ in batches:
        probabilities = supernet.eval().large(images).float().softmax(1).cpu()
        yield images, torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(images.device)
