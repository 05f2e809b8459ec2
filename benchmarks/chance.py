"""Is the search better than chance? Its architecture beside others of the same FLOPs, drawn at random.

    python benchmarks/chance.py --search results/search --count 5 --epochs 10 --output results/chance

Draws --count architectures, each as likely as another, from those of the search's space and width whose FLOPs lie
within its budget and at most 2 % of the backbone's below. They and the searched one are retrained alike: from the
weights that the search started from (--init base) or arrived at (--init supernet), with the search's data, batch size
and precision, in its basis. For methods whose slices are prefixes (DAN). What is finished in --output is not run again.
Prints the compact networks' top-1 on the reported split, the mean and the best of chance, and how many of them the
searched one beats.
"""

import argparse
import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from nas.config import RetrainConfig
from nas.networks.architecture import architecture_of
from nas.networks.backbone import TimmModel
from nas.networks.basis_file import BASIS, streams_of
from nas.networks.opening import meta_supernet
from nas.prices.options import BAND
from nas.prices.selection import cost_band
from nas.runs.folder import SUPERNET, typed
from nas.stages.retrain import run_retrain
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.method import Settings
from search_spaces.registry import get_space
from search_spaces.space import make_space
from supernets.basis import install_stages

SHARED = ("dataset", "data_dir", "hflip", "scale", "batch_size", "amp", "workers", "threads")
DRAWS = 200_000


def at_random(
    arch: Architecture, budget: float, alphas: list[int] | None, count: int, seed: int, band: float
) -> list[Architecture]:
    """Different architectures in the budget's band, uniformly: drawn block by block, those outside it rejected."""
    space = get_space(arch.space)
    if space.method.name != "dan":
        raise SystemExit(f"{arch.space}: only architectures of DAN are drawn")
    meta = meta_supernet(TimmModel(arch.model, arch.model_kwargs), arch.num_classes, space)
    install_stages(meta, streams_of(arch.basis))
    settings = Settings(arch.width, space.alphas if alphas is None else tuple(alphas))
    offered = [c["alpha"] for c in make_space(space.name, space.method, settings, meta.shapes).candidates]
    low, high = cost_band(arch.backbone_flops, budget, band)
    draw, found = random.Random(seed), dict[tuple[Any, ...], Architecture]()
    for _ in range(DRAWS):
        factors = tuple(draw.choice(candidates) for candidates in offered)
        picks: list[Any] = [{"alpha": alpha} for alpha in factors]
        other = architecture_of(meta, arch.space, arch.model, arch.model_kwargs, picks, arch.width)
        if low <= other.flops <= high and other.blocks != arch.blocks:
            found[factors] = replace(other, permutation=arch.permutation, basis=arch.basis, search=arch.search)
        if len(found) == count:
            return list(found.values())
    raise SystemExit(
        f"{len(found)} architectures in {DRAWS} draws lie between {low} and {high} MACs; asked for {count}"
    )


def retrained(args: argparse.Namespace, arch: Architecture, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The table of a retrain of one architecture, unless it is there."""
    place, folder = args.output / f"{name}-arch", args.output / name
    if not (folder / "summary.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        save_architecture(arch, place / "arch.json")
        for file in (SUPERNET, BASIS) if arch.basis else (SUPERNET,):
            if not (place / file).exists():
                (place / file).symlink_to((args.search / file).resolve())
        resume = (folder / "config.yaml").is_file()
        config = RetrainConfig(arch=place, epochs=args.epochs, init=args.init, output=folder, resume=resume, **options)
        run_retrain(config)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return dict(summary["compact"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", type=Path, required=True, help="the folder of a finished search by DAN")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--init", choices=["base", "supernet"], default="base")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, and of every retrain")
    args = parser.parse_args()
    arch = load_architecture(args.search)
    config = yaml.safe_load((args.search / "config.yaml").read_text())
    options = typed(RetrainConfig, {k: config[k] for k in SHARED}, args.search) | {"seed": args.seed}
    budget = arch.search["budget"]
    drawn = at_random(arch, float(budget), config["alphas"], args.count, args.seed, config.get("band", BAND))
    networks = {"searched": arch} | {f"chance-{i}": other for i, other in enumerate(drawn)}
    rows = {name: retrained(args, network, name, options) for name, network in networks.items()}
    print(f"{'network':12} {'FLOPs':>7} {'params':>7} {'top-1':>7}  factors")
    for name, row in rows.items():
        network = networks[name]
        share = network.flops / network.backbone_flops
        factors = " ".join(str(block["alpha"]) for block in network.blocks)
        params = network.params / network.backbone_params
        print(f"{name:12} {share:7.3f} {params:7.3f} {row['top1']:7.2f}  {factors}")
    searched, *chance = (row["top1"] for row in rows.values())
    print(
        f"chance: {statistics.mean(chance):.2f} on average, {max(chance):.2f} at best; the searched network beats"
        f" {sum(searched > other for other in chance)} of {len(chance)}"
    )


if __name__ == "__main__":
    main()
