"""Measure finished networks: top-1, top-5 or likeness to the large one, k-NN, and images per second, on any data set.

python -m nas.validate --weights results/<run>                                                  large, subnet, compact
python -m nas.validate --weights results/<run>/compact.safetensors --dataset imagenet --data-dir /data/imagenet
python -m nas.validate --model NAME --checkpoint FILE --data-dir /data/flowers                  any timm network
python -m nas.validate --weights results/<run> --knn                                            no classifier needed
python -m nas.validate --weights results/<run> --by-block                       where it parts from the large network
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.errors import UserError, reason

if TYPE_CHECKING:
    import torch

    from nas.machine.timing import Network
    from nas.runs.opened import Opened
    from nas.stages.reported import Reported

DATA = ("dataset", "data_dir", "val_split", "num_classes", "class_map", "labels", "batch_size", "workers")
IMAGES = ("interpolation", "crop_pct", "mean", "std", "exif")
OF_A_MODEL = ("model_kwargs", "checkpoint")


@dataclass(frozen=True)
class Subject:
    """What is measured. features: the networks as far as their pooled features. costs: params and gflops of each.

    classes: of their classifiers, 0 without. reference: the network that others are like or not, where it is there.
    """

    title: str
    networks: "Mapping[str, Network]"
    features: "Mapping[str, Network]"
    costs: Mapping[str, dict[str, float]]
    reported: "Reported"
    classes: int
    input_size: tuple[int, int, int]
    reference: str | None = None
    output: Path | None = None  # where the numbers go unless --output says
    clocked: "Callable[[], dict[str, dict[str, float]]]" = dict  # milliseconds of networks, by a latency table
    opened: "Opened | None" = None  # the run that they are of


def run_validate(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table, write the JSON, return it."""
    import torch

    from nas.config import RetrainConfig
    from nas.machine.devices import pick_device
    from nas.machine.files import write_json
    from nas.machine.timing import images_per_second
    from nas.training.evaluate import print_table

    if min(*options.speed_batches, options.batch_size) < 1:
        raise UserError("--batch-size and --speed-batches: expected at least 1")
    if (options.weights is None) == (options.model is None):
        raise UserError("give --weights, a run's folder or file, or --model, the timm name of any network; one of them")
    device = pick_device(RetrainConfig(device=options.device, threads=options.threads))
    subject = of_a_run(options, device) if options.model is None else of_a_model(options, device)
    autocast: Callable[[], Any] = (
        partial(torch.autocast, device.type, dtype=torch.bfloat16) if options.amp else nullcontext
    )
    rows: dict[str, dict[str, Any]] = {name: dict(subject.costs[name]) for name in subject.networks}
    for name, found in scores_of(subject, options.knn, device, autocast).items():
        rows[name] |= found
    reported = subject.reported
    if options.by_block:
        for name, values in by_block(subject, device, autocast).items():
            rows[name]["cosine_by_block"] = values
    for batch in options.speed_batches:
        speeds = images_per_second(subject.networks, subject.input_size, batch, device, autocast)
        for name, speed in speeds.items():
            rows[name][f"images_per_s_{batch}"] = speed
    for name, row in subject.clocked().items():
        rows[name] |= row
    facts = {
        "weights": None if options.weights is None else str(options.weights),
        "model": options.model,
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
        "dataset": options.dataset,
        "data_dir": None if options.data_dir is None else str(options.data_dir),
        "split": reported.words,
        "images": reported.images.num_images,
        "unreadable_images": len(reported.images.corrupt),
        "precision": "bfloat16" if options.amp else "float32",
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    print_table(rows, f"{subject.title}, {reported.words}")
    result = facts | {"networks": rows}
    output = options.output or subject.output
    if output is not None:
        write_json(output, result)
    return result


def scores_of(subject: Subject, wanted: bool, device: "torch.device", autocast: Any) -> dict[str, dict[str, float]]:
    """{network: {column: value}}: accuracies, or likeness to the large network; k-NN where there is no classifier.

    wanted: k-NN in any case.
    """
    from nas.machine.progress import progress
    from nas.training.evaluate import top_k
    from nas.training.likeness import likeness
    from nas.training.nearest import knn

    networks, reported, flat = subject.networks, subject.reported, dict[str, float]()
    images, words = reported.images, f"measuring on {reported.images.num_images:,} images of the {reported.words}"
    if wanted and not reported.classes:
        raise UserError("--knn tells classes apart, and these images have no labels; leave it out, or give others")
    if subject.classes and subject.classes == reported.classes:
        flat |= top_k(networks, images, device, autocast, words)
    elif subject.reference is not None and not (wanted and subject.classes):
        looked = progress(images, words)
        flat |= likeness(networks, networks[subject.reference], looked, device, autocast, not subject.classes)
    if wanted or (reported.classes and not subject.classes):
        bank = reported.bank()
        seen = progress(bank, f"features of {bank.num_images:,} training images")
        flat |= knn(subject.features, seen, progress(images, words), device, autocast)
    if not flat:
        print("nothing to hold the outputs against: the images have no labels, and the large network is not there")
    columns = ("top1", "top5", "kl", "agreement", "cosine", "feature_error", "knn")
    return {name: {k: flat[f"{name}_{k}"] for k in columns if f"{name}_{k}" in flat} for name in networks}


def by_block(subject: Subject, device: "torch.device", autocast: Any) -> dict[str, list[float]]:
    """{network: cosine similarity of its stream to the large network's, a value per block}, drawn into the folder."""
    from nas.machine.progress import progress
    from nas.pictures.blocks_figure import PICTURE, blocks_figure
    from nas.pictures.run import save
    from nas.training.by_block import cosine_by_block

    opened = subject.opened
    if opened is None or opened.supernet is None or subject.reference is None:
        raise UserError("--by-block holds small networks against the large one: give --weights, a folder with both")
    seen = progress(subject.reported.images, "streams of the large and of the small network")
    found = cosine_by_block(opened.supernet, opened.subnet, opened.compact, seen, device, autocast)
    for path in save(blocks_figure(found, f"{opened.arch.space}, {opened.folder.name}"), opened.folder / PICTURE):
        print(f"how like the large network's stream, block by block: {path}")
    return found


def of_a_run(options: argparse.Namespace, device: "torch.device") -> Subject:
    """Every network of a run's folder, or that of one of its files."""
    from nas.prices.whole import clocked
    from nas.runs.opened import open_folder
    from nas.stages.reported import reported_images

    given = [name for name in OF_A_MODEL if getattr(options, name)] + ["pretrained"] * (options.pretrained is not None)
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} goes with --model; a run's folder says by itself what it holds"
        )
    opened = open_folder(options.weights, device)
    networks = opened.networks()
    reported = reported_images(opened, device, _options(options, *DATA, *IMAGES), any_classes=options.knn)
    small = [name for name in networks if name in ("subnet", "compact")]
    whole = opened.whole if opened.whole in networks and opened.whole != "previous" else None
    return Subject(
        title=f"{opened.arch.space}, {options.weights}",
        networks=networks,
        features=opened.features(),
        costs={name: opened.costs(name) for name in networks},
        reported=reported,
        classes=opened.arch.num_classes,
        input_size=opened.arch.input_size,
        reference=opened.whole if opened.whole in networks else None,
        output=opened.folder / "validation.json",
        clocked=partial(clocked, opened.arch, opened.compact, small, whole),
        opened=opened,
    )


