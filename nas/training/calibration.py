"""The training images on which bases, refits and decisions rest, prepared as in evaluation, in an order of the seed."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nas.data.loader import Loader
from nas.training.losses import cross_entropy, projected
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from nas.training.training import Batch
from supernets.calibration import drawn_directions, drawn_labels
from supernets.supernet import Supernet

Loss = Callable[[Tensor, Tensor], Tensor]  # of the network's output and a batch's targets
Draw = Callable[[Tensor, torch.Generator], Tensor]  # targets, from the network's output


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


def to_score(supernet: Supernet, batches: Iterable[Batch], labels: bool, seed: int) -> tuple[list[Batch], Loss]:
    """The batches, and the loss of the large network's output by whose gradients units are scored (section 2.10).

    labels: whether theirs may be read; else they are drawn; of a network without classifier, directions for its
    features.
    """
    if supernet.adapter.feature_head is not None:
        return [*with_drawn(supernet, batches, drawn_directions, seed)], projected
    return [*(batches if labels else with_drawn(supernet, batches, drawn_labels, seed))], cross_entropy


@torch.no_grad()
def with_drawn(supernet: Supernet, batches: Iterable[Batch], draw: Draw, seed: int) -> Iterator[Batch]:
    """The same images, with what is drawn from the large network's output, by one generator for all batches."""
    generator = torch.Generator().manual_seed(seed)
    for images, _ in batches:
        yield images, draw(supernet.eval().large(images), generator)
