"""Torch-Pruning 1.6 beside compact networks of this toolkit: equal FLOPs, as cut and after the same training.

    pip install "torch-pruning>=1.6,<1.7"
    python benchmarks/pruners.py --space vit-an-nano --checkpoint FILE --data-dir DIR --budget 0.5 0.25
    python benchmarks/pruners.py --space vit-an-nano --checkpoint FILE --data-dir DIR --method folder --folder RUN \\
        --epochs 10 --lr 3e-4 1e-3 --control

The network of --checkpoint is what Torch-Pruning cuts, or what the runs in --folder were cut from, and the teacher of
all. Torch-Pruning cuts as its authors do in VainF/Isomorphic-Pruning: Taylor importance by group, ranked among groups
of one form (isomorphic) over the whole network, its gradients from training images prepared as in evaluation; the
ratio is the one that leaves the most FLOPs within the budget. Kinds: `dims` narrows every head, `heads` removes whole
heads, `both` heads by the ratio and their channels by half of it; `-bottleneck` leaves the residual stream whole. The
default is the strongest on the nano networks, at a half and at a quarter. `neurons` is the one kind for networks
whose attention it does not follow (all but ViT and Swin).

Every network learns from the frozen teacher in the same way (--epochs), from the same start at every rate (--lr), and
is taken from the epoch that was best on the held-out training images, the start among them; * marks the best rate.
Everything but that choice is measured on the validation split.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from timm.layers import Attention
from timm.models.swin_transformer import PatchMerging, SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nas
from benchmarks.importance import trained as large_network
from nas.config import RetrainConfig, with_defaults
from nas.data.loaders import Loaders
from nas.machine.devices import autocast
from nas.machine.files import write_csv, write_json
from nas.machine.randomness import seed_everything
from nas.networks.key_values import parse_key_values
from nas.objectives.distill import distilled_terms
from nas.training.evaluate import top_k
from nas.training.losses import cross_entropy
from nas.training.optim import make_optimizer
from search_spaces.errors import UserError
from search_spaces.registry import get_space

NEURONS = "neurons"  # hidden ones alone
KINDS = (*(f"{inside}{stream}" for stream in ("", "-bottleneck") for inside in ("dims", "heads", "both")), NEURONS)
STRONGEST = "dims-bottleneck"
BISECTIONS = 10
DISTILL = 0.5  # share of the loss that is the teacher's
WRITERS = {".csv": write_csv, ".json": write_json}
COLUMNS = {
    "network": "", "seed": "d", "gflops": ".5f", "share": ".4f", "params": ",d", "seconds": ".1f", "cut": ".2f",
    "lr": "g", "epoch": "d", "held_out": ".2f", "trained": ".2f", "best": "",
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What all networks share. large: the unpruned one, which teaches. full: its MACs of one image."""

    config: RetrainConfig
    large: nn.Module
    loaders: Loaders
    device: torch.device
    size: tuple[int, int, int]
    full: int


@dataclass(frozen=True)
class Contender:
    """A network before it is trained. seconds: of pruning, where that happened here."""

    name: str
    network: nn.Module
    seconds: float | None = None
    trains: bool = True


def torch_pruning() -> Any:
    """Torch-Pruning, which this toolkit does not depend on."""
    try:
        import torch_pruning
    except ImportError:
        raise UserError('Torch-Pruning is not installed: pip install "torch-pruning>=1.6,<1.7"') from None
    return torch_pruning


