"""Every way to a smaller network beside the others: one trained start, equal epochs, one recipe.

    pip install "torch-pruning>=1.6,<1.7"
    python benchmarks/evidence.py --output results/evidence --data-dir DIR --family vit --budgets 0.5 0.25 --seeds 0 1 2

The start is the family's nano network, trained here (--base-epochs; `retrain.py --train plain` with flips and crops),
or --checkpoint. From it every row goes --epochs epochs in all: what a search trains for (--search-epochs: gradient,
kcr, uvc) is taken off its second stage. That is the same for all (benchmarks/pruners.py): distillation from the frozen
start, at the best of --lr by held-out images, and so is the best epoch, the start among them. `by default` is the
exception: the two commands as a user types them, search and retrain, with their own rate. `control` is the start
trained on. `uniform` is AN by its factor, in the basis, nothing searched.

A row is one JSON in --output; what is finished is not run again. Then evidence.csv, evidence.md (mean and standard
deviation over the seeds) and evidence.png are written; --report does only that.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import importance, pruners
from benchmarks.runs import mean_words, resumed, trained_start
from nas.config import RetrainConfig, SearchConfig
from nas.machine.devices import autocast
from nas.machine.files import write_atomically, write_csv, write_json
from nas.machine.timing import images_per_second
from nas.networks.architecture import slices_of
from nas.pictures.figures import MARKERS, PALETTE, new_figure, tidy
from nas.pictures.run import save
from nas.runs.opened import open_folder
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from supernets.compact import cut
from supernets.supernet import Supernet

BASIS = "rotate error"  # of uniform networks
CALIBRATION = 2048


@dataclass(frozen=True)
class Way:
    """A search: the method of its space, its options. trains: for --search-epochs, which its second stage lacks."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = False


SEARCHES = {
    "random": Way("free", {"searcher": "random", "candidates": 64}),
    "importance": Way("free"),
    "evolution": Way("free", {"searcher": "evolution"}),
    "gradient": Way("dan", trains=True),
    "gradient, free": Way("free", {"searcher": "gradient"}, trains=True),
    "kcr": Way("kcr", trains=True),
    "uvc": Way("uvc", trains=True),
}
PRUNED = {"torch-pruning": "taylor", "torch-pruning, its default": "magnitude"}
ROW = "row.json"
ROWS = ("control", "uniform", *SEARCHES, "by default", *PRUNED)


class Evidence:
    """One family's rows on one data set."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.output / args.family
        self.common: dict[str, Any] = {"threads": args.threads, "workers": args.workers}
        if args.data_dir is not None:
            self.common |= {"dataset": "folder", "data_dir": args.data_dir}
        own = self.common | {"space": self.space("an")}
        self.start = args.checkpoint or trained_start(self.folder / "base", own, args.base_epochs)

    def space(self, method: str) -> str:
        return f"{self.args.family}-{method}-nano"

    def bench(self, epochs: int, folder: Path) -> pruners.Bench:
        """What second stages share, for so many epochs."""
        line = ["--space", self.space("an"), "--checkpoint", str(self.start), "--epochs", str(epochs)]
        line += ["--data-dir", str(self.args.data_dir)] if self.args.data_dir else []
        line += ["--threads", str(self.args.threads)] if self.args.threads else []
        options = pruners.option_parser().parse_args(line)
        return pruners.open_bench(options, folder)

    def search(self, row: str, way: Way, budget: float, seed: int) -> Path:
        """A finished search's folder."""
        folder = place(self.folder, row, budget, seed) / "search"
        if not (folder / "summary.json").exists():
            epochs = {"epochs": self.args.search_epochs} if way.trains else {}
            own = {"space": self.space(way.method), "checkpoint": self.start, "budget": budget, "seed": seed}
            run_search(SearchConfig(**self.common | own | epochs | dict(way.options) | resumed(folder)))
        return folder

    def uniform(self, bench: pruners.Bench, budget: float, seed: int) -> Any:
        """AN's network within the budget, cut in the start's basis."""
        folder = place(self.folder, "uniform", budget, seed) / "search"
        if not (folder / "arch.json").exists():
            own = {"space": self.space("an"), "searcher": "uniform", "budget": budget}
            run_search(SearchConfig(**self.common | own | {"checkpoint": self.start} | resumed(folder)))
        images = importance.drawn(bench.loaders, seed, CALIBRATION)
        supernet = importance.standing(Supernet(bench.large), BASIS, images)
        return cut(supernet.backbone, slices_of(load_architecture(folder), supernet.shapes))

    def by_default(self, bench: pruners.Bench, budget: float, seed: int) -> dict[str, Any]:
        """Both commands as they are typed."""
        found = self.search("importance", SEARCHES["importance"], budget, seed)
        folder = place(self.folder, "by default", budget, seed) / "retrain"
        if not (folder / "summary.json").exists():
            own = {"arch": found, "epochs": self.args.epochs, "seed": seed}
            run_retrain(RetrainConfig(**self.common | own | resumed(folder)))
        network = open_folder(folder, bench.device).compact
        assert network is not None
        top1 = json.loads((folder / "summary.json").read_text())["compact"]["top1"]
        return facts(bench, network) | {"cut": None, "trained": top1}

    def row(self, row: str, budget: float, seed: int) -> dict[str, Any]:
        """Measure one; `trained` is missing where there are no epochs."""
        way = SEARCHES.get(row)
        epochs = self.args.epochs - (self.args.search_epochs if way is not None and way.trains else 0)
        with tempfile.TemporaryDirectory() as folder:
            bench, began = self.bench(epochs, Path(folder)), time.perf_counter()
            if row == "by default":
                return self.by_default(bench, budget, seed)
            network = self.network(row, way, bench, budget, seed)
            found: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
            found |= facts(bench, network) | {"cut": pruners.top1(bench, network, bench.loaders.test)}
            if epochs > 0:
                contender = pruners.Contender(f"{row} {budget:g}", network)
                tries = [pruners.train(bench, contender, lr, seed) for lr in self.args.lr]
                found |= max(tries, key=lambda each: each["held_out"])
            return found

    def network(self, row: str, way: Way | None, bench: pruners.Bench, budget: float, seed: int) -> Any:
        """The row's network before its second stage."""
        if row == "control":
            return bench.large
        if row == "uniform":
            return self.uniform(bench, budget, seed)
        if way is not None:
            opened = open_folder(self.search(row, way, budget, seed), bench.device)
            if opened.compact is not None:
                return opened.compact
            assert opened.supernet is not None
            return cut(opened.supernet.backbone, opened.subnet)
        pruners.accumulate(bench.large, bench.loaders.calibration(seed), CALIBRATION)
        kind = pruners.STRONGEST if self.args.family in ("vit", "deit", "swin") else pruners.NEURONS
        network = pruners.within(bench, budget, kind, 2, PRUNED[row])
        if network is None:
            raise UserError(f"Torch-Pruning finds no network within {budget:g}")
        return network


