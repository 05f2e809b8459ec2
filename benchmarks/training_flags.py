"""What bf16 autocast, channels-last and torch.compile buy in a step of each stage, measured in turn in one run.

    python benchmarks/training_flags.py --nets vit swin --batch-size 4

Per network: the seconds of a search step (DAN) and of a retrain step under each option, median over rounds, and how
many times as fast as float32 in eager mode that is. Compiling happens in the warm-up and is reported beside it.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.search_step import NETS, measure, objectives, steps
from nas.config import SearchConfig
from nas.machine import devices
from nas.machine.options import MachineOptions
from nas.training.optim import lay_out

OPTIONS: dict[str, dict[str, bool]] = {
    "float32": {},
    "bf16": {"amp": True},
    "channels-last": {"channels_last": True},
    "compile": {"compile": True},
    "bf16 compile": {"amp": True, "compile": True},
}


def stages(net: str, width: str, own: dict[str, bool], args: argparse.Namespace) -> dict[str, Any]:
    """A step of both stages under the options, on a supernet of its own."""
    device = torch.device(args.device)
    kinds, _ = objectives(net, width, args.img_size)
    kinds = {stage: kinds[stage].to(device).train() for stage in ("search", "retrain")}
    supernet = kinds["search"].supernet
    lay_out(SearchConfig(channels_last=own.get("channels_last", False), compile=own.get("compile", False)), supernet)
    images = torch.randn(args.batch_size, *supernet.adapter.input_size, device=device)
    if own.get("channels_last"):
        images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 10, (args.batch_size,), device=device)

    autocast = partial(devices.autocast, MachineOptions(amp=own.get("amp")), device)
    return {stage: step for stage, step in steps(kinds, images, target, autocast).items() if stage in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["vit", "swin"])
    parser.add_argument("--widths", nargs="+", choices=["stream", "inner"], default=["stream"])
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    print(f"{'network':8} {'width':7} {'stage':8} {'option':14} {'seconds':>8} {'speed-up':>9} {'first step s':>13}")
    for net in args.nets:
        for width in args.widths:
            runs = {name: stages(net, width, OPTIONS[name], args) for name in args.options}
            kinds = {(stage, name): step for name, of in runs.items() for stage, step in of.items()}
            first = {}
            for kind, step in kinds.items():
                start = time.perf_counter()
                step()
                first[kind] = time.perf_counter() - start
            times = measure(kinds, args.rounds, cuda)
            for stage in ("search", "retrain"):
                for name in args.options:
                    ours = times[stage, name]
                    gain = statistics.median(a / b for a, b in zip(times[stage, args.options[0]], ours, strict=True))
                    print(
                        f"{net:8} {width:7} {stage:8} {name:14} {statistics.median(ours):8.3f} {gain:9.2f}"
                        f" {first[stage, name]:13.1f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
