"""What networks are worth on images: by labels where there are some and a classifier, else beside the large network."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nas.machine.progress import progress
from nas.machine.timing import Network
from nas.training.calibration import images_from
from nas.training.evaluate import top_k
from nas.training.likeness import FEATURES, PREDICTIONS, likeness
from nas.training.nearest import knn
from nas.training.prepared import Prepared
from nas.training.training import Batch

ACCURACIES, NEAREST = ("top1", "top5"), "knn"
BANK = 10_000  # training images at most whose features a stage's k-NN looks among


@dataclass(frozen=True)
class Scores:
    """columns: of a table, by the names in COLUMNS. reference: the large network as it was before; None: unknown.

    bank: makes the images that features are looked up among, with labels; None: no k-NN.
    """

    columns: tuple[str, ...]
    device: torch.device
    autocast: Callable[[], Any]
    reference: Network | None = None
    bank: Callable[[], Iterator[Batch]] | None = None

    def __call__(self, networks: Mapping[str, Network], batches: Any, shown_as: str | None = None) -> dict[str, float]:
        """{"<name>_<column>": value} of each network over the batches of all processes; empty of no network.

        shown_as: the words of a progress bar, for batches of known number; None shows none.
        """
        if not networks:
            return {}
        if self.columns == ACCURACIES:
            return top_k(networks, batches, self.device, self.autocast, shown_as)
        found: dict[str, float] = {}
        if self.reference is not None:
            looked = batches if shown_as is None else progress(batches, shown_as)
            features = self.columns[0] in FEATURES
            found |= likeness(networks, self.reference, looked, self.device, self.autocast, features)
        return found

    def reported(self, networks: Mapping[str, Network], batches: Any, words: str) -> dict[str, float]:
        """The same of the images that results are reported on, once and last, with the k-NN that decides nothing."""
        found = self(networks, batches, words)
        if self.bank is not None and networks:
            found |= knn(networks, self.bank(), progress(batches, "k-NN"), self.device, self.autocast)
        return found


def scores_of(prepared: Prepared, seed: int, autocast: Callable[[], Any], reference: Network | None = None) -> Scores:
    """How a run's networks are measured. seed: of the run, which draws the bank of its k-NN."""
    device, labelled = prepared.device, prepared.labelled
    if prepared.num_classes:
        columns = ACCURACIES if labelled else PREDICTIONS
        return Scores(columns, device, autocast, reference)

    def bank() -> Iterator[Batch]:
        return images_from(prepared.loaders.calibration(seed), device, 0, BANK)

    return Scores(
        (*FEATURES, NEAREST) if labelled else FEATURES, device, autocast, reference, bank if labelled else None
    )