def place(folder: Path, row: str, budget: float, seed: int) -> Path:
    """A row's folder."""
    return folder / f"{row.replace(', ', '-').replace(' ', '-')}-{budget:g}-{seed}"


def facts(bench: pruners.Bench, network: Any) -> dict[str, Any]:
    """Costs and speed of a network."""
    flops, precision = pruners.macs(network, bench.size), partial(autocast, bench.config, bench.device)
    found = {"gflops": flops / 1e9, "share": flops / bench.full, "params": sum(p.numel() for p in network.parameters())}
    for batch in (1, 32):
        both = {"it": network.eval(), "large": bench.large.eval()}
        speed = images_per_second(both, bench.size, batch, bench.device, precision)
        found[f"speed_{batch}"] = speed["it"] / speed["large"]
    return found


COLUMNS = {
    "share": ("FLOPs", ".3f"), "params": ("parameters", ",.0f"), "seconds": ("seconds", ".0f"),
    "cut": ("as cut", ".2f"), "trained": ("trained", ".2f"), "speed_1": ("speed, batch 1", ".2f"),
    "speed_32": ("speed, batch 32", ".2f"),
}  # fmt: skip


def report(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write the table as CSV and Markdown, and the picture; the Markdown."""
    write_csv(folder / "evidence.csv", rows)
    heads = ["row", "budget", "seeds", *(title for title, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    cases = dict.fromkeys((row["row"], row["budget"]) for row in rows)
    means: dict[str, list[tuple[float, float]]] = {}
    for name, budget in cases:
        own = [row for row in rows if (row["row"], row["budget"]) == (name, budget) and "failed" not in row]
        values = {c: [row[c] for row in own if row.get(c) is not None] for c in COLUMNS}
        cells = [mean_words(values[c], form, none="") for c, (_, form) in COLUMNS.items()]
        lines.append(f"| {' | '.join([name, budget, str(len(own)), *cells])} |")
        top1 = values["trained"] or values["cut"]
        if top1:
            means.setdefault(name, []).append((statistics.mean(values["share"]), statistics.mean(top1)))
    figure = new_figure(7.0, 4.6, folder.name)
    axes = figure.subplots()
    for i, (name, points) in enumerate(means.items()):
        style: dict[str, Any] = {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i // len(PALETTE) % len(MARKERS)],
        }
        axes.plot(*zip(*sorted(points), strict=True), label=name, lw=1.2, ms=5, **style)
    axes.legend(fontsize=7, frameon=False)
    tidy(axes, "FLOPs, a share of the start's", "top-1 (%)")
    save(figure, folder / "evidence.png")
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "evidence.md", lambda path: path.write_text(text))
    return text


def main() -> None:
    """Run what is left, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, help="default: the embedded digits")
    parser.add_argument("--family", default="vit")
    parser.add_argument("--checkpoint", type=Path, help="the trained start, of the family's nano network")
    parser.add_argument("--base-epochs", type=int, default=40)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--search-epochs", type=int, default=6)
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if not args.report:
        pruners.torch_pruning()  # before anything that takes time
        if args.search_epochs >= args.epochs > 0:
            raise UserError(f"--search-epochs {args.search_epochs}; expected fewer than --epochs {args.epochs}")
    evidence, rows = None if args.report else Evidence(args), []
    folder = args.output / args.family
    for seed in args.seeds:
        for row in args.rows:
            for budget in [1.0] if row == "control" else args.budgets:
                path = place(folder, row, budget, seed) / ROW
                if evidence is not None and not path.exists():
                    named: dict[str, Any] = {"row": row, "budget": f"{budget:g}", "seed": seed}
                    try:
                        named |= evidence.row(row, budget, seed)
                    except UserError as error:
                        named["failed"] = str(error)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, named)
                    print({name: value for name, value in named.items() if not name.startswith("speed")}, flush=True)
                rows += [json.loads(path.read_text())] if path.exists() else []
    print(report(folder, rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
