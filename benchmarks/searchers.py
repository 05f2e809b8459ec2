"""Searchers beside each other: the same trained weights and budgets, cut at once and after the same retrain.

    python benchmarks/searchers.py --output results/searchers --checkpoint FILE --data-dir DIR --space vit-free-nano \
        --budgets 0.5 0.25 --seeds 0 1 2 --retrain-epochs 20

A run is SEARCHER with options of its own after colons (random:candidates=64, gradient:epochs=10:start=uniform); the
default ones are uniform, random, importance and evolution. Each is a search on the nano network of the space and, with
--retrain-epochs, a retrain. What is finished in --output is not run again. Prints, over the seeds, mean and standard
deviation of the top-1 on the reported split as cut and after the retrain, and the seconds that the search took; with
--report it only prints.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.runs import mean_words
from nas.config import RetrainConfig, SearchConfig
from nas.machine.files import write_json
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search

RUNS = ("uniform", "random:candidates=64", "importance", "evolution")
SECONDS = "seconds.json"  # of the search as a whole


def one(args: argparse.Namespace, run: str, budget: float, seed: int) -> None:
    """Search and retrain, unless they are there."""
    searcher, *own = run.split(":")
    options: dict[str, Any] = {k: yaml.safe_load(v) for k, v in (pair.split("=") for pair in own)}
    folder = place(args, run, budget, seed)
    common: dict[str, Any] = {"seed": seed, "threads": args.threads, "workers": args.workers, "device": args.device}
    if args.data_dir is not None:
        common |= {"dataset": "folder", "data_dir": args.data_dir}
    if not (folder / SECONDS).exists():
        began, resume = time.perf_counter(), (folder / "search" / "config.yaml").exists()
        own_model = {"model_kwargs": tuple(args.model_kwargs), "checkpoint": args.checkpoint}
        own_search = {"space": args.space, "searcher": searcher, "budget": budget, "resume": resume}
        run_search(SearchConfig(output=folder / "search", **common | own_model | own_search | options))
        write_json(folder / SECONDS, None if resume else round(time.perf_counter() - began, 1))
    if args.retrain_epochs and not (folder / "retrain" / "summary.json").exists():
        own_retrain = {"epochs": args.retrain_epochs, "resume": (folder / "retrain" / "config.yaml").exists()}
        run_retrain(RetrainConfig(arch=folder / "search", output=folder / "retrain", **common | own_retrain))


def place(args: argparse.Namespace, run: str, budget: float, seed: int) -> Path:
    """The folder of a run."""
    return Path(args.output) / f"{run.replace(':', '-')}-{budget:g}-{seed}"


def row(args: argparse.Namespace, run: str, budget: float) -> list[str]:
    """What is finished of a run, over the seeds; a search that was resumed has no seconds."""
    found: dict[str, list[float]] = {"cut": [], "retrain": [], "seconds": []}
    for folder in (place(args, run, budget, seed) for seed in args.seeds):
        for stage, name in (("search", "cut"), ("retrain", "retrain")):
            path = folder / stage / "summary.json"
            if path.exists():
                summary = json.loads(path.read_text())
                found[name].append((summary.get("compact") or summary["subnet"])["top1"])
        if (folder / SECONDS).exists():
            seconds = json.loads((folder / SECONDS).read_text())
            found["seconds"] += [] if seconds is None else [seconds]
    return [run, f"{budget:g}", *(mean_words(found[name]) for name in found)]


def main() -> None:
    """Run what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--space", default="vit-free-nano")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="SEARCHER[:OPTION=VALUE…]")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--retrain-epochs", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    cases = [(run, budget) for run in args.runs for budget in args.budgets]
    if not args.report:
        for seed in args.seeds:
            for run, budget in cases:
                one(args, run, budget, seed)
    print("| searcher | budget | top-1 as cut | top-1 retrained | seconds |\n|---|---:|---:|---:|---:|")
    for run, budget in cases:
        print("| " + " | ".join(row(args, run, budget)) + " |")


if __name__ == "__main__":
    main()
