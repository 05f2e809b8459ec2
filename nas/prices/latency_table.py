"""latency.json: what parts of compact networks take on a named device, and what lies between (section 2.13).

Half by half on a grid of their widths, and without its blocks by the widths of its stages; in nanoseconds of a batch.
numpy is all that reading it needs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import UserError
from supernets.chains import Kind

RECORD = "latency"  # of arch.json's search settings: where it was timed, and what the table says of the result
FORMAT, SCHEMA = "vit-nas latency table", 1
NOISY = 0.10  # spread of a point that is worth saying: interquartile range over median
Floats = NDArray[np.float64]
Place = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What was timed where: two tables with the same one are of the same clock.

    device: the processor's or the card's name. precision: fp32 or bf16, of weights and images.
    """

    device: str
    device_type: str
    runtime: str
    precision: str
    batch_size: int
    threads: int | None

    def words(self) -> str:
        """In one line, as pictures name it."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"{self.device}{threads}, {self.runtime} {self.precision}, batch {self.batch_size}"


@dataclass(frozen=True)
class HalfTimes:
    """One kind of half. grid: values of each of its widths, rising, by name; ns: at all of their products, in order.

    lines: of each width what was timed of it alone with the others at their largest: value -> ns, the steps of the
    device between the grid's values.
    """

    grid: Mapping[str, tuple[int, ...]]
    ns: Floats
    lines: Mapping[str, tuple[tuple[int, ...], Floats]] = field(default_factory=dict)

    def at(self, widths: Mapping[str, int]) -> float:
        """Nanoseconds at any widths within the grid.

        Linear in every width between the grid's values, since MACs are, but along the diagonal of q, k and v, which run
        padded to the wider of both; times what each line says beside that, so that a step stays where it was found.
        """
        value = self._between(widths)
        for name, (line, factors) in self._steps.items():
            value *= float(np.interp(widths[name], line, factors))
        return value

    @cached_property
    def _steps(self) -> dict[str, tuple[tuple[int, ...], Floats]]:
        """Of each line the factor from what the grid says of it to what was timed."""
        largest = {name: values[-1] for name, values in self.grid.items()}
        found = {}
        for name, (line, ns) in self.lines.items():
            said = [self._between(largest | {name: value}) for value in line]
            found[name] = line, ns / np.array(said)
        return found

    def _between(self, widths: Mapping[str, int]) -> float:
        places = {name: _place(self.grid[name], widths[name]) for name in self.grid}
        corners: list[tuple[dict[str, int], float]] = [({}, 1.0)]
        paired = self._diagonal(places)
        for name, (k, share) in places.items():
            if name in paired:
                continue
            own = [(k, 1 - share), (k + 1, share)] if share else [(k, 1.0)]
            corners = [({**at, name: i}, weight * w) for at, weight in corners for i, w in own]
        if paired:
            corners = [({**at, **both}, weight * w) for at, weight in corners for both, w in _triangle(places)]
        total = 0.0
        for at, weight in corners:
            total += weight * float(self.ns[tuple(at[name] for name in self.grid)])
        return total

    def _diagonal(self, places: Mapping[str, tuple[int, float]]) -> tuple[str, ...]:
        """q's and v's width where both lie in the same step of the same values."""
        if "qk" not in self.grid or self.grid["qk"] != self.grid["v"] or places["qk"][0] != places["v"][0]:
            return ()
        return ("qk", "v") if places["qk"][1] or places["v"][1] else ()


def _place(values: Sequence[int], value: int) -> tuple[int, float]:
    """The grid's value at or below one, and how far towards the next; below the least it is the least."""
    k = int(np.searchsorted(values, value, side="right")) - 1
    if k < 0:
        return 0, 0.0
    if k == len(values) - 1:
        return k, 0.0
    return k, (value - values[k]) / (values[k + 1] - values[k])


def _triangle(places: Mapping[str, tuple[int, float]]) -> list[tuple[dict[str, int], float]]:
    """The corners of the triangle of q's and v's step that a point lies in, and their weights."""
    (k, s), (_, t) = places["qk"], places["v"]
    wide = {"qk": k + 1, "v": k} if s >= t else {"qk": k, "v": k + 1}
    return [
        ({"qk": k, "v": k}, 1 - max(s, t)),
        (wide, abs(s - t)),
        ({"qk": k + 1, "v": k + 1}, min(s, t)),
    ]


