"""What each part of a search by importance brings: top-1 without training, and the seconds, part added to part.

    python benchmarks/parts.py --space vit-free-nano --checkpoint FILE --data-dir DIR --budget 0.5 0.25 --seeds 0 1 2

From plain pruning in an order by Taylor to the default, and further: a rotated basis, the refit, scores by error,
measured candidates, more images. Every row is a search of its own with the options that it prints; it is cut and, where
it is refitted, refitted. Top-1 on the validation split, mean and spread over the seeds.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nas.config import SearchConfig
from nas.machine.files import write_csv
from nas.stages.search import run_search
from search_spaces.errors import UserError

SECONDS = ("basis", "candidates", "refit")
FIRST_ORDER: dict[str, Any] = dict(score="taylor", importance="taylor", decide="score")
PARTS: dict[str, dict[str, Any]] = {
    "order by Taylor, cut": FIRST_ORDER | dict(basis="order", refit_images=0),
    "+ rotated basis": FIRST_ORDER | dict(basis="rotate", refit_images=0),
    "+ refit": FIRST_ORDER | dict(basis="rotate"),
    "+ scores by error": dict(decide="score"),
    "+ candidates": dict(evals=12),
    "+ three times the candidates": dict(evals=36),
    "+ four times the images": dict(evals=36, calibration_images=8192, refit_images=8192),
}


def row_of(config: SearchConfig, part: str, folder: Path) -> dict[str, Any]:
    """A search, and what its network is worth."""
    run = run_search(replace(config, output=folder, **PARTS[part]))
    found = json.loads((run / "summary.json").read_text())
    facts: dict[str, Any] = {"part": part, "budget": config.budget, "seed": config.seed}
    networks = {name: found[name]["top1"] for name in ("original", "compact")}
    share = found["compact"]["gflops"] / found["original"]["gflops"]
    return facts | networks | {"share": share} | dict(found["seconds"])


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):6.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def option_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="vit-free-nano")
    parser.add_argument("--model")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the trained network")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.5])
    parser.add_argument("--parts", type=int, nargs="+", default=list(range(len(PARTS))), help="by their numbers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the images and their order")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="the rows, as .csv")
    return parser


def main() -> None:
    """Search, measure, print."""
    options = option_parser().parse_args()
    rows: list[dict[str, Any]] = []
    names = [list(PARTS)[number] for number in options.parts]
    with tempfile.TemporaryDirectory() as folder:
        for budget in options.budget:
            for part in names:
                for seed in options.seeds:
                    config = SearchConfig(
                        space=options.space, model=options.model, model_kwargs=tuple(options.model_kwargs),
                        checkpoint=options.checkpoint, data_dir=options.data_dir, workers=0, threads=options.threads,
                        dataset="folder" if options.data_dir else None, budget=budget, seed=seed,
                    )  # fmt: skip
                    rows.append(row_of(config, part, Path(folder) / str(len(rows))))
                    if options.output:
                        write_csv(options.output, rows)
    print(f"original {rows[0]['original']:.2f}; seconds on the right")
    print(f"{'':32} {'budget':>6} {'top-1':>14}" + "".join(f"{name:>11}" for name in SECONDS))
    for budget in options.budget:
        for part in names:
            own = [row for row in rows if (row["budget"], row["part"]) == (budget, part)]
            compact = spread([row["compact"] for row in own])
            seconds = [statistics.mean(row[name] for row in own) for name in SECONDS]
            print(f"{part:32} {budget:6g} {compact:>14}" + "".join(f"{s:11.1f}" for s in seconds))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
