"""Small networks of the newer families, trained here and compressed: free widths beside Torch-Pruning.

    pip install "torch-pruning>=1.6,<1.7"
    python benchmarks/families.py --output results/families --data-dir DIR --networks dinov3 siglip swinv2

Each network is trained from scratch at 32 px (--epochs, of the nano spaces' recipe with flips and crops), searched as
cut by `<family>-free-nano` with its defaults at every budget, and pruned by Torch-Pruning within the same FLOPs
(benchmarks/pruners.py; of Eva and Swin V2 it follows the neurons alone). With --retrain-epochs all learn from the
trained network as pruners.py has it, at the best of --lr. What is finished in --output is not run again.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import pruners
from benchmarks.runs import resumed, trained_start
from nas.config import SearchConfig
from nas.stages.search import run_search

SMALL = ("img_size=32", "patch_size=4", "embed_dim=72", "depth=6", "num_heads=6")


@dataclass(frozen=True)
class Example:
    """A network to train. model: timm's name; None: the family's own nano network. kind: what Torch-Pruning may cut."""

    family: str
    model: str | None = None
    model_kwargs: tuple[str, ...] = ()
    kind: str = "neurons"


NETWORKS = {
    "dinov3": Example("eva", "vit_small_patch16_dinov3", SMALL),
    "siglip": Example("vit", "vit_base_patch16_siglip_224", SMALL, pruners.STRONGEST),
    "swinv2": Example("swinv2"),
}


def trained(args: argparse.Namespace, name: str, common: dict[str, Any]) -> Path:
    """The weights of a network."""
    example = NETWORKS[name]
    own = {"space": f"{example.family}-an-nano", "model": example.model, "model_kwargs": example.model_kwargs}
    return trained_start(args.output / name / "base", common | own, args.epochs)


def compressed(args: argparse.Namespace, name: str, weights: Path, common: dict[str, Any]) -> list[Path]:
    """The searches' folders, a budget each."""
    example, folders = NETWORKS[name], [args.output / name / f"free-{budget:g}" for budget in args.budgets]
    for folder, budget in zip(folders, args.budgets, strict=True):
        if not (folder / "summary.json").exists():
            own = {"space": f"{example.family}-free-nano", "model": example.model, "model_kwargs": example.model_kwargs}
            run_search(SearchConfig(**common | own | {"checkpoint": weights, "budget": budget} | resumed(folder)))
    return folders


def beside(args: argparse.Namespace, name: str, weights: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """The rows of the trained network, of ours and of Torch-Pruning's, as cut and trained."""
    example, rows = NETWORKS[name], []
    line = ["--space", f"{example.family}-an-nano", "--checkpoint", str(weights), "--data-dir", str(args.data_dir)]
    line += ["--model", example.model, "--model-kwargs", *example.model_kwargs] if example.model else []
    line += ["--epochs", str(args.retrain_epochs), "--lr", *map(str, args.lr), "--seeds", *map(str, args.seeds)]
    line += ["--threads", str(args.threads)] if args.threads else []
    ways = {
        "ours": ["--method", "folder", "--control", "--folder", *map(str, folders)],
        "torch-pruning": ["--budget", *map(str, args.budgets), "--kinds", example.kind],
    }
    for way, own in ways.items():
        table = args.output / name / f"{way}.json"
        if not table.exists():
            pruners.run(pruners.option_parser().parse_args([*line, *own, "--output", str(table)]))
        rows += [{"network": name} | row for row in json.loads(table.read_text())]
    return rows


def main() -> None:
    """Run what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=12, help="of the network's own training")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5])
    parser.add_argument("--retrain-epochs", type=int, default=0)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    pruners.torch_pruning()  # before anything that takes time
    common = {"dataset": "folder", "data_dir": args.data_dir, "threads": args.threads, "workers": args.workers}
    for name in args.networks:
        weights = trained(args, name, common)
        print(f"\n{name}")
        pruners.print_table(beside(args, name, weights, compressed(args, name, weights, common)))


if __name__ == "__main__":
    main()
