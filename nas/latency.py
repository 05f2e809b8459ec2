"""Time the parts of a network's compact ones on this device, for `--price latency` (docs/latency.md).

    python -m nas.latency --space vit-free --model vit_small_patch16_224 --threads 2 --out latency.json

needs torch and timm only (--runtime onnxruntime: onnx, onnxscript and onnxruntime, too). It goes on where it was
stopped; random weights: speed does not depend on them.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.errors import UserError

if TYPE_CHECKING:
    import torch

    from nas.machine.runtimes import Run
    from nas.prices.latency_table import HalfTimes, LatencyTable, OutsideTimes, Setting
    from supernets.chains import Kind, Parts

GROUP = {"eager": 12, "compiled": 6, "onnxruntime": 12}  # points that are timed in turn
LENGTH = 4  # halves of a chain
# Seconds of a sample. A CPU's is one call: its caches hold the weights of what ran before, as in a network.
AT_LEAST = {"cpu": 0.0, "cuda": 0.005}
PASSES = {"eager": 3, "compiled": 1, "onnxruntime": 1}  # over all points, in another order and company each time


Done = dict[str, list[tuple[float, float, float]]]


@dataclass(frozen=True)
class Point:
    """What is timed at once: a chain of halves at some widths, or a network without its blocks at stage widths."""

    kind: "Kind | None"
    widths: tuple[tuple[str, int], ...]
    rotated: bool = False

    def key(self) -> str:
        """Its name in the file of an unfinished table."""
        words = " ".join(f"{name} {value}" for name, value in self.widths)
        if self.kind is None:
            return f"{'rotated' if self.rotated else 'outside'}: {words}"
        return f"{self.kind.words()}: {words}"


SHARES = {  # of the whole, beside the least and the whole: of a fine grid, of a coarse one
    "stream": ((1 / 4, 1 / 2, 3 / 4), (1 / 4, 1 / 2)),
    "heads": ((1 / 2,), (1 / 2,)),
    "qk": ((1 / 4, 1 / 2), (1 / 2,)),
    "v": ((1 / 4, 1 / 2), (1 / 2,)),
    "hidden": ((1 / 8, 1 / 4, 1 / 2), (1 / 4, 1 / 2)),
}


def values_of(name: str, whole: int, unit: int = 1, fine: bool = True) -> tuple[int, ...]:
    """The grid of one width: the least of free spaces and shares of the whole, multiples of 8 where it is wide."""
    step = 8 if whole >= 32 and name != "heads" else 1
    least = {"stream": step * -(-whole // (4 * step)), "hidden": step * max(1, round(whole / 32 / step))}.get(
        name, step
    )
    found = {min(whole, max(least, step * round(share * whole / step))) for share in SHARES[name][not fine]} | {least}
    return tuple(sorted({max(unit, value - value % unit) for value in found} | {whole}))


def line_of(name: str, whole: int, unit: int = 1) -> tuple[int, ...]:
    """Every width that a space may have, or one in a few of many."""
    step = 8 if whole >= 32 and name != "heads" else 1
    least = values_of(name, whole, unit)[0]
    most = {"hidden": 48, "stream": 48}.get(name, 64)
    step *= -(-(whole - least) // (step * most)) or 1
    values = {*range(least, whole + 1, step), whole} | set(values_of(name, whole, unit))
    return tuple(sorted(value for value in values if value % unit == 0 or value == whole))


def unit_of(name: str, shape: Any) -> int:
    """Channels of a width that stay together."""
    return int(shape.qk_unit) if name == "qk" else 1


def grid_of(parts: "Parts", kind: "Kind", fine: bool) -> dict[str, tuple[int, ...]]:
    """The grid of a kind of half; q, k and v on the same values where heads are as wide in both."""
    from supernets.chains import widths_of

    shape = parts.shape(kind)
    return {n: values_of(n, whole, unit_of(n, shape), fine) for n, whole in widths_of(kind, shape).items()}


def lines_of(parts: "Parts", kind: "Kind") -> dict[str, tuple[int, ...]]:
    """The widths along which each of a kind's is timed alone."""
    from supernets.chains import widths_of

    shape = parts.shape(kind)
    return {n: line_of(n, whole, unit_of(n, shape)) for n, whole in widths_of(kind, shape).items()}


