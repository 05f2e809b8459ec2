"""What a candidate is worth by measurement: the one ruler of all searches that compare architectures (section 2.12)."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nas.machine.files import write_csv
from nas.prices.costs import PricedSpace
from nas.searchers.judge import Judge, judge_of, kind_of
from nas.searchers.options import SearchOptions
from nas.searchers.spread import Spread
from nas.training.prepared import Prepared
from search_spaces.channels import KEPT
from search_spaces.errors import UserError
from search_spaces.method import Picks
from search_spaces.slices import NetworkSlice, network_slice

CANDIDATES = "candidates.csv"
UNITS = {
    "kl": " nats from the large network's prediction",
    "top1": " % missed",
    "loss": " nats from the labels",
    "features": " of the features' variance",
}


class Ruler(Protocol):
    """What architectures are compared by."""

    def __call__(self, picks: Sequence[Picks], facts: Mapping[str, Any]) -> float:
        """facts: what else candidates.csv says of it. Less is better; infinite where it is no number."""

    def ahead(self, candidates: Sequence[Sequence[Picks]]) -> None:
        """These will be asked for, in this order."""


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
    """The ruler of a search: every candidate once, by its judge.

    candidates: what this search has asked for, by its picks, in order; of a resumed search those that it has asked for
    again.
    """

    def __init__(
        self, options: SearchOptions, priced: PricedSpace, prepared: Prepared, advance: Callable[[], None]
    ) -> None:
        self.options, self.priced, self.prepared, self.advance = options, priced, prepared, advance
        self.table = Table(prepared.folder / CANDIDATES, options.resume)
        self.kind = kind_of(options, prepared.supernet)
        self.candidates: dict[str, Candidate] = {}
        self._judge: Judge | None = None
        self._spread: Spread | None = None

    def judge(self) -> Judge:
        """Made when it is first asked for, from the supernet as it stands then."""
        if self._judge is None:
            self._judge = judge_of(self.options, self.prepared)
        return self._judge

    def ahead(self, candidates: Sequence[Sequence[Picks]]) -> None:
        """Have them measured by Ray's workers, where the search has such."""
        new = {key_of(picks): picks for picks in candidates}
        new = {key: picks for key, picks in new.items() if key not in self.table.known}
        if self.options.ray_address is None or not new:
            return
        if self._spread is None:
            self._spread = Spread(self.judge(), self.options.threads or 1, self.prepared.device)
        self._spread.add({key: subnet_of(self.priced, picks) for key, picks in new.items()})

    def __call__(self, picks: Sequence[Picks], facts: Mapping[str, Any]) -> float:
        """facts: what else candidates.csv says of it. Less is better; infinite where it is no number."""
        key, subnet = key_of(picks), subnet_of(self.priced, picks)
        if key not in self.table.known:
            given = None if self._spread is None else self._spread.take(key)
            value, seconds = self.judge().timed(subnet) if given is None else given
            of_subnet = {
                "price": self.priced.network_cost(subnet) / self.priced.full,
                "gflops": self.prepared.supernet.flops(subnet) / 1e9,
                "stage_widths": " ".join(map(str, subnet.stage_widths)),
                "seconds": round(seconds, 2),
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