def of_a_model(options: argparse.Namespace, device: "torch.device") -> Subject:
    """Any timm network with weights of its own: what a search would start from, read as a search reads it."""
    from nas.config import RetrainConfig
    from nas.data.loaders import loader_spec, open_data
    from nas.machine.timing import count_macs
    from nas.networks.backbone import Start, TimmModel, input_size, starting_backbone
    from nas.networks.classes import classes_held
    from nas.networks.key_values import parse_key_values
    from nas.networks.sources import source_of
    from nas.runs.opened import features_of
    from nas.stages.reported import reported_of

    model, model_kwargs = options.model, parse_key_values(tuple(options.model_kwargs))
    source = source_of(model)
    checkpoint = options.checkpoint
    if source is not None:
        model, model_kwargs = source.name, source.kwargs | model_kwargs
        checkpoint = checkpoint or source.folder
    if options.checkpoint is not None and options.pretrained:
        raise UserError("--checkpoint and --pretrained both name the weights; give one of them")
    if options.checkpoint is None and options.pretrained is False:
        raise UserError("--no-pretrained leaves nothing to measure; give --checkpoint FILE, or timm's own weights")
    config = RetrainConfig(val_fraction=0.0, **_options(options, *DATA, *IMAGES))
    splits = open_data(config)
    start = Start(checkpoint is None, checkpoint)
    classes = splits.num_classes if options.num_classes is None else options.num_classes
    held = classes_held(TimmModel(model, model_kwargs), start) if options.knn or not classes else classes
    if options.num_classes is None and (not classes or (options.knn and held != classes)):
        classes = 0 if options.knn else held or 0  # what the weights have; for k-NN none is needed
    network, lines, fresh = starting_backbone(model, model_kwargs, classes, start, splits.class_names)
    for line in lines:
        print(line)
    weights = checkpoint or "timm's pretrained weights"
    if fresh:
        raise UserError(
            f"{weights}: no classifier for the {classes} classes of this dataset, so there is no accuracy to measure;"
            " give the data that the network was trained for, or --knn, which needs none"
        )
    network = network.to(device).eval()
    size = input_size(network, model_kwargs)
    spec = loader_spec(config, network, size, options.batch_size)
    print(f"{options.model}, {weights}: {supported(network)}")
    print(
        f"images: {size[1]} x {size[2]} px, {spec.interpolation}, centre crop {spec.crop_pct:g},"
        f" mean {_numbers(spec.mean)}, std {_numbers(spec.std)}"
    )
    try:
        macs = count_macs(network, size, device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"{options.model} cannot read images of {size[1]} x {size[2]} px ({reason(error)}); give --model-kwargs"
            " img_size=…"
        ) from None
    costs = {"params": sum(p.numel() for p in network.parameters()), "gflops": macs / 1e9}
    return Subject(
        title=f"{options.model}, {weights}",
        networks={"network": network},
        features={"network": features_of(network)},
        costs={"network": costs},
        reported=reported_of(splits, spec, device),
        classes=classes,
        input_size=size,
    )


