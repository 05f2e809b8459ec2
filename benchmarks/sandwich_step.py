"""What a step of --supernet sandwich costs, in plain training steps of the same backbone, measured in turn in one run.

    python benchmarks/sandwich_step.py                      # ViT and Swin at 224 px, some minutes on two cores
    python benchmarks/sandwich_step.py --nets nano-swin     # 32 px

For each network and space: seconds of both steps (means: the networks of a step are other ones each time, the same of
a seed), their ratio beside that of their multiply-accumulates, and how long it takes to draw a step's networks, which
is part of the step.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch

from benchmarks.search_step import measure
from nas.config import SearchConfig
from nas.machine import devices
from nas.machine.options import MachineOptions
from nas.methods.table import training_of
from nas.objectives.plain import Plain
from nas.objectives.sandwich import Sandwich
from nas.prices.costs import priced
from nas.prices.flops import FLOPS
from nas.searchers.anywhere import Anywhere
from nas.training.objective import Objective, Step
from search_spaces.registry import SPACES, get_space
from search_spaces.slices import NetworkSlice
from search_spaces.space import make_space
from supernets.supernet import Supernet

NETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("vit", "vit_base_patch16_224", dict(depth=4, num_classes=100)),
    "swin": ("swin", "swin_base_patch4_window7_224", dict(depths=(2, 2, 2, 2), num_classes=100, drop_path_rate=0.0)),
    "nano-vit": ("vit", SPACES["vit-dan-nano"].model, dict(SPACES["vit-dan-nano"].model_kwargs)),
    "nano-swin": ("swin", SPACES["swin-dan-nano"].model, dict(SPACES["swin-dan-nano"].model_kwargs)),
}


def objective_of(supernet: Supernet, space_name: str, subnets: int) -> tuple[Sandwich, list[float], list[float]]:
    """The objective; seconds that each step's draw took, and MACs of each step over those of a plain one."""
    space = get_space(space_name)
    settings = training_of(space).settings(SearchConfig(space=space_name), space)
    choices = make_space(space_name, space.method, settings, supernet.shapes)
    anywhere = Anywhere(priced(choices, supernet.adapter.costs, FLOPS), seed=0)
    seconds: list[float] = []
    macs: list[float] = []

    def drawn(number: int) -> list[NetworkSlice]:
        start = time.perf_counter()
        found = anywhere.drawn(number, subnets)
        seconds.append(time.perf_counter() - start)
        macs.append(1 + sum(supernet.flops(each) for each in (anywhere.smallest(), *found)) / supernet.flops())
        return found

    return Sandwich(supernet, anywhere.smallest(), drawn), seconds, macs


def step_of(objective: Objective, batch: tuple[Any, Any], autocast: Callable[[], Any]) -> Callable[[], None]:
    """A training step, each with the next number."""
    optimizer = torch.optim.AdamW(objective.supernet.backbone.parameters(), lr=1e-5, fused=True)
    numbers = count()

    def step() -> None:
        with autocast():
            terms = objective(*batch, Step(t=0.5, number=next(numbers), total=1000))
        torch.stack([v.float() for v in terms.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["vit", "swin"])
    parser.add_argument("--methods", nargs="+", default=["dan", "free"])
    parser.add_argument("--subnets", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    device = torch.device(args.device)

    autocast = partial(devices.autocast, MachineOptions(amp=args.amp), device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads,"
        f" {'bf16 autocast' if args.amp else 'float32'}, batch {args.batch_size}, {args.subnets} drawn subnets a step,"
        f" means of {args.rounds} rounds"
    )
    print(
        f"{'network':10} {'space':6} {'plain s':>8} {'sandwich s':>11} {'sandwich/plain':>15} {'MACs':>6} {'draw s':>8}"
    )
    for net in args.nets:
        family, model, kwargs = NETS[net]
        for method in args.methods:
            torch.manual_seed(0)
            supernet = Supernet(timm.create_model(model, **kwargs)).to(device).train()
            name = f"{family}-{method}{'-nano' if net.startswith('nano') else ''}"
            sandwich, seconds, macs = objective_of(supernet, name, args.subnets)
            images = torch.randn(args.batch_size, *supernet.adapter.input_size, device=device)
            batch = images, torch.randint(0, 10, (args.batch_size,), device=device)
            kinds = {"plain": step_of(Plain(supernet), batch, autocast), "sandwich": step_of(sandwich, batch, autocast)}
            times = measure(kinds, args.rounds, device.type == "cuda")
            plain, whole = (statistics.fmean(times[kind]) for kind in ("plain", "sandwich"))
            print(
                f"{net:10} {method:6} {plain:8.3f} {whole:11.3f} {whole / plain:15.2f}"
                f" {statistics.fmean(macs[1:]):6.2f} {statistics.fmean(seconds[1:]):8.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
