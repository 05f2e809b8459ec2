"""What a stage has found out before it trains."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from nas.data.datasets import Splits
from nas.data.loaders import Loaders
from nas.networks.backbone import Start, TimmModel
from nas.training.plan import BasisPlan
from search_spaces.registry import Space
from supernets.supernet import Supernet


@dataclass(frozen=True)
class Prepared:
    """A run whose folder is open and whose weights are loaded.

    start: where the weights come from; fresh_classifier: whether the classifier was made anew for the dataset.
    plan: the basis in which the network is to stand.
    """

    space: Space
    model: TimmModel
    splits: Splits
    device: torch.device
    folder: Path
    supernet: Supernet
    start: Start
    fresh_classifier: bool
    loaders: Loaders
    plan: BasisPlan = field(default_factory=BasisPlan)

    @property
    def num_classes(self) -> int:
        """That the network tells apart; 0: its output are features."""
        return int(self.supernet.backbone.num_classes)  # type: ignore[arg-type]

    @property
    def labelled(self) -> bool:
        """Whether the images have labels that may be read."""
        return self.splits.num_classes > 0
