"""Measure finished networks: top-1, top-5 and images per second of large, subnet and compact.

python -m nas.validate --weights results/<run>
python -m nas.validate --weights results/<run>/compact.safetensors --dataset imagenet --data-dir /data/imagenet
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from search_spaces.errors import UserError


def run_validate(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table, write the JSON, return it."""
    import torch

    from nas.config import RetrainConfig
    from nas.evaluate import print_table, top_k
    from nas.opened import open_folder, test_images
    from nas.run import write_json
    from nas.setup import pick_device
    from nas.speed import images_per_second

    if min(*options.speed_batches, options.batch_size) < 1:
        raise UserError("--batch-size and --speed-batches: expected at least 1")
    device = pick_device(RetrainConfig(device=options.device, threads=options.threads))
    opened = open_folder(options.weights, device)
    networks = opened.networks()
    names = ("dataset", "data_dir", "val_split", "batch_size", "workers", "num_classes")
    images = test_images(opened, device, {name: getattr(options, name) for name in names})
    autocast: Callable[[], Any] = (
        partial(torch.autocast, device.type, dtype=torch.bfloat16) if options.amp else nullcontext
    )
    scores = top_k(networks, images, device, autocast)
    rows: dict[str, dict[str, Any]] = {
        name: opened.costs(name) | {k: scores[f"{name}_{k}"] for k in ("top1", "top5")} for name in networks
    }
    for batch in options.speed_batches:
        speeds = images_per_second(networks, opened.arch.input_size, batch, device, autocast)
        for name, speed in speeds.items():
            rows[name][f"images_per_s_{batch}"] = speed
    facts = {
        "weights": str(options.weights),
        "dataset": options.dataset,
        "data_dir": None if options.data_dir is None else str(options.data_dir),
        "unreadable_images": len(images.corrupt),
        "precision": "bfloat16" if options.amp else "float32",
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    print_table(rows, f"{opened.arch.space}, {options.weights}")
    result = facts | {"networks": rows}
    write_json(options.output or opened.folder / "validation.json", result)
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nas.validate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="a run's folder: every network in it; or one weights file of it")
    add("--dataset", help="default: the run's own")
    add("--data-dir", type=Path)
    add("--val-split", help="the split to measure on; default: the run's own")
    add("--num-classes", type=int, help="only where the dataset does not record it")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int)
    add("--speed-batches", type=int, nargs="+", default=[1, 32], help="batch sizes that images/s is measured at")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--device")
    add("--threads", type=int)
    add("--output", type=Path, metavar="JSON", help="default: validation.json beside the weights")
    return parser


def main() -> None:
    from nas.cli import fail

    try:
        run_validate(parser().parse_args())
    except UserError as error:
        fail("nas.validate", str(error))


if __name__ == "__main__":
    main()
