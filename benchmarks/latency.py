"""Does a table of latencies foretell what architectures take? Random ones, predicted and timed whole.

    python -m nas.latency --space vit-free --model vit_small_patch16_224 --threads 2 --out vit-s.json
    python benchmarks/latency.py --table vit-s.json --space vit-free --model vit_small_patch16_224 --networks 40

On the table's own device, runtime, threads, precision and batch size. Of a table with lines (--grid fine) both readings
are shown: `lines`, as the search reads it, and `grid`, straight between the grid's points. Writes latency.csv and
latency.png (milliseconds against FLOPs) into --output. Random weights: speed does not depend on them.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from nas.machine.files import write_csv
from nas.machine.runtimes import PRECISIONS, made_to_run
from nas.machine.timing import in_turn
from nas.networks.key_values import parse_key_values
from nas.pictures.figures import PALETTE, new_figure, tidy
from nas.pictures.run import save
from nas.prices.latency import Latency
from nas.prices.latency_table import LatencyTable, read_table
from nas.prices.whole import cannot_time
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import get_space
from search_spaces.slices import NetworkSlice, network_slice
from search_spaces.space import SearchSpace, make_space
from supernets.compact import cut
from supernets.supernet import Supernet

Floats = NDArray[np.float64]
TOGETHER = 6  # networks that are timed in turn
PASSES = 3


def drawn(space: SearchSpace, seed: int) -> NetworkSlice:
    """An architecture: every width at random above a share of the whole that is drawn first, so that all sizes come."""
    rng = random.Random(seed)
    least, widths, picks = rng.choice((0.0, 0.25, 0.5, 0.75)), dict[int, Any](), []
    for shape, choices in zip(space.shapes, space.candidates, strict=True):
        own = {name: rng.choice([c for c in options if c >= least * max(options)]) for name, options in choices.items()}
        for name in space.method.stage_choices:
            own[name] = widths.setdefault(shape.stage, own[name])
        picks.append(own)
    return network_slice(space.shapes, space.block_slices(picks))


def readings(table: LatencyTable) -> dict[str, LatencyTable]:
    """The table as the search reads it, and without its lines."""
    plain = {kind: replace(times, lines={}) for kind, times in table.halves.items()}
    lines = any(times.lines for times in table.halves.values())
    return ({"lines": table} if lines else {}) | {"grid": replace(table, halves=plain)}


def ranks(values: Floats) -> Floats:
    """Of distinct numbers."""
    return np.argsort(np.argsort(values)).astype(np.float64)


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def timed(
    supernet: Supernet, subnets: Sequence[NetworkSlice], table: LatencyTable, rounds: int
) -> tuple[Floats, list[float]]:
    """Milliseconds of each compact network; of the backbone, which is timed with every group of them.

    PASSES times in other company, as if the backbone had taken in each group what it took in the middle of them: what
    drifts is taken out. The median of the passes.
    """
    setting = table.setting
    images = torch.randn(setting.batch_size, *supernet.adapter.input_size)
    images = images.to(setting.device_type, PRECISIONS[setting.precision])

    def made(network: nn.Module) -> Callable[[], Any]:
        network = network.eval().to(images.device, images.dtype)
        run = made_to_run(network, images, setting.runtime, setting.threads)
        return lambda: run(images)

    backbone = made(supernet.backbone)
    calls = [made(cut(supernet.backbone, subnet)) for subnet in subnets]
    shares: list[list[float]] = [[] for _ in subnets]
    whole: list[float] = []
    for turn in range(PASSES):
        order = random.Random(turn).sample(range(len(subnets)), len(subnets))
        for first in range(0, len(order), TOGETHER):
            group = {str(i): calls[i] for i in order[first : first + TOGETHER]}
            seconds = in_turn(group | {"backbone": backbone}, images.device, rounds, 0.0)
            ms = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
            whole.append(ms["backbone"])
            for name in group:
                shares[int(name)].append(ms[name] / ms["backbone"])
    return np.array([statistics.median(each) for each in shares]) * statistics.median(whole), whole


def picture(gflops: Floats, measured: Floats, predicted: Floats, words: str, title: str) -> Any:
    """Milliseconds against FLOPs, measured and predicted."""
    figure = new_figure(6.4, 4.6, title)
    axes = figure.subplots()
    axes.plot(gflops, measured, "o", color=PALETTE[0], ms=6, label="measured")
    axes.plot(gflops, predicted, "x", color=PALETTE[1], ms=6, label="by the table")
    line = [0.0, float(gflops.max())]
    whole = measured[0] / gflops[0]  # the backbone comes first
    axes.plot(line, [whole * x for x in line], ":", color="#444444", lw=1.2, label="as FLOPs would have it")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    tidy(axes, "GFLOPs (MACs)", f"ms, {words}")
    axes.legend(fontsize=8, frameon=False)
    return figure


def row(name: str, values: Floats, measured: Floats) -> str:
    """How far off a prediction is, in words."""
    errors = values / measured - 1
    mean, worst, bias = float(abs(errors).mean()), float(abs(errors).max()), float(errors.mean())
    return (
        f"{name:8} mean error {mean:6.1%}  worst {worst:6.1%}  bias {bias:+6.1%}, without it"
        f" {float(abs(errors - bias).mean()):6.1%}  Spearman {spearman(values, measured):.4f}"
    )


def measured_rows(columns: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """A row for each network."""
    return [
        {"network": i} | {name: float(f"{each[i]:.6g}") for name, each in columns.items()}
        for i in range(len(columns["gflops"]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--space", default="vit-free")
    parser.add_argument("--model")
    parser.add_argument("--model-kwargs", nargs="+", default=(), metavar="KEY=VALUE")
    parser.add_argument("--networks", type=int, default=40, help="beside the backbone itself")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--granularity", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/latency"))
    args = parser.parse_args()
    table, asked = read_table(args.table), get_space(args.space)
    against = cannot_time(table.setting)
    if against:
        raise UserError(against)
    kwargs = parse_key_values(args.model_kwargs) | ({} if args.model else dict(asked.model_kwargs))
    torch.manual_seed(0)
    if table.setting.threads is not None:
        torch.set_num_threads(table.setting.threads)
    supernet = Supernet(timm.create_model(args.model or asked.model, **kwargs)).eval()
    space = make_space(asked.name, asked.method, Settings(granularity=args.granularity), supernet.shapes)
    Latency(table).check(space, supernet)
    subnets = [supernet.identity(), *(drawn(space, args.seed + i) for i in range(args.networks))]
    columns = {"gflops": np.array([supernet.flops(subnet) / 1e9 for subnet in subnets])}
    columns |= {
        name: np.array([Latency(t).network(supernet.shapes, supernet.adapter.costs, s) / 1e6 for s in subnets])
        for name, t in readings(table).items()
    }
    columns["ms"], backbone = timed(supernet, subnets, table, args.rounds)
    measured = columns["ms"]
    print(f"{args.model or asked.model}, {len(subnets)} networks, {table.setting.words()}")
    said = Latency(table).network(supernet.shapes, supernet.adapter.costs, subnets[0]) / 1e6
    print(f"the backbone, timed with every {TOGETHER}: {min(backbone):.4g} to {max(backbone):.4g} ms, table {said:.4g}")
    names = [name for name in columns if name not in ("gflops", "ms")]
    for name in names:
        print(row(name, columns[name], measured))
    per = measured / columns["gflops"]
    words = f"ms per GFLOP {per.min():.4g} to {per.max():.4g}"
    print(f"FLOPs    Spearman {spearman(columns['gflops'], measured):.4f}, {words}")
    write_csv(args.output / "latency.csv", measured_rows(columns))
    title = f"{args.model or asked.model}: {len(subnets)} compact networks"
    figure = picture(columns["gflops"], measured, columns[names[0]], table.setting.words(), title)
    for path in save(figure, args.output / "latency.png"):
        print(path)


if __name__ == "__main__":
    main()