def supported(network: Any) -> str:
    """Whether it can be searched, and by which spaces; otherwise what stands in the way."""
    from supernets.families import families_of
    from supernets.supernet import Supernet

    families = families_of(network)
    try:
        shapes = Supernet(copy.deepcopy(network)).shapes  # which may get a layer there
    except UserError as error:
        return f"measured only, no space takes it ({error})"
    return f"{len(shapes)} blocks; the spaces {' and '.join(f'{name}-*' for name in families)} take it"


def _options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those that were given."""
    values = {name: getattr(options, name) for name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.4g}" for v in values)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nas.validate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=Path, help="a run's folder: every network in it; or one weights file of it")
    add("--model", metavar="NAME", help="instead of --weights: any timm network, with --checkpoint or timm's weights")
    add("--model-kwargs", nargs="+", default=(), metavar="KEY=VALUE", help="its constructor arguments")
    add(
        "--checkpoint",
        type=Path,
        metavar="PLACE",
        help="its weights: safetensors, a torch file, or a folder with one (docs/weights.md)",
    )
    add("--pretrained", action=argparse.BooleanOptionalAction, help="timm's own weights; so without --checkpoint")
    add("--dataset", help="default: the run's own; with --data-dir: folder")
    add("--data-dir", type=Path)
    add("--val-split", help="the split to measure on; default: the run's own, validation")
    add("--num-classes", type=int, help="only where the dataset does not record it; with --model 0: no classifier")
    add(
        "--no-labels",
        dest="labels",
        action="store_false",
        default=None,
        help="read none: how like the large network the others are (docs/unlabelled.md)",
    )
    add("--knn", action="store_true", help="k-NN top-1 too: the training part's features as bank, 20 neighbours")
    add(
        "--by-block",
        action="store_true",
        help="draw how like the large network's stream the small one's is after every block (blocks.png)",
    )
    add("--class-map", metavar="FILE", help="timm's class map, where the folders' natural order is not the network's")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int)
    add("--interpolation", help="of the resize; like the next three, the run's or the model's own unless given")
    add("--crop-pct", type=float, help="centre crop; 1 up to 64 px")
    add("--mean", type=float, nargs="+", help="of the normalisation")
    add("--std", type=float, nargs="+", help="of the normalisation")
    add(
        "--exif",
        action=argparse.BooleanOptionalAction,
        help="turn images as their EXIF data says; the run's own, or so",
    )
    add("--speed-batches", type=int, nargs="+", default=[1, 32], help="batch sizes that images/s is measured at")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--device")
    add("--threads", type=int)
    add("--output", type=Path, metavar="JSON", help="default: validation.json in the run's folder; none with --model")
    return parser


def main() -> None:
    from nas.failing import errors

    command = parser()
    options = command.parse_args()
    with errors(command.prog):
        run_validate(options)


if __name__ == "__main__":
    main()
