"""Methods beside each other at the same budgets, from the same starting weights, for the same epochs.

    python benchmarks/methods.py --output results/methods --runs dan:0.5 dan:0.25 joint:0.5 joint:0.25 kcr:0.75 \
        --seeds 0 1 2 --family swin --search-epochs 10 --retrain-epochs 20

A run is METHOD:BUDGET, with options of its own after further colons (kcr:0.75:eta_kc=0). Each is a search and a
retrain on the nano network of the family, on the digits or a folder of images (--data-dir), from scratch or from
--checkpoint. What is finished in --output is not run again, so that the work can be split and stopped. Prints the
top-1 of the compact network on the reported split, mean and standard deviation over the seeds; with --report it only
prints.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.runs import resumed
from nas.config import RetrainConfig, SearchConfig
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.errors import UserError

KC = "kc_normalised"


def one(args: argparse.Namespace, run: str, seed: int) -> None:
    """Search and retrain, unless they are there."""
    method, budget, *own = run.split(":")
    options: dict[str, Any] = {k: yaml.safe_load(v) for k, v in (pair.split("=") for pair in own)}
    folder = args.output / f"{run.replace(':', '-')}-{seed}"
    common = {"seed": seed, "threads": args.threads, "checkpoint": args.checkpoint, "workers": args.workers}
    common["amp"] = args.amp
    if args.data_dir is not None:
        common |= {"dataset": "folder", "data_dir": args.data_dir, "hflip": 0.5, "scale": (0.5, 1.0)}
    if args.batch_size is not None:
        common["batch_size"] = args.batch_size
    if not (folder / "search" / "arch.json").is_file():
        space = f"{args.family}-{method}-nano"
        config = SearchConfig(space=space, budget=float(budget), epochs=args.search_epochs, width=args.width, **common)
        config = SearchConfig(**vars(config) | options | resumed(folder / "search"))
        run_search(config)
    if not (folder / "retrain" / "summary.json").is_file():
        shared = {k: v for k, v in options.items() if k in ("eta_kc", "rho", "adjoined")}
        retrain: dict[str, Any] = {"arch": folder / "search", "epochs": args.retrain_epochs, "init": "supernet"}
        run_retrain(RetrainConfig(**common | {"checkpoint": None} | retrain | shared | resumed(folder / "retrain")))


def report(args: argparse.Namespace) -> None:
    """The table, of what is finished."""
    print(f"{'run':24} {'seeds':>5} {'FLOPs':>14} {'params':>7} {'compact top-1':>15} {'large top-1':>15} {'KC':>15}")
    for run in args.runs:
        rows, kc = [], []
        for seed in args.seeds:
            folder = args.output / f"{run.replace(':', '-')}-{seed}" / "retrain"
            if (folder / "summary.json").is_file():
                summary = json.loads((folder / "summary.json").read_text())
                rows.append({"large": summary.get("original")} | summary)  # as it was, where it was not trained
                lines = (folder / "log.csv").read_text().splitlines()
                last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
                kc += [float(last[KC])] if KC in last else []
        if not rows:
            print(f"{run:24}     0")
            continue
        share = [r["compact"]["gflops"] / r["large"]["gflops"] for r in rows]
        params = statistics.mean(r["compact"]["params"] / r["large"]["params"] for r in rows)
        print(
            f"{run:24} {len(rows):5} {min(share):6.3f}-{max(share):6.3f} {params:7.3f}"
            f" {spread([r['compact']['top1'] for r in rows])} {spread([r['large'].get('top1', 0.0) for r in rows])}"
            f" {spread(kc, 4) if kc else '':>15}"
        )


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):7.{digits}f} +- {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["dan:0.5", "joint:0.5", "kcr:0.75", "dan:0.25", "joint:0.25"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--family", default="swin")
    parser.add_argument("--width", default="stream", choices=["stream", "inner"])
    parser.add_argument("--search-epochs", type=int, default=10)
    parser.add_argument("--retrain-epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if not args.report:
        for seed in args.seeds:
            for run in args.runs:
                try:
                    one(args, run, seed)
                except UserError as error:
                    print(f"{run}, seed {seed}: {error}", flush=True)
    report(args)


if __name__ == "__main__":
    main()
