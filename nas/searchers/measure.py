"""What a candidate is worth by measurement: the one ruler of every search that compares architectures (section 2.12).

Every candidate is computed in the supernet as its cut network would compute it, refitted before where its method refits
what it cuts, on images that neither calibrate nor refit.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.machine.files import write_csv
from nas.prices.costs import PricedSpace
from nas.searchers.options import SearchOptions
from nas.training.calibration import calibration_images, deciding_images
from nas.training.prepared import Prepared
from nas.training.refit import images_that_fit
from search_spaces.channels import KEPT
from search_spaces.errors import UserError
from search_spaces.method import Picks
from search_spaces.slices import NetworkSlice, network_slice
from supernets.refit import refit, written
from supernets.supernet import Supernet

CANDIDATES = "candidates.csv"
REFITTED = 512  # images on which a candidate is refitted
UNITS = {
    "kl": " nats from the large network's prediction",
    "top1": " % missed",
    "loss": " nats from the labels",
    "features": " of the features' variance",
}


Ruler = Callable[[Sequence[Picks], Mapping[str, Any]], float]  # of an architecture; what else candidates.csv says of it


def key_of(picks: Sequence[Picks]) -> str:
    """What tells an architecture from others: its picks, as JSON."""
    return json.dumps(list(picks))


def subnet_of(priced: PricedSpace, picks: Sequence[Picks]) -> NetworkSlice:
    """The subnet of an architecture; what is chosen by number alone are the first ones."""
    space = priced.space
    return network_slice(space.shapes, space.block_slices(picks, first_kept(priced, picks)), priced.full_stage_width)


def first_kept(priced: PricedSpace, picks: Sequence[Picks]) -> list[dict[str, list[int]]]:
    """Per block the kept indices where arch.json names them: the first channels, in the order of the stream."""
    space = priced.space
    if KEPT not in space.method.kept_names:
        return [{} for _ in picks]
    return [{KEPT: list(range(own.num_mlp_stream()))} for own in space.block_slices(picks)]


def check_images(options: SearchOptions, prepared: Prepared, may_score: bool = True) -> None:
    """Refuse decisions for which no image is left. may_score: whether --decide score would do without."""
    if not prepared.plan.deciding:
        other = ", or take --decide score" if may_score else ""
        raise UserError(
            f"--decide {options.decide}: of {prepared.plan.images} training images none can be left to decide by; give"
            f" more{other}"
        )


@dataclass(frozen=True)
class Candidate:
    """An architecture that was measured. value: less is better; infinite where it is no number. price: exact."""

    picks: Sequence[Picks]
    value: float
    price: int
    facts: Mapping[str, Any]


class Table:
    """candidates.csv: every candidate that was measured. A resumed search reads what it has measured already."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if resume and path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self.known = {row["picks"]: float(row["value"]) for row in self.rows}

    def add(self, value: float, picks: str, facts: Mapping[str, Any]) -> None:
        """A candidate measured just now."""
        self.rows.append({"candidate": len(self.rows) + 1, "value": value, **facts, "picks": picks})
        self.known[picks] = value
        write_csv(self.path, self.rows)


class Measure:
    """How far a candidate's prediction is from what is wanted, by --decide: KL(large || candidate) in nats, missed
    top-1 in %, or cross-entropy with the labels in nats. Of a network without classifier kl is the squared error of its
    features, as a share of their variance.

    candidates: what this search has asked for, by its picks, in order; of a resumed search those that it has asked for
    again.
    """

    def __init__(
        self, options: SearchOptions, priced: PricedSpace, prepared: Prepared, advance: Callable[[], None]
    ) -> None:
        self.options, self.priced, self.prepared, self.advance = options, priced, prepared, advance
        self.table = Table(prepared.folder / CANDIDATES, options.resume)
        self.kind = options.decide if prepared.supernet.adapter.feature_head is None else "features"
        self.candidates: dict[str, Candidate] = {}
        self.images: Images | None = None

    def __call__(self, picks: Sequence[Picks], facts: Mapping[str, Any]) -> float:
        """facts: what else candidates.csv says of it. Less is better; infinite where it is no number."""
        key, subnet = key_of(picks), subnet_of(self.priced, picks)
        if key not in self.table.known:
            start = time.perf_counter()
            value = self._value(subnet)
            of_subnet = {
                "price": self.priced.network_cost(subnet) / self.priced.full,
                "gflops": self.prepared.supernet.flops(subnet) / 1e9,
                "stage_widths": " ".join(map(str, subnet.stage_widths)),
                "seconds": round(time.perf_counter() - start, 2),
            }
            self.table.add(value, key, {"measured": self.kind, **facts, **of_subnet})
        self.advance()
        value = self.table.known[key]
        value = math.inf if math.isnan(value) else value
        self.candidates.setdefault(key, Candidate(picks, value, self.priced.network_cost(subnet), facts))
        return value

    def best(self, most: int) -> Candidate:
        """The best that costs no more; of equals the first."""
        return min((c for c in self.candidates.values() if c.price <= most), key=lambda c: c.value)

    def words(self) -> str:
        """What was measured, in one line."""
        values = [candidate.value for candidate in self.candidates.values()]
        refitted = "refitted and " if self.prepared.plan.refits else ""
        return (
            f"{len(values)} candidates {refitted}measured: {values[0]:.4g}{UNITS[self.kind]} at first,"
            f" {min(values):.4g} at best"
        )

    @torch.no_grad()
    def _value(self, subnet: NetworkSlice) -> float:
        supernet = self.prepared.supernet.eval()
        if self.images is None:
            self.images = images_of(self.options, self.prepared)
        total, seen, refitting = 0.0, 0, self.images.refitting
        with written(supernet, subnet, refit(supernet, subnet, refitting) if refitting else {}):
            for images, labels, expected in self.images.deciding:
                q = supernet.small(images, subnet).float()
                if self.kind == "features":
                    total += float((q - expected).square().sum())
                elif self.kind == "top1":
                    total += 100 * float((q.argmax(1) != labels).sum())
                elif self.kind == "loss":
                    total += float(F.cross_entropy(q, labels, reduction="sum"))
                else:
                    total += float(F.kl_div(q.log_softmax(1), expected, log_target=True, reduction="sum"))
                seen += len(images)
        return total / (self.images.variance() if self.kind == "features" else seen)


@dataclass(frozen=True)
class Images:
    """refitting: batches (B, C, H, W). deciding: batches, their labels, and the large network's log-probabilities, or
    its features.
    """

    refitting: Sequence[Tensor]
    deciding: Sequence[tuple[Tensor, Tensor, Tensor]]

    def variance(self) -> float:
        """Of the large network's features over all images, their number times it; in float64."""
        features = torch.cat([expected for _, _, expected in self.deciding]).double()
        return float((features - features.mean(0)).square().sum())


def images_of(options: SearchOptions, prepared: Prepared) -> Images:
    """Those of a run, kept in memory."""
    assert options.refit_images is not None
    fit = images_that_fit(options, prepared, prepared.supernet.identity())
    count = min(REFITTED, prepared.plan.images, options.refit_images, fit) if prepared.plan.refits else 0
    return Images(
        [images for images, _ in calibration_images(options, prepared, count)] if count else [],
        [
            (images, labels, output_of(prepared.supernet, images))
            for images, labels in deciding_images(options, prepared)
        ],
    )


def output_of(supernet: Supernet, images: Tensor) -> Tensor:
    """The large network's log-probabilities (B, classes), or its features (B, E)."""
    output = supernet.large(images).float()
    return output.log_softmax(1) if supernet.adapter.feature_head is None else output
