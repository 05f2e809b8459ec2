"""The compact network against the large one trained alone as long from the same start, on the embedded digits.

    python benchmarks/digits.py --seeds 0 1 2 3 4

Per seed: search, retrain (search and retrain epochs), and the large network alone for as many epochs as both
stages together. Top-1 on the fifth of the digits that no choice has seen; mean and spread over the seeds.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nas.config import RetrainConfig, SearchConfig
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.registry import get_space


def one_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """Top-1 of compact, adjoined large, and the large network trained alone."""
    own, common = get_space(args.space), {"seed": seed, "threads": args.threads}
    epochs = [args.search_epochs or own.search["epochs"], args.retrain_epochs or own.retrain["epochs"]]
    first = SearchConfig(space=args.space, budget=args.budget, epochs=epochs[0], output=folder / "search", **common)
    second = RetrainConfig(arch=run_search(first), epochs=epochs[1], output=folder / "retrain", **common)
    plain = replace(second, train="plain", init="base", epochs=sum(epochs), output=folder / "alone")
    retrain, alone = run_retrain(second), run_retrain(plain)
    adjoined, single = (json.loads((run / "summary.json").read_text()) for run in (retrain, alone))
    return {
        "compact": adjoined["compact"]["top1"],
        "large, adjoined": adjoined["large"]["top1"],
        "large, alone": single["large"]["top1"],
        "FLOPs": adjoined["compact"]["gflops"] / adjoined["large"]["gflops"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="swin-dan-nano")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--search-epochs", type=int, help="the space's own by default, as the next")
    parser.add_argument("--retrain-epochs", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with TemporaryDirectory() as folder:
            rows.append(one_seed(args, seed, Path(folder)))
        print(f"seed {seed}: {rows[-1]}", flush=True)
    print(f"{args.space}, budget {args.budget}, {len(rows)} seeds, float32, top-1 % on the test fifth")
    for name in rows[0]:
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:16} {statistics.mean(values):7.3f} +- {spread:.3f}")
    gaps = [row["compact"] - row["large, alone"] for row in rows]
    print(f"compact - alone  {statistics.mean(gaps):+7.3f} +- {statistics.stdev(gaps) if len(gaps) > 1 else 0.0:.3f}")


if __name__ == "__main__":
    main()
