"""k-NN: how well features tell classes apart that no classifier was trained for.

As DINO measures it (arXiv 2104.14294): cosine similarity, the 20 nearest images of a bank, votes weighted by
exp(similarity / 0.07).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.machine.distributed import sum_
from nas.machine.timing import Network

NEIGHBOURS, TEMPERATURE = 20, 0.07


class Neighbours:
    """A bank of features (n, E) with labels (n,), of norm one."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = F.normalize(features.float(), dim=1), labels
        self.num_classes = int(labels.max()) + 1

    def votes(self, features: Tensor) -> Tensor:
        """(B, E) -> (B, classes)."""
        near = (F.normalize(features.float(), dim=1) @ self.features.T).topk(min(NEIGHBOURS, len(self.labels)), dim=1)
        votes = near.values.new_zeros(len(features), self.num_classes)
        return votes.scatter_add(1, self.labels[near.indices], (near.values / TEMPERATURE).exp())


@torch.no_grad()
def knn(
    networks: Mapping[str, Network],
    bank: Iterable[tuple[Tensor, Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Any,
) -> dict[str, float]:
    """{"<name>_knn": percent} of networks from images to features (B, E).

    bank: batches of images and labels, all of them in every process. batches: those that are told apart, of all
    processes together.
    """
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in networks}
    for images, labels in bank:
        for name, network in networks.items():
            with autocast():
                found[name][0].append(network(images.to(device)).float())
            found[name][1].append(labels.to(device))
    neighbours = {
        name: Neighbours(torch.cat(features), torch.cat(labels)) for name, (features, labels) in found.items()
    }
    hits = {name: torch.zeros((), dtype=torch.long, device=device) for name in networks}
    seen = torch.zeros((), dtype=torch.long, device=device)
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        seen += len(labels)
        for name, network in networks.items():
            with autocast():
                features = network(images)
            hits[name] += (neighbours[name].votes(features).argmax(1) == labels).sum()
    sum_(seen, *hits.values())
    return {f"{name}_knn": 100.0 * int(h) / max(int(seen), 1) for name, h in hits.items()}