@dataclass(frozen=True)
class OutsideTimes:
    """The network without its blocks. base: the whole widths of the stages.

    pairs: of neighbouring stages their grids and ns (widths, widths after), the other stages whole; of one stage alone
    its grid, and (widths, 1).
    """

    base: tuple[int, ...]
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...], Floats], ...]

    @property
    def num_stages(self) -> int:
        """Of the network."""
        return len(self.base)

    @property
    def constant(self) -> int:
        """All lies in the terms of the stages."""
        return 0

    def of_stage(self, stage: int, width: int) -> int:
        """What a stage's width takes by itself; of one between two pairs what both have counted, less."""
        if self.num_stages == 1:
            return round(self._at(0, width, self.base[0]))
        inner = 0 < stage < self.num_stages - 1
        return -round(self._at(stage, width, self.base[stage + 1])) if inner else 0

    def of_merging(self, stage: int, width: int, after: int) -> int:
        """What two neighbouring stages take at these widths, the others whole."""
        return round(self._at(stage, width, after))

    def at(self, widths: Sequence[int]) -> int:
        """Of all stages: pairs, less what two pairs have counted."""
        pairs = sum(self.of_merging(s, *widths[s : s + 2]) for s in range(self.num_stages - 1))
        return pairs + sum(self.of_stage(s, w) for s, w in enumerate(widths))

    def _at(self, pair: int, width: int, after: int) -> float:
        first, second, ns = self.pairs[pair]
        (i, s), (j, t) = _place(first, width), _place(second, after)
        near = ns[i : i + 2, j : j + 2]
        rows = near[0] if not s else (1 - s) * near[0] + s * near[1]
        return float(rows[0] if not t else (1 - t) * rows[0] + t * rows[1])


@dataclass(frozen=True)
class LatencyTable:
    """network: the timm model's facts. rotated: without blocks where the stem ends in a layer, if that is another.

    spread: of the points, median and largest; noisy: how many of `points` spread by more than NOISY. versions: of what
    it was made with.
    """

    setting: Setting
    network: Mapping[str, Any]
    halves: Mapping[Kind, HalfTimes]
    outside: OutsideTimes
    rotated: OutsideTimes | None
    spread: tuple[float, float]
    noisy: int
    points: int
    versions: Mapping[str, str]
    path: Path | None = None

    def half(self, kind: Kind, widths: Mapping[str, int]) -> int:
        """Nanoseconds of one half. UserError where the table has no such half, or none so wide."""
        times = self.halves.get(kind)
        if times is None:
            known = "; ".join(each.words() for each in self.halves)
            raise UserError(f"{self._name}: has no {kind.words()}; it has {known}; make one of this network and input")
        for name, values in times.grid.items():
            if widths[name] > values[-1]:
                raise UserError(
                    f"{self._name}: {kind.words()} up to {name} {values[-1]}, this network has {widths[name]}; make one"
                    " of this network"
                )
        return round(times.at(widths))

    @property
    def _name(self) -> str:
        return f"the latency table {self.path or ''}".strip()

    def noise(self) -> str:
        """What is to be said of its noise; empty where it is quiet."""
        if not self.noisy:
            return ""
        return (
            f"{self._name}: {self.noisy} of {self.points} points vary by more than {NOISY:.0%} between rounds (up to"
            f" {self.spread[1]:.0%}, median {self.spread[0]:.1%}); better make it on a quiet machine"
        )

    def record(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "unit": "ns",
            "setting": asdict(self.setting),
            "network": dict(self.network),
            "versions": dict(self.versions),
            "spread": {"median": self.spread[0], "largest": self.spread[1]},
            "points": self.points,
            "noisy": self.noisy,
            "halves": [
                asdict(kind)
                | {
                    "grid": {name: list(values) for name, values in times.grid.items()},
                    "ns": times.ns.tolist(),
                    "lines": {name: {"at": list(at), "ns": ns.tolist()} for name, (at, ns) in times.lines.items()},
                }
                for kind, times in self.halves.items()
            ],
            "outside": _outside_record(self.outside),
            "rotated": None if self.rotated is None else _outside_record(self.rotated),
        }


def _outside_record(times: OutsideTimes) -> dict[str, Any]:
    pairs = [{"widths": list(a), "after": list(b), "ns": ns.tolist()} for a, b, ns in times.pairs]
    return {"base": list(times.base), "pairs": pairs}


