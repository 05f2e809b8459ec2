"""This toolkit beside Torch-Pruning: the same trained ViT, the same budget of FLOPs, the same number of epochs.

    pip install torch-pruning
    python benchmarks/other_tools.py --budgets 0.5 0.25 --seeds 0 1 2        # digits, from a network trained here

The start is the family's nano ViT, trained alone (--start-epochs) or from --checkpoint. Ours: a search by DAN, then a
retrain. Torch-Pruning: its Taylor importance, cut at once to the largest network within the budget, then trained for
as many epochs as our two stages have together, alone or distilled from the network it was cut from. `uniform` narrows
the residual stream as well (our stream width), `bottleneck` only heads and neurons (our inner width). Optimiser,
schedule and augmentation are the retrain's for both. Prints top-1 of the compact network on the reported split,
mean and standard deviation over the seeds, its share of the FLOPs, and the seconds of training.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.config import RetrainConfig, SearchConfig, with_defaults
from nas.data.loaders import open_data
from nas.machine.devices import pick_device
from nas.networks.opening import model_of, start_of
from nas.objectives.plain import Plain
from nas.stages.prepare import Beginning, prepare
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.evaluate import top_k
from nas.training.loop import fit
from nas.training.losses import cross_entropy, kl_divergence
from nas.training.make import make_training
from nas.training.objective import Step
from search_spaces.registry import get_space

DISTILL = 0.5  # share of the loss that is the teacher's, as in `retrain.py --train distill`
TAYLOR_BATCHES = 10  # as in Torch-Pruning's own example for timm


class Bare(nn.Module):
    """A network where the loop expects a supernet."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def large(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.backbone(images)  # type: ignore[no-any-return]

    def identity(self) -> None:
        """A network that is no supernet has no slices."""


class Finetune(Plain):
    """CE, or with a teacher (1 - w) CE + w KL(teacher || network)."""

    def __init__(self, network: nn.Module, teacher: Callable[[Tensor], Tensor] | None, smoothing: float) -> None:
        super().__init__(Bare(network), smoothing)  # type: ignore[arg-type]
        self.teacher = teacher

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        q = self.supernet.large(images)
        ce = cross_entropy(q, target, self.smoothing)
        if self.teacher is None:
            return {"ce": ce}
        with torch.no_grad():
            p = self.teacher(images)
        return {"ce": (1 - DISTILL) * ce, "distill": DISTILL * kl_divergence(p, q)}


