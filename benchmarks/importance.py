"""What the basis is worth (section 2.7): accuracy of freshly cut subnets, before any training of them.

    python benchmarks/importance.py                                        # digits, a few minutes on two cores
    python benchmarks/importance.py --dataset folder --data-dir DIR --epochs 10
    python benchmarks/importance.py --space vit-an --model NAME --checkpoint FILE --data-dir DIR --epochs 0

Trains one network, the large one alone, then cuts it at every alpha and width: as it stands, ordered by each
importance, and with its stream rotated, heads and neurons ordered. Orders and rotations are found on training images,
once per seed, which draws them; everything is measured on the validation split (of the digits, the test fifth). The
same weights serve every row.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.runs import mean_words
from nas.config import RetrainConfig, with_defaults
from nas.data.loaders import Loaders, open_data, shuffled
from nas.machine.devices import pick_device
from nas.machine.timing import Network
from nas.networks.key_values import parse_key_values
from nas.networks.opening import model_of, start_of
from nas.objectives.plain import Plain
from nas.stages.prepare import Beginning, prepare
from nas.training.basis import TAYLOR_BATCHES
from nas.training.calibration import images_from
from nas.training.evaluate import top_k
from nas.training.loop import fit
from nas.training.losses import cross_entropy
from nas.training.make import make_training
from search_spaces.errors import UserError
from search_spaces.registry import get_space
from search_spaces.slices import BlockShape, NetworkSlice, network_slice, prefix_slice
from supernets.basis import Basis, rewrite
from supernets.calibration import Wanted, calibrate
from supernets.importance import magnitude_scores, orders_of, permute, taylor_pass
from supernets.streams import fixed_streams
from supernets.supernet import Supernet

KINDS = ("none", "order magnitude", "order taylor", "order error", "rotate taylor", "rotate error")
WIDTHS = ("stream", "inner")


def trained(config: RetrainConfig, epochs: int, test_images: int | None) -> tuple[Supernet, Loaders, torch.device]:
    """The large network after its epochs (none: as it starts), its loaders, the device. test_images: None for all."""
    assert config.space is not None
    space, device = get_space(config.space), pick_device(config)
    model, start, splits = model_of(config, space), start_of(config, config.seed), open_data(config)
    if test_images:
        test = shuffled(splits.test, 0)
        splits = replace(splits, test=type(test)(test.source, test.indices[:test_images]))
    config, prepared = prepare(config, Beginning("importance", space, model, splits, splits.num_classes, start, device))
    supernet = prepared.supernet
    if epochs:
        fit(make_training(config, Plain(supernet, config.smoothing or 0.0), prepared), False, "large network")
    return supernet.eval(), prepared.loaders, device


@dataclass(frozen=True)
class Images:
    """What a seed draws: batches with labels for Taylor scores, images for second moments."""

    labelled: list[tuple[Tensor, Tensor]]
    calibration: list[Tensor]


def drawn(loaders: Loaders, seed: int, count: int) -> Images:
    """Training images, by the seed: augmented with labels, and as they are evaluated."""
    loaders.train.set_epoch(seed)
    labelled = list(itertools.islice(loaders.train, TAYLOR_BATCHES))
    images = images_from(loaders.calibration(seed), torch.device("cpu"), 0, count)
    return Images(labelled, [batch for batch, _ in images])


def standing(supernet: Supernet, kind: str, images: Images) -> Supernet:
    """A copy of the supernet as a row has it."""
    other = Supernet(copy.deepcopy(supernet.backbone)).eval()
    change, _, importance = kind.partition(" ")
    if change == "none":
        return other
    rotated = (
        frozenset({s.stage for s in other.shapes} - set(fixed_streams(other.adapter)))
        if change == "rotate"
        else frozenset()
    )
    wanted = Wanted(rotated, error_order=importance == "error")
    basis = calibrate(other, images.calibration, wanted)
    orders = dict(basis.orders)
    if importance != "error":
        orders = orders_of(
            magnitude_scores(other) if importance == "magnitude" else taylor_pass(other, images.labelled, cross_entropy)
        )
    orders = {name: order for name, order in orders.items() if name not in {f"stream.{s}" for s in rotated}}
    if change == "rotate":
        rewrite(other, Basis(basis.streams, basis.energy, orders=orders))
    else:
        permute(other, orders)
    return other


def option_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of a network and its data."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="swin-an-nano", help="a space; its model and training defaults are taken")
    parser.add_argument("--model", help="another timm name of the space's family")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="start from these weights instead of from scratch")
    parser.add_argument("--epochs", type=int, default=15, help="0: measure --checkpoint as it is")
    parser.add_argument("--seed", type=int, default=42, help="of the training")
    parser.add_argument("--test-images", type=int, help="measure on so many of the validation images, spread over them")
    parser.add_argument("--threads", type=int)
    return parser


def opened(options: argparse.Namespace) -> tuple[Supernet, Loaders, torch.device]:
    """The large network that the options ask for, trained, with its images and device."""
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
        return trained(config, options.epochs, options.test_images)


def main() -> None:
    """Train, cut, print the table."""
    parser = option_parser(__doc__)
    parser.add_argument("--alphas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the images that orders and rotations see")
    parser.add_argument("--calibration-images", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    started = time.perf_counter()
    supernet, loaders, device = opened(options)
    columns = list(itertools.product(options.alphas, WIDTHS))
    allowed = [(a, w) for a, w in columns if all(divides(a, w, s) for s in supernet.shapes)]
    for a, w in sorted(set(columns) - set(allowed)):
        print(f"alpha {a}, {w}: left out, it does not divide every block")
    subnets = {
        f"{w} {a}": network_slice(supernet.shapes, [prefix_slice(s, a, w) for s in supernet.shapes]) for a, w in allowed
    }
    print(f"{'':<16} {'large':>14} " + " ".join(f"{name:>14}" for name in subnets))
    for kind in options.kinds:
        rows = []
        for seed in options.seeds if kind != "none" else options.seeds[:1]:
            net = standing(supernet, kind, drawn(loaders, seed, options.calibration_images))
            networks: dict[str, Network] = {"large": net.large}
            networks |= {name: partial(small, net, cut) for name, cut in subnets.items()}
            scores = top_k(networks, loaders.test, device, torch.no_grad)
            rows.append([scores[f"{name}_top1"] for name in networks])
        print(
            f"{kind:<16} " + " ".join(f"{mean_words(list(values)):>14}" for values in zip(*rows, strict=True)),
            flush=True,
        )
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