def macs(network: nn.Module, size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image, by torch's own counter."""
    image = torch.zeros(1, *size, device=next(network.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # its hooks want gradients on
        network(image)
    return int(counter.get_total_flops()) // 2


def accumulate(network: nn.Module, loader: Any, count: int) -> None:
    """Leave in the network the gradient of cross-entropy on the loader's first images, summed over batches."""
    network.zero_grad()
    for images, target in loader:
        cross_entropy(network(images[:count]), target[:count]).backward()
        count -= len(images)
        if count <= 0:
            return


def with_gradients(network: nn.Module) -> nn.Module:
    """A copy, gradients included: deepcopy leaves them behind."""
    other = copy.deepcopy(network)
    for own, copied in zip(network.parameters(), other.parameters(), strict=True):
        copied.grad = None if own.grad is None else own.grad.clone()
    return other


def merging_pruner(tp: Any) -> Any:
    """How patch merging loses channels: in each of the four tokens that it concatenates (their example for Swin)."""

    class MergingPruner(tp.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            return layer  # type: ignore[no-any-return]

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
            idxs = [quarter * self.get_in_channels(layer) + i for quarter in range(4) for i in idxs]
            tp.prune_linear_in_channels(layer.reduction, idxs)
            tp.prune_layernorm_out_channels(layer.norm, idxs)
            return layer  # type: ignore[no-any-return]

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.reduction.out_features)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.reduction.in_features) // 4

    return MergingPruner()


def ignored(network: Any, kind: str) -> list[Any]:
    """Layers and parameters that keep their size: classifier, pooling by attention, relative positions, and in a
    bottleneck the stream."""
    pool = [network.attn_pool] if getattr(network, "attn_pool", None) is not None else []
    if kind == NEURONS:
        mlps = [m for name, m in network.named_modules() if name.endswith(".mlp") and not name.startswith("attn_pool")]
        inside = {part for mlp in mlps for part in mlp.modules()}
        return pool + [m for m in network.modules() if not [*m.children()] and m not in inside]
    heads = network.get_classifier()
    layers = [*heads, *pool] if isinstance(heads, tuple) else [heads, *pool]
    layers += [m.relative_position_bias_table for m in network.modules() if isinstance(m, WindowAttention)]
    if kind.endswith("-bottleneck"):
        layers += [network.patch_embed.proj, *(m for m in network.modules() if isinstance(m, PatchMerging))]
    return layers


def resize(attn: Any, heads: list[int]) -> None:
    """Tell timm's attention, its layers cut, which of its heads are left and how wide they are."""
    attn.num_heads, attn.attn_dim = len(heads), attn.proj.in_features
    attn.head_dim = attn.attn_dim // attn.num_heads
    attn.scale = attn.head_dim**-0.5  # as in their prune.py
    if isinstance(attn, WindowAttention):
        table = attn.relative_position_bias_table.detach()
        attn.relative_position_bias_table = nn.Parameter(table[:, heads].clone())


def prune(
    network: nn.Module, size: tuple[int, ...], ratio: float, kind: str, round_to: int, importance: str = "taylor"
) -> nn.Module:
    """A copy of a network that holds gradients, cut by Torch-Pruning."""
    tp = torch_pruning()
    scores = {"taylor": tp.importance.GroupTaylorImportance, "magnitude": tp.importance.GroupMagnitudeImportance}
    small, inside = with_gradients(network), kind.removesuffix("-bottleneck")
    attentions: dict[Any, Any] = {m.proj: m for m in small.modules() if isinstance(m, Attention | WindowAttention)}
    num_heads = {attn.qkv: attn.num_heads for attn in attentions.values()}
    with warnings.catch_warnings(action="ignore"):  # that embeddings and LayerScale lose their last dimension: they do
        pruner = tp.pruner.BasePruner(
            small,
            torch.zeros(1, *size, device=next(small.parameters()).device),
            importance=scores[importance](),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=ratio,
            pruning_ratio_dict={tuple(num_heads): ratio / 2} if inside == "both" else None,
            num_heads=num_heads,
            prune_head_dims=inside != "heads",
            prune_num_heads=inside != "dims",
            head_pruning_ratio=ratio,
            ignored_layers=ignored(small, kind),
            customized_pruners={PatchMerging: merging_pruner(tp)},
            round_to=round_to,
            in_channel_groups={},  # this and the next: its defaults are one dictionary, which keeps every copy alive
            out_channel_groups={},
        )
    for group in pruner.step(interactive=True):
        root, idxs = group[0]
        attn = attentions.get(root.target.module) if pruner.DG.is_in_channel_pruning_fn(root.handler) else None
        if attn is None:
            group.prune()
            continue
        # Not pruner.num_heads: it also counts heads down where the group is refused, as it would lose everything.
        left = set(range(attn.proj.in_features)) - set(idxs)
        head_dim = attn.proj.in_features // attn.num_heads
        group.prune()
        resize(attn, sorted({channel // head_dim for channel in left}))
    small.zero_grad()
    return small.eval()


def within(bench: Bench, budget: float, kind: str, round_to: int, importance: str = "taylor") -> nn.Module | None:
    """The largest network within the budget that bisection over the ratio meets; None if it meets none."""
    low, high, at_low = 0.0, 1.0, bench.full
    best, at_best = None, 0
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        candidate = prune(bench.large, bench.size, ratio, kind, round_to, importance)
        flops = macs(candidate, bench.size)
        if flops <= budget * bench.full:
            high = ratio
            if flops > at_best:
                best, at_best = candidate, flops
        elif flops > at_low:  # layers that would lose everything are left whole: the ratio is too high
            high = ratio
        else:
            low, at_low = ratio, flops
    return best


def cut_by_torch_pruning(options: argparse.Namespace, bench: Bench, seed: int) -> Iterator[Contender]:
    """Networks within every budget, of every kind. seed: draws the images of the gradients."""
    if not isinstance(bench.large, VisionTransformer | SwinTransformer) and options.kinds != [NEURONS]:
        name = type(bench.large).__name__
        raise UserError(f"{name}: Torch-Pruning follows only the neurons of it; give --kinds {NEURONS}")
    began = time.perf_counter()
    accumulate(bench.large, bench.loaders.calibration(seed), options.calibration_images)
    gradients = time.perf_counter() - began
    for budget, kind in itertools.product(options.budget, options.kinds):
        began = time.perf_counter()
        network = within(bench, budget, kind, options.round_to, options.importance)
        seconds = gradients + time.perf_counter() - began
        if network is None:
            print(f"{kind} {budget:g}: left out, Torch-Pruning finds no network within this budget")
        else:
            yield Contender(f"{kind} {budget:g}", network, seconds)


def loaded(folder: Path, bench: Bench) -> Contender:
    """The compact network of a run."""
    arch, classes = nas.Architecture.load(folder), bench.large.num_classes
    if arch.num_classes != classes or tuple(arch.input_size) != bench.size:
        here = f"{arch.num_classes} classes at {tuple(arch.input_size)}"
        raise UserError(f"{folder} has {here}, its teacher {classes} at {bench.size}")
    return Contender(str(folder), nas.load(folder, device=bench.device))


def contenders(options: argparse.Namespace, bench: Bench, seed: int) -> Iterator[Contender]:
    """The networks to compare, the unpruned one first."""
    if options.control or seed == options.seeds[0]:
        yield Contender("unpruned", bench.large, trains=options.control)
    if options.method == "folder":
        yield from (loaded(folder, bench) for folder in options.folder)
    else:
        yield from cut_by_torch_pruning(options, bench, seed)


def top1(bench: Bench, network: nn.Module, batches: Any) -> float:
    """Percent, at the run's precision."""
    network.eval()
    return top_k({"it": network}, batches, bench.device, partial(autocast, bench.config, bench.device))["it_top1"]


def learn(bench: Bench, network: nn.Module, batches: Any, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """One epoch, a step at a time: (1 - w) CE + w KL(teacher || network)."""
    network.train()
    for images, target in batches:
        with autocast(bench.config, bench.device):
            with torch.no_grad():
                expert = bench.large(images)
            terms = distilled_terms(expert, network(images), target, hard=False, weight=DISTILL, temperature=1.0)
        loss = torch.stack([*terms.values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def train(bench: Bench, contender: Contender, lr: float, seed: int) -> dict[str, Any]:
    """A copy of a network trained at one rate, as it was after its best epoch: where that is and what it is worth."""
    network, batches, epochs = copy.deepcopy(contender.network), bench.loaders.train, bench.config.total_epochs()
    optimizer = make_optimizer(replace(bench.config, lr=lr), network)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=1 if epochs > 2 else epochs / 10,
        warmup_lr=lr / 100,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    best, at, state = top1(bench, network, bench.loaders.val), 0, copy.deepcopy(network.state_dict())
    for epoch in range(epochs):
        seed_everything(seed, epoch)
        batches.set_epoch(1000 * seed + epoch)  # every seed its own order and crops
        losses = []
        for step, loss in enumerate(learn(bench, network, batches, optimizer), epoch * len(batches) + 1):
            scheduler.step_update(step)
            losses.append(loss)
        score = top1(bench, network, bench.loaders.val)
        mean = float(torch.stack(losses).mean())
        print(f"  {contender.name}, lr {lr:g}, epoch {epoch + 1}: loss {mean:.3f}, held out {score:.2f}", flush=True)
        if score > best:
            best, at, state = score, epoch + 1, copy.deepcopy(network.state_dict())
    network.load_state_dict(state)
    return {"lr": lr, "epoch": at, "held_out": best, "trained": top1(bench, network, bench.loaders.test)}


def measured(options: argparse.Namespace, bench: Bench, contender: Contender, seed: int) -> list[dict[str, Any]]:
    """The rows of a network: one as cut, or one for every rate."""
    flops = macs(contender.network, bench.size)
    row: dict[str, Any] = {
        "network": contender.name,
        "seed": seed,
        "gflops": flops / 1e9,
        "share": flops / bench.full,
        "params": sum(p.numel() for p in contender.network.parameters()),
        "seconds": contender.seconds,
        "cut": top1(bench, contender.network, bench.loaders.test),
    }
    if not (contender.trains and options.epochs):
        return [row]
    rows = [row | train(bench, contender, lr, seed) for lr in options.lr]
    max(rows, key=lambda r: r["held_out"])["best"] = "*"
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line per row; what a row has not is blank."""
    lines = [[*COLUMNS]]
    for row in rows:
        lines.append(["" if row.get(name) is None else format(row[name], form) for name, form in COLUMNS.items()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def open_bench(options: argparse.Namespace, folder: Path) -> Bench:
    """The network to prune and its images, as evaluation, gradients and training need them."""
    crops_and_flips: dict[str, Any] = dict(
        scale=(0.5, 1.0), hflip=0.5, color_jitter=0.0, aa="none", reprob=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0
    )
    config = RetrainConfig(
        space=options.space, model=options.model, model_kwargs=tuple(options.model_kwargs),
        checkpoint=options.checkpoint, pretrained=False, drop_path=0.0, train="plain",
        dataset=options.dataset or ("folder" if options.data_dir else "digits"), data_dir=options.data_dir,
        opt="adamw", weight_decay=0.05, batch_size=64, epochs=max(options.epochs, 1),
        amp=options.amp, threads=options.threads, output=folder, **crops_and_flips,
    )  # fmt: skip
    parse_key_values(config.model_kwargs)
    config = with_defaults(config, get_space(options.space), "retrain")
    config.check()
    supernet, loaders, device = large_network(config, 0, options.test_images)
    size = supernet.adapter.input_size
    return Bench(config, supernet.backbone, loaders, device, size, macs(supernet.backbone, size))


def option_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("torch-pruning", "folder"), default="torch-pruning")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.5], help="shares of the unpruned network's FLOPs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[STRONGEST], help="what Torch-Pruning may cut")
    parser.add_argument("--importance", choices=("taylor", "magnitude"), default="taylor", help="what it ranks by")
    parser.add_argument("--round-to", type=int, default=2, help="of every width that Torch-Pruning leaves")
    parser.add_argument("--calibration-images", type=int, default=2048, help="for Torch-Pruning's gradients")
    parser.add_argument("--folder", type=Path, nargs="+", default=[], help="runs whose compact networks are measured")
    parser.add_argument("--space", default="vit-an-nano", help="a space; its model and data set are taken")
    parser.add_argument("--model", help="another timm name of the space's family")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoint", type=Path, help="the trained network; without one, an untrained one is cut")
    parser.add_argument("--dataset")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--test-images", type=int, help="measure on so many of the validation images, spread over them")
    parser.add_argument("--epochs", type=int, default=0, help="of training; 0: only as cut")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="peak rates, each from the same start")
    parser.add_argument("--control", action="store_true", help="train the unpruned network on, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the gradients' images and of training")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast, but for the gradients")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="the table as .csv or .json")
    return parser


def run(options: argparse.Namespace) -> None:
    """Cut or load, measure, train, print the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = open_bench(options, Path(folder))
        for seed in options.seeds:
            for contender in contenders(options, bench, seed):
                rows += measured(options, bench, contender, seed)
                if options.output:
                    WRITERS[options.output.suffix](options.output, rows)
    print_table(rows)
    print(f"top-1 % on the {bench.loaders.reported}; held out: {bench.loaders.held_out}")


def main() -> None:
    """What the options ask for, once they are known to go together."""
    options = option_parser().parse_args()
    if options.output and options.output.suffix not in WRITERS:
        raise UserError(f"--output {options.output}; expected a name that ends in {' or '.join(WRITERS)}")
    if (options.method == "folder") != bool(options.folder):
        raise UserError("--folder names the runs of --method folder: give both or neither")
    if options.method == "torch-pruning":
        torch_pruning()  # before anything that takes time
    run(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