def read_table(path: Path) -> LatencyTable:
    """The table of a file; UserError names the field that is wrong."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--latency-table {path}: no such file; python -m nas.latency makes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--latency-table {path}: not readable as JSON ({str(error).splitlines()[0]})") from None
    return _Reader(path).table(record)


class _Reader:
    """A record checked field by field."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, where: str, found: Any, expected: str) -> UserError:
        return UserError(f"--latency-table {self.path}: {where} is {found!r:.60}; expected {expected}")

    def of(self, record: Any, where: str, name: str, kind: type | tuple[type, ...], words: str) -> Any:
        """A field of a mapping, of a type."""
        inside = f"{where}.{name}" if where else name
        if not isinstance(record, Mapping):
            raise self.refuse(where or "the file", record, "a mapping")
        if name not in record:
            raise UserError(f"--latency-table {self.path}: {inside} is missing; expected {words}")
        value = record[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(inside, value, words)
        return value

    def table(self, record: Any) -> LatencyTable:
        if self.of(record, "", "format", str, repr(FORMAT)) != FORMAT:
            raise self.refuse("format", record["format"], repr(FORMAT))
        if self.of(record, "", "schema", int, str(SCHEMA)) != SCHEMA:
            raise self.refuse("schema", record["schema"], f"{SCHEMA}; make the table anew with this version")
        if self.of(record, "", "unit", str, "'ns'") != "ns":
            raise self.refuse("unit", record["unit"], "'ns'")
        setting = self.of(record, "", "setting", Mapping, "a mapping")
        types = {"device": str, "device_type": str, "runtime": str, "precision": str, "batch_size": int}
        values = {n: self.of(setting, "setting", n, t, "a word" if t is str else "a number") for n, t in types.items()}
        values["threads"] = self.of(setting, "setting", "threads", (int, type(None)), "a number or null")
        network = self.of(record, "", "network", Mapping, "a mapping")
        self.of(network, "network", "input_size", list, "channels, height and width")
        spread = self.of(record, "", "spread", Mapping, "a mapping")
        both = [float(self.of(spread, "spread", n, (int, float), "a number")) for n in ("median", "largest")]
        halves = dict(
            self.half(each, f"halves[{i}]")
            for i, each in enumerate(self.of(record, "", "halves", list, "a list of halves"))
        )
        if not halves:
            raise self.refuse("halves", [], "one half or more")
        rotated = self.of(record, "", "rotated", (Mapping, type(None)), "a mapping or null")
        return LatencyTable(
            setting=Setting(**values),
            network=network,
            halves=halves,
            outside=self.outside(self.of(record, "", "outside", Mapping, "a mapping"), "outside"),
            rotated=None if rotated is None else self.outside(rotated, "rotated"),
            spread=(both[0], both[1]),
            noisy=self.of(record, "", "noisy", int, "a number"),
            points=self.of(record, "", "points", int, "a number"),
            versions=self.of(record, "", "versions", Mapping, "a mapping"),
            path=self.path,
        )

    def half(self, record: Any, where: str) -> tuple[Kind, HalfTimes]:
        half = self.of(record, where, "half", str, "attention or mlp")
        if half not in ("attention", "mlp"):
            raise self.refuse(f"{where}.half", half, "attention or mlp")
        kind = Kind(
            half,
            self.of(record, where, "tokens", int, "a number"),
            self.of(record, where, "attended", int, "a number"),
            self.of(record, where, "shifted", bool, "true or false"),
        )
        grid = self.of(record, where, "grid", Mapping, "a mapping")
        if tuple(grid) != kind.names:
            raise self.refuse(f"{where}.grid", list(grid), f"the widths {', '.join(kind.names)}")
        axes = {name: self.rising(grid[name], f"{where}.grid.{name}") for name in kind.names}
        ns = self.times(record.get("ns"), f"{where}.ns", tuple(map(len, axes.values())))
        lines = {}
        for name, line in self.of(record, where, "lines", Mapping, "a mapping").items():
            inside = f"{where}.lines.{name}"
            if name not in axes:
                raise self.refuse(inside, name, f"one of {', '.join(axes)}")
            at = self.rising(self.of(line, inside, "at", list, "a list"), f"{inside}.at")
            lines[name] = at, self.times(line.get("ns"), f"{inside}.ns", (len(at),))
        return kind, HalfTimes(axes, ns, lines)

    def outside(self, record: Any, where: str) -> OutsideTimes:
        base = self.of(record, where, "base", list, "the stages' widths")
        for i, width in enumerate(base):
            if not isinstance(width, int) or width < 1:
                raise self.refuse(f"{where}.base[{i}]", width, "a width")
        pairs = self.of(record, where, "pairs", list, "a list")
        if not base or len(pairs) != max(1, len(base) - 1):
            raise self.refuse(f"{where}.pairs", len(pairs), f"{max(1, len(base) - 1)} of {len(base)} stages")
        found = []
        for i, pair in enumerate(pairs):
            inside = f"{where}.pairs[{i}]"
            a, b = (self.rising(self.of(pair, inside, n, list, "a list"), f"{inside}.{n}") for n in ("widths", "after"))
            found.append((a, b, self.times(pair.get("ns"), f"{inside}.ns", (len(a), len(b)))))
        return OutsideTimes(tuple(base), tuple(found))

    def rising(self, values: Any, where: str) -> tuple[int, ...]:
        whole = isinstance(values, list) and all(isinstance(v, int) and v > 0 for v in values)
        if not whole or not values or sorted(set(values)) != values:
            raise self.refuse(where, values, "whole numbers that rise")
        return tuple(values)

    def times(self, values: Any, where: str, shape: Place) -> Floats:
        try:
            found = np.array(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise self.refuse(where, values, f"numbers of shape {shape}") from None
        if found.shape != shape:
            raise self.refuse(where, found.shape, f"numbers of shape {shape}")
        if not np.isfinite(found).all() or (found <= 0).any():
            raise self.refuse(where, float(found.min()), "times above 0")
        return found


def network_facts(model: str, model_kwargs: Mapping[str, Any], supernet: Any) -> dict[str, Any]:
    """What a table says of the timm model it is of; supernet: over it, on whatever device."""
    return {
        "model": model,
        "model_kwargs": {name: str(value) for name, value in model_kwargs.items()},
        "class": type(supernet.backbone).__name__,
        "input_size": list(supernet.adapter.input_size),
        "stage_widths": list(supernet.identity().stage_widths),
    }


def grid_products(grid: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """The points of a grid, in the order of its ns."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