def macs(network: nn.Module, size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image, by torch's own counter."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *size))
    return int(counter.get_total_flops()) // 2


def prune(network: nn.Module, batches: list[Any], size: tuple[int, ...], ratio: float, kind: str) -> nn.Module:
    """A copy of a timm ViT, cut by Torch-Pruning as its example for timm does it."""
    import torch_pruning as tp

    small: Any = copy.deepcopy(network).eval()
    ignored = [small.head]
    if kind == "bottleneck":
        ignored += [layer for block in small.blocks for layer in (block.attn.proj, block.mlp.fc2)]
        ignored.append(small.patch_embed.proj)
    for images, target in batches:
        F.cross_entropy(small(images), target).backward()
    pruner = tp.pruner.BasePruner(
        small,
        torch.zeros(1, *size),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={block.attn.qkv: block.attn.num_heads for block in small.blocks},
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for block in small.blocks:
        attn = block.attn
        attn.num_heads = pruner.num_heads[attn.qkv]
        attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
        attn.attn_dim, attn.scale = attn.num_heads * attn.head_dim, attn.head_dim**-0.5
    small.zero_grad()
    return small  # type: ignore[no-any-return]


def within(network: nn.Module, batches: list[Any], size: tuple[int, ...], budget: float, kind: str) -> nn.Module:
    """The largest network that pruning to one ratio leaves within the budget, by bisection."""
    full = macs(network, size)
    low, high = 0.0, 0.95
    best = prune(network, batches, size, high, kind)
    for _ in range(9):
        middle = (low + high) / 2
        candidate = prune(network, batches, size, middle, kind)
        if macs(candidate, size) <= budget * full:
            best, high = candidate, middle
        else:
            low = middle
    return best


def pruned(args: argparse.Namespace, start: Path, seed: int, budget: float, kind: str, folder: Path) -> dict[str, Any]:
    """Torch-Pruning's row. kind: uniform or bottleneck, with -distilled for a teacher."""
    space = get_space("vit-an-nano")
    epochs = args.search_epochs + args.retrain_epochs
    config = RetrainConfig(space=space.name, checkpoint=start, seed=seed, threads=args.threads, epochs=epochs)
    config = with_defaults(RetrainConfig(**vars(config) | data(args) | {"output": folder}), space, "retrain")
    config = RetrainConfig(**vars(config) | {"dataset": config.dataset_name()})
    config.check()
    device = pick_device(config)
    beginning = Beginning("pruned", space, model_of(config, space), open_data(config), start_of(config, seed), device)
    config, prepared = prepare(config, beginning)
    supernet, loaders = prepared.supernet, prepared.loaders
    size = supernet.adapter.input_size
    loaders.train.set_epoch(0)
    batches = [batch for batch, _ in zip(loaders.train, range(TAYLOR_BATCHES), strict=False)]
    network = within(supernet.backbone, batches, size, budget, kind.split("-")[0])
    teacher = supernet.backbone.eval() if kind.endswith("distilled") else None
    began = time.perf_counter()
    fit(make_training(config, Finetune(network, teacher, config.smoothing or 0.0), prepared), False, kind)
    seconds = time.perf_counter() - began
    scores = top_k({"network": network.eval()}, loaders.test, device, torch.no_grad)
    return {
        "top1": scores["network_top1"],
        "flops": macs(network, size) / supernet.flops(),
        "params": sum(p.numel() for p in network.parameters()) / supernet.params(),
        "seconds": seconds,
    }


def ours(args: argparse.Namespace, start: Path, seed: int, budget: float, kind: str, folder: Path) -> dict[str, Any]:
    """Our row. kind: METHOD-WIDTH."""
    method, width = kind.split("-")
    common = {"seed": seed, "threads": args.threads} | data(args)
    began = time.perf_counter()
    search = run_search(
        SearchConfig(
            space=f"vit-{method}-nano", checkpoint=start, width=width, budget=budget, epochs=args.search_epochs,  # type: ignore[arg-type]
            output=folder / "search", **common,
        )
    )  # fmt: skip
    retrain = run_retrain(RetrainConfig(arch=search, epochs=args.retrain_epochs, output=folder / "retrain", **common))
    seconds = time.perf_counter() - began
    summary = json.loads((retrain / "summary.json").read_text())
    large, compact = summary["large"], summary["compact"]
    shares = {"flops": compact["gflops"] / large["gflops"], "params": compact["params"] / large["params"]}
    return shares | {"top1": compact["top1"], "seconds": seconds}


def data(args: argparse.Namespace) -> dict[str, Any]:
    """Options that say what is trained on."""
    if args.data_dir is None:
        return {"amp": args.amp}
    return {
        "amp": args.amp,
        "dataset": "folder",
        "data_dir": args.data_dir,
        "hflip": 0.5,
        "scale": (0.5, 1.0),
        "workers": 0,
    }


def main() -> None:
    kinds = ["dan-stream", "dan-inner", "joint-stream", "uvc-stream"]
    theirs = ["uniform", "bottleneck", "uniform-distilled", "bottleneck-distilled"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=kinds + theirs, default=kinds[:2] + theirs)
    parser.add_argument("--start-epochs", type=int, default=30)
    parser.add_argument("--search-epochs", type=int, default=15)
    parser.add_argument("--retrain-epochs", type=int, default=30)
    parser.add_argument("--checkpoint", type=Path, help="a trained nano ViT, instead of training one per seed")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
    starts = []
    for seed in args.seeds:
        with TemporaryDirectory() as name:
            folder, start = Path(name), args.checkpoint
            if start is None:
                plain = RetrainConfig(space="vit-an-nano", train="plain", epochs=args.start_epochs, seed=seed)
                options = data(args) | {"threads": args.threads, "output": folder / "start"}
                plain = RetrainConfig(**vars(plain) | options)
                start = run_retrain(plain) / "large.safetensors"
                starts.append(json.loads((folder / "start/summary.json").read_text())["large"]["top1"])
            for budget in args.budgets:
                for kind in args.kinds:
                    run = ours if kind in kinds else pruned
                    row = run(args, start, seed, budget, kind, folder / f"{budget}-{kind}")
                    rows.setdefault((budget, kind), []).append(row)
                    print(f"seed {seed}, {budget:g}, {kind}: {row}", flush=True)
    if starts:
        print(f"start: {statistics.mean(starts):.2f}")
    print(f"{'budget':>6} {'network':22} {'FLOPs':>7} {'params':>7} {'top-1':>15} {'seconds':>8}")
    for (budget, kind), found in rows.items():
        mean = {key: statistics.mean(row[key] for row in found) for key in found[0]}
        spread = statistics.stdev(row["top1"] for row in found) if len(found) > 1 else 0.0
        print(
            f"{budget:6g} {kind:22} {mean['flops']:7.3f} {mean['params']:7.3f} {mean['top1']:7.2f} +- {spread:.2f}"
            f" {mean['seconds']:8.0f}"
        )


if __name__ == "__main__":
    main()
