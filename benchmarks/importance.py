"""What the importance order is worth: accuracy of freshly cut subnets, before any training of them.

    python benchmarks/importance.py                                        # digits, a few minutes on two cores
    python benchmarks/importance.py --dataset folder --data-dir DIR --epochs 10

Trains one network, the large one alone, then cuts it at every alpha and width after each order. The order is
computed on training images and everything is measured on the validation split (of the digits, the test fifth). The
same weights serve every row.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from nas.config import RetrainConfig, with_defaults
from nas.data.loaders import Loaders, open_data
from nas.machine.devices import pick_device
from nas.machine.timing import Network
from nas.networks.key_values import parse_key_values
from nas.networks.opening import model_of, start_of
from nas.objectives.plain import Plain
from nas.stages.prepare import Beginning, prepare
from nas.training.evaluate import top_k
from nas.training.loop import fit
from nas.training.losses import cross_entropy
from nas.training.make import make_training
from nas.training.order import TAYLOR_BATCHES
from search_spaces.errors import UserError
from search_spaces.registry import get_space
from search_spaces.slices import BlockShape, NetworkSlice, network_slice, prefix_slice
from supernets.importance import magnitude_scores, orders_of, permute, taylor_pass
from supernets.supernet import Supernet

KINDS = ("none", "magnitude", "taylor")
WIDTHS = ("stream", "inner")


def trained(config: RetrainConfig, epochs: int) -> tuple[Supernet, Loaders, torch.device]:
    """The large network after its epochs (none: as it starts), its loaders, the device."""
    assert config.space is not None
    space, device = get_space(config.space), pick_device(config)
    model, start = model_of(config, space), start_of(config, config.seed)
    config, prepared = prepare(config, Beginning("importance", space, model, open_data(config), start, device))
    supernet = prepared.supernet
    if epochs:
        fit(make_training(config, Plain(supernet, config.smoothing or 0.0), prepared), False, "large network")
    return supernet.eval(), prepared.loaders, device


def ordered(supernet: Supernet, kind: str, batches: list[tuple[Tensor, Tensor]]) -> Supernet:
    """A copy of the supernet in the order of a kind."""
    other = Supernet(copy.deepcopy(supernet.backbone)).eval()
    if kind != "none":
        permute(
            other,
            orders_of(magnitude_scores(other) if kind == "magnitude" else taylor_pass(other, batches, cross_entropy)),
        )
    return other


def main() -> None:
    """Train, cut, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="swin-an-nano", help="a space; its model and training defaults are taken")
    parser.add_argument("--model", help="another timm name of the space's family")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="start from these weights instead of from scratch")
    parser.add_argument("--epochs", type=int, default=15, help="0: measure --checkpoint as it is")
    parser.add_argument("--alphas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = RetrainConfig(
            space=options.space,
            model=options.model,
            model_kwargs=tuple(options.model_kwargs),
            dataset=options.dataset or ("folder" if options.data_dir else "digits"),
            data_dir=options.data_dir,
            checkpoint=options.checkpoint,
            pretrained=False,
            epochs=max(options.epochs, 1),
            seed=options.seed,
            threads=options.threads,
            output=Path(folder),
            train="plain",
        )
        parse_key_values(config.model_kwargs)
        config = with_defaults(config, get_space(options.space), "retrain")
        config.check()
        print(f"{options.space} on {config.dataset_name()}, {options.epochs} epochs, seed {config.seed}")
        supernet, loaders, device = trained(config, options.epochs)
    loaders.train.set_epoch(0)
    batches = list(itertools.islice(loaders.train, TAYLOR_BATCHES))
    columns = list(itertools.product(options.alphas, WIDTHS))
    allowed = [(a, w) for a, w in columns if all(divides(a, w, s) for s in supernet.shapes)]
    for a, w in sorted(set(columns) - set(allowed)):
        print(f"alpha {a}, {w}: left out, it does not divide every block")
    print(f"{'order':<10} {'large':>8} " + " ".join(f"{f'{w} {a}':>10}" for a, w in allowed))
    for kind in KINDS:
        net = ordered(supernet, kind, batches)
        subnets = {
            f"{w} {a}": network_slice(net.shapes, [prefix_slice(s, a, w) for s in net.shapes]) for a, w in allowed
        }
        networks: dict[str, Network] = {"large": net.large}
        networks |= {name: partial(small, net, cut) for name, cut in subnets.items()}
        scores = top_k(networks, loaders.test, device, torch.no_grad)
        cells = " ".join(f"{scores[f'{name}_top1']:>10.2f}" for name in subnets)
        print(f"{kind:<10} {scores['large_top1']:>8.2f} {cells}")
    print(f"top-1 % on the {loaders.reported}, no training after the cut; {time.perf_counter() - started:.0f} s")


def small(supernet: Supernet, subnet: NetworkSlice, images: Tensor) -> Tensor:
    """Logits of a subnet."""
    return supernet.small(images, subnet)


def divides(alpha: int, width: str, shape: BlockShape) -> bool:
    """Whether a block allows an alpha."""
    try:
        prefix_slice(shape, alpha, width)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