def stage_grids(base: Sequence[int], rotated: bool, fine: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each pair of neighbouring stages the widths that are timed; of one stage alone its own.

    Where a stem ends in a layer, all but the whole width has it: the last one before that is timed, too.
    """
    step = [8 if width >= 32 else 1 for width in base]
    grids = [set(values_of("stream", width, fine=fine)) for width in base]
    if fine and len(base) == 1:
        grids[0] |= set(line_of("stream", base[0])[::4])
    if rotated:
        grids[0].add(base[0] - step[0])
    found = [tuple(sorted(grid)) for grid in grids]
    return list(pairwise(found)) if len(base) > 1 else [(found[0], (base[0],))]


def points_of(parts: "Parts", fine: bool) -> list[Point]:
    """All that is timed, each once."""
    found: dict[Point, None] = {}
    for kind in parts.blocks:
        grid = grid_of(parts, kind, fine)
        for values in product(*grid.values()):
            found[Point(kind, tuple(zip(grid, values, strict=True)))] = None
        if fine:
            largest = {name: values[-1] for name, values in grid.items()}
            for name, values in lines_of(parts, kind).items():
                for value in values:
                    found[Point(kind, tuple((largest | {name: value}).items()))] = None
    for rotated in (False, True) if parts.rotated is not None else (False,):
        for _, widths in outside_points(parts, rotated, fine):
            found[outside_point(widths, rotated)] = None
    return list(found)


def outside_points(parts: "Parts", rotated: bool, fine: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The pair of stages that each is of, and the stage widths."""
    base = base_of(parts)
    for pair, (first, second) in enumerate(stage_grids(base, rotated, fine)):
        for width, after in product(first, second):
            if len(base) == 1:
                yield pair, (width,)
            else:
                yield pair, (*base[:pair], width, after, *base[pair + 2 :])


def outside_point(widths: Sequence[int], rotated: bool) -> Point:
    """A network without blocks."""
    return Point(None, tuple((f"stage {stage}", width) for stage, width in enumerate(widths)), rotated)


def base_of(parts: "Parts") -> tuple[int, ...]:
    """The whole widths of the stages."""
    return parts.supernet.identity().stage_widths


class Timing:
    """What is timed, on which device, at which size.

    done: by a point's key of every pass the nanoseconds, of one half, their spread (interquartile range over median),
    and what the reference took in the same rounds.
    """

    def __init__(self, parts: "Parts", setting: "Setting", device: "torch.device", rounds: int) -> None:
        import torch

        from nas.machine.runtimes import PRECISIONS
        from supernets.chains import widths_of

        self.parts, self.setting, self.device, self.rounds = parts, setting, device, rounds
        self.images = torch.randn(setting.batch_size, *parts.input_size)
        self.dtype = PRECISIONS[setting.precision]
        self.done: Done = {}
        kind = next(kind for kind in reversed(parts.blocks) if kind.half == "mlp")
        self.reference = Point(kind, tuple(widths_of(kind, parts.shape(kind)).items()))

    def run_of(self, point: Point) -> "tuple[Run, torch.Tensor, int]":
        """What is called, with what, and how many halves it is."""
        from nas.machine.runtimes import made_to_run

        if point.kind is None:
            network: Any = self.parts.without_blocks([width for _, width in point.widths], point.rotated)
            x, halves = self.images, 1
        else:
            network, x = self.parts.chain(point.kind, dict(point.widths), LENGTH, self.images)
            network.given = {name: self._moved(value) for name, value in network.given.items()}
            halves = LENGTH
        network, x = network.to(self.device, self.dtype), self._moved(x)
        return made_to_run(network, x, self.setting.runtime, self.setting.threads), x, halves

    def _moved(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def group(self, points: Sequence[Point]) -> None:
        """Time some points in turn, and the reference with them, once more."""
        import torch

        from nas.machine.timing import in_turn

        if self.setting.runtime == "compiled":
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
        asked = {point.key() for point in points}
        made = {point.key(): self.run_of(point) for point in dict.fromkeys((self.reference, *points))}
        calls = {key: lambda run=run, x=x: run(x) for key, (run, x, _) in made.items()}
        seconds = in_turn(calls, self.device, self.rounds, AT_LEAST[self.device.type])
        ns = {key: [1e9 * each / made[key][2] for each in of] for key, of in seconds.items()}
        beside = statistics.median(ns[self.reference.key()])
        for key, each in ns.items():
            median = statistics.median(each)
            low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (median,) * 3
            if key in asked:
                self.done.setdefault(key, []).append((median, (high - low) / median, beside))

    def settled(self) -> dict[str, float]:
        """Nanoseconds by key, as if every group had seen the reference take what it took in the middle of them.

        The median of all passes.
        """
        middle = statistics.median(beside for passes in self.done.values() for *_, beside in passes)
        done = self.done.items()
        return {key: statistics.median(ns * middle / beside for ns, _, beside in passes) for key, passes in done}

    def spreads(self) -> dict[str, float]:
        """Of every point, the larger of its rounds' and of its passes'."""
        found = {}
        for key, passes in self.done.items():
            medians = [ns / beside for ns, _, beside in passes]
            found[key] = max(max(medians) / min(medians) - 1, min(spread for _, spread, _ in passes))
        return found


def half_times(parts: "Parts", kind: "Kind", ns: Mapping[str, float], fine: bool) -> "HalfTimes":
    """A kind's times out of all points'."""
    import numpy as np

    from nas.prices.latency_table import HalfTimes, grid_products

    grid = grid_of(parts, kind, fine)
    largest = {name: values[-1] for name, values in grid.items()}

    def at(widths: Mapping[str, int]) -> float:
        return ns[Point(kind, tuple(widths.items())).key()]

    table = np.array([at(widths) for widths in grid_products(grid)]).reshape([len(v) for v in grid.values()])
    lines = {
        name: (values, np.array([at(largest | {name: value}) for value in values]))
        for name, values in (lines_of(parts, kind) if fine else {}).items()
    }
    return HalfTimes(grid, table, lines)


def outside_times(parts: "Parts", rotated: bool, ns: Mapping[str, float], fine: bool) -> "OutsideTimes":
    """The network without blocks out of all points."""
    import numpy as np

    from nas.prices.latency_table import OutsideTimes

    base, found = base_of(parts), []
    grids = stage_grids(base, rotated, fine)
    by_pair: list[list[float]] = [[] for _ in grids]
    for pair, widths in outside_points(parts, rotated, fine):
        by_pair[pair].append(ns[outside_point(widths, rotated).key()])
    for (first, second), values in zip(grids, by_pair, strict=True):
        found.append((first, second, np.array(values).reshape(len(first), len(second))))
    return OutsideTimes(base, tuple(found))


def setting_of(options: argparse.Namespace, device: "torch.device") -> "Setting":
    """What is asked for. UserError where it does not go together."""
    import torch

    from nas.machine.devices import device_name
    from nas.machine.runtimes import check_packages
    from nas.prices.latency_table import Setting

    if options.runtime == "onnxruntime":
        check_packages()
        if device.type != "cpu" or options.precision != "fp32":
            raise UserError("--runtime onnxruntime is timed on the CPU in fp32; leave --device and --precision out")
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return Setting(device_name(device), device.type, options.runtime, options.precision, options.batch_size, threads)


class Unfinished:
    """The points that are timed already, beside the file that is to be."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path.with_name(f"{path.name}.part"), facts

    def read(self) -> "Done":
        """UserError where it is of another table."""
        if not self.path.is_file():
            return {}
        try:
            record = json.loads(self.path.read_text())
            facts, done = record["facts"], {key: [tuple(each) for each in of] for key, of in record["done"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path} is no unfinished table; remove it, or give another --out") from None
        for name, value in self.facts.items():
            if facts.get(name) != value:
                raise UserError(
                    f"{self.path} was begun with {name} {facts.get(name)}, this is {value}; remove it to begin anew, or"
                    " give another --out"
                )
        return done

    def write(self, done: "Done") -> None:
        """All of it, atomically."""
        from nas.machine.files import write_json

        write_json(self.path, {"facts": self.facts, "done": done})


class Progress:
    """How far it is and what time is left, on stderr: in place on a terminal, otherwise a line now and then."""

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before, self.start, self.said = total, before, time.monotonic(), 0.0

    def show(self, done: int) -> None:
        """done: of the total."""
        passed = time.monotonic() - self.start
        left = passed / max(done - self.before, 1) * (self.total - done)
        time_left = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        words = f"{done} of {self.total} timings, {time_left} left"
        if sys.stderr.isatty():
            print(f"\r{words}   ", end="\n" if done == self.total else "", file=sys.stderr, flush=True)
        elif passed - self.said > 30 or done == self.total:
            self.said = passed
            print(words, file=sys.stderr, flush=True)


def model_of(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The timm model, by its own name or the space's."""
    from nas.networks.key_values import parse_key_values
    from search_spaces.registry import get_space

    given = parse_key_values(options.model_kwargs)
    space = get_space(options.space) if options.space else None
    if space is None and options.model is None:
        raise UserError("give --space, a search space, or --model, a timm model; or both")
    if space is None or options.model is not None:
        return options.model, given
    return space.model, dict(space.model_kwargs) | given


def run_latency(options: argparse.Namespace) -> "LatencyTable":
    """Time everything, write the table, return it."""
    import timm
    import torch

    from nas.machine.devices import pick_device
    from nas.machine.files import write_json
    from nas.machine.options import MachineOptions
    from nas.networks.backbone import build, check_family
    from nas.prices.latency_table import NOISY, LatencyTable, network_facts
    from search_spaces.registry import get_space
    from supernets.chains import Parts

    if min(options.batch_size, options.rounds) < 1:
        raise UserError("--batch-size and --rounds: expected at least 1")
    if options.out.exists():
        raise UserError(f"--out {options.out} is there already; remove it, or give another")
    device = pick_device(MachineOptions(device=options.device, threads=options.threads))
    setting, (model, kwargs) = setting_of(options, device), model_of(options)
    stairs = device.type == "cuda" and options.runtime == "eager"  # elsewhere lines found nothing, or are dear
    fine = stairs if options.grid is None else options.grid == "fine"
    backbone = build(model, kwargs, num_classes=options.num_classes)
    if options.space:
        check_family(backbone, get_space(options.space).family, model)
    parts = Parts(backbone)
    network = network_facts(model, kwargs, parts.supernet)
    points = points_of(parts, fine)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    facts = {"network": network, "setting": asdict(setting), "versions": versions, "rounds": options.rounds}
    unfinished = Unfinished(options.out, facts | {"grid": "fine" if fine else "coarse"})
    timing = Timing(parts, setting, device, options.rounds)
    timing.done = unfinished.read()
    passes, total = PASSES[options.runtime], PASSES[options.runtime] * len(points)
    print(f"{model}: {len(points)} points on {setting.words()}")
    before = sum(map(len, timing.done.values()))
    if before:
        print(f"goes on after {before} of {total} timings ({unfinished.path})")
    progress, size = Progress(total, before), GROUP[options.runtime]
    for turn in range(passes):
        left = [point for point in points if len(timing.done.get(point.key(), ())) <= turn]
        random.Random(turn).shuffle(left)  # what drifts over minutes is noise then, and no slope
        for first in range(0, len(left), size):
            timing.group(left[first : first + size])
            unfinished.write(timing.done)
            progress.show(sum(map(len, timing.done.values())))
    ns, spread = timing.settled(), timing.spreads()
    spreads = sorted(spread[point.key()] for point in points)
    table = LatencyTable(
        setting=setting,
        network=network,
        halves={kind: half_times(parts, kind, ns, fine) for kind in parts.blocks},
        outside=outside_times(parts, False, ns, fine),
        rotated=outside_times(parts, True, ns, fine) if parts.rotated is not None else None,
        spread=(statistics.median(spreads), spreads[-1]),
        noisy=sum(spread > NOISY for spread in spreads),
        points=len(points),
        versions=versions,
        path=options.out,
    )
    write_json(options.out, table.record())
    os.unlink(unfinished.path)
    print(f"{options.out}: spread between rounds {table.spread[0]:.1%} (median), up to {table.spread[1]:.0%}")
    if table.noise():
        print(table.noise())
    return table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nas.latency", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--space", help="a search space, as of search.py: its family, and its model unless --model names one")
    add("--model", help="a timm model")
    add("--model-kwargs", nargs="+", default=(), metavar="KEY=VALUE", help="constructor arguments of the timm model")
    add("--num-classes", type=int, default=1000, help="of the classifier, whose time hardly depends on them (1000)")
    add("--out", type=Path, required=True, help="the table that is written")
    add("--batch-size", type=int, default=1, help="images at once (1)")
    add("--device", help="cpu, cuda or cuda:N; by default cuda where there is one")
    add("--threads", type=int, help="of the CPU; by default torch's own number")
    add("--runtime", choices=tuple(GROUP), default="eager")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and images")
    add("--grid", choices=("coarse", "fine"), help="fine: every width along a line, too (default: on CUDA, eager)")
    add("--rounds", type=int, default=7, help="samples of each point in a pass, of which the median counts (7)")
    return parser


def main() -> None:
    from nas.failing import errors

    command = parser()
    options = command.parse_args()
    with errors(command.prog):
        run_latency(options)


if __name__ == "__main__":
    main()
