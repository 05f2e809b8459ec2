"""What a search step costs, in plain training steps of the same backbone, all measured in turn in one run.

    python benchmarks/search_step.py                    # Swin and ViT at 224 px, a few minutes on two cores
    python benchmarks/search_step.py --nets nano        # the embedded default, for information

For each network and width: DAN's search step (large, mixture, both backward passes, both optimisers) over the plain
step, beside the ratio of their multiply-accumulates and beside the same mixture done with full-width masks. Then
KCR's step over the plain one (its counts add no pass: 2 by MACs), and joint's over DAN's (1 by MACs). Both with the
truncated nuclear norm on the features, against a V that has been refreshed once. Last, the second stage: a retrain
step at the smallest factor over a plain step of the large network and one of the compact network, cut out, together.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.machine import devices
from nas.machine.options import MachineOptions
from nas.objectives.adjoined import Adjoined
from nas.objectives.kernel import KernelTerm
from nas.prices.costs import PricedSpace, priced
from nas.prices.flops import FLOPS
from nas.searchers.channels import TopK
from nas.searchers.gradient import Gradient
from nas.training.losses import cross_entropy
from nas.training.objective import Objective, Step
from search_spaces.method import Settings
from search_spaces.registry import SPACES, get_space
from search_spaces.slices import network_slice, prefix_slice
from search_spaces.space import make_space
from supernets.axes import BlockAxes, head_widths, unit_sizes
from supernets.compact import cut
from supernets.layers import layer_scale, mlp
from supernets.layers import norm as sliced_norm
from supernets.supernet import Supernet
from supernets.timm_block import TimmBlockAdapter

NETS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "swin": (
        "swin-dan",
        "swin_base_patch4_window7_224",
        dict(depths=(2, 2, 2, 2), drop_path_rate=0.0),
        (1, 2, 4, 8),
    ),
    "swin-t": ("swin-dan", "swin_tiny_patch4_window7_224", dict(drop_path_rate=0.0), (1, 2, 4, 8)),
    "vit": ("vit-dan", "vit_base_patch16_224", dict(depth=4), (1, 2, 4)),
    "nano": (
        "swin-dan-nano",
        SPACES["swin-dan-nano"].model,
        dict(SPACES["swin-dan-nano"].model_kwargs),
        (1, 2, 4, 8),
    ),
}


class Masked(Gradient):
    """The same mixture as other toolkits compute it: every candidate at full width, the unkept part masked."""

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        from nas.searchers.gumbel import step_generator, temperature
        from nas.training.losses import adjoined_weight, kl_divergence

        draw = self.choices.sample(temperature(step.t), step_generator(self.seed, step.number))
        p, q = self.supernet.large(images), self.masked(images, draw)
        lam = adjoined_weight(step.t)
        return {
            "ce": cross_entropy(p, target),
            "kl": lam * kl_divergence(p, q),
            "penalty": lam * self.penalty(draw),
        }

    def masked(self, images: Tensor, draw: list[dict[str, Tensor]]) -> Tensor:
        """Logits (B, classes) of the mixture at a draw."""
        adapter = self.supernet.adapter
        assert isinstance(adapter, TimmBlockAdapter)
        gates = self.costs.stage_gates(draw)
        outer = adapter.outer(self.supernet.identity().stage_widths, gates)
        x, stage = adapter.stem(outer, images), 0
        x = x if gates is None else x * gates[0]
        identity = self.supernet.identity().blocks
        for i, (block, shape, g) in enumerate(zip(adapter.blocks(), self.supernet.shapes, draw, strict=True)):
            if shape.stage != stage:
                stage = shape.stage
                x = adapter.enter_stage(stage, outer, x)
                x = x if gates is None else x * gates[stage]
            params = adapter.block_parameters(block)
            slices = [option.slice for option in self.costs.options[i]]
            masked = [mask_block(params, adapter.block_axes, shape, s) for s in slices]
            for half in ("attn", "mlp"):
                total = torch.zeros_like(x)
                for s, p, weight in zip(slices, masked, g["alpha"], strict=True):
                    norm, name = (block.norm1, "norm1") if half == "attn" else (block.norm2, "norm2")
                    kept = {k: v[: s.stream] for k, v in p.items() if k.startswith(name)}
                    y = F.pad(sliced_norm(norm, kept, name, x[..., : s.stream]), (0, shape.embed_dim - s.stream))
                    y = (
                        adapter.attend(block, p, head_widths(identity[i], shape), y)
                        if half == "attn"
                        else mlp(block.mlp, p, y)
                    )
                    total = total + weight * layer_scale(p, "ls1.gamma" if half == "attn" else "ls2.gamma", y)
                x = x + total
        return adapter.classify(outer, adapter.pool(outer, x))


def mask_block(params: dict[str, Tensor], axes: BlockAxes, shape: Any, kept: Any) -> dict[str, Tensor]:
    """The block's parameters with everything that the slice drops multiplied by zero."""
    sizes = unit_sizes(shape)
    keep = {"S": kept.stream, "R": kept.stream, "H": kept.heads, "M": kept.hidden}
    masked = {}
    for name, p in params.items():
        for dim, letters in enumerate(axes[name]):
            mask = torch.ones(())
            for letter in letters:
                size = sizes.get(letter, p.shape[dim])
                mask = mask[..., None] * (torch.arange(size) < keep.get(letter, size)).to(p.dtype)
            p = p * mask.flatten().to(p.device).view([-1 if d == dim else 1 for d in range(p.dim())])
        masked[name] = p
    return masked


def mac_ratio(costs: PricedSpace, gated: bool) -> float:
    """MACs of a search step over a plain one: the large pass plus the small pass of every candidate."""
    blocks = sum(sum(o.cost for o in row) if not gated else max(o.cost for o in row) for row in costs.options)
    identity = sum(max(o.cost for o in row) for row in costs.options)
    return (2 * costs.full - identity + blocks) / costs.full


def costs_of(space: str, supernet: Supernet, width: str, alphas: tuple[int, ...]) -> PricedSpace:
    """A space over a supernet, priced in FLOPs."""
    own = get_space(space)
    choices = make_space(own.name, own.method, Settings(width, alphas), supernet.shapes)
    return priced(choices, supernet.adapter.costs, FLOPS)


def objectives(net: str, width: str, size: int) -> tuple[dict[str, Objective], PricedSpace]:
    """The searches' objectives, the masked one and the retrain's, over the same supernet."""
    name, model, model_kwargs, alphas = NETS[net]
    torch.manual_seed(0)
    extra = {} if net == "nano" else {"img_size": size, "num_classes": 100}
    supernet = Supernet(timm.create_model(model, **model_kwargs | extra))
    costs = costs_of(name, supernet, width, alphas)
    make: dict[str, Any] = dict(budget=0.5, gamma=0.0, seed=0, total_steps=100)
    shapes = supernet.shapes
    alpha = next(a for a in range(2, 9) if all(shape.num_heads % a == 0 for shape in shapes))
    half = network_slice(shapes, [prefix_slice(shape, alpha, width) for shape in shapes])
    kinds: dict[str, Objective] = {"retrain": Adjoined(supernet, half)}
    kinds |= {"search": Gradient(supernet, costs, **make), "masked": Masked(supernet, costs, **make)}
    for method in ("kcr", "joint"):
        own = costs_of(name.replace("dan", method), supernet, width, alphas)
        kinds[method] = TopK(supernet, own, kernel=KernelTerm(1e-2, 0.3), **make)
    return kinds, costs


def steps(
    kinds: dict[str, Objective], images: Tensor, target: Tensor, autocast: Callable[[], Any]
) -> dict[str, Callable[[], None]]:
    """One training step of each kind, weights and logits updated."""
    backbone = next(iter(kinds.values())).supernet.backbone
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-5, fused=True)
    at = Step(t=0.5, number=50, total=100)

    def plain(network: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            with autocast():
                loss = cross_entropy(network(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def of(objective: Objective) -> Callable[[], None]:
        logits = objective.architecture_parameters()
        arch = torch.optim.Adam(logits, lr=1e-3) if logits else None

        def step() -> None:
            with autocast():
                terms = objective(images, target, at)
            torch.stack([v.float() for v in terms.values()]).sum().backward()
            optimizer.step()
            if arch is not None:
                arch.step()
            objective.after_step(at)
            objective.zero_grad()

        return step

    for objective in kinds.values():
        if isinstance(objective, TopK):
            with torch.no_grad(), autocast():
                objective(images, target, Step(t=0.0, number=0, total=100))
            objective.after_epoch()  # from here on there is a V
    alone = {"plain": plain(backbone, optimizer)}
    if isinstance(retrain := kinds.get("retrain"), Adjoined):
        compact = cut(backbone, retrain.members.widest).train()
        alone["compact"] = plain(compact, torch.optim.AdamW(compact.parameters(), lr=1e-5, fused=True))
    return alone | {kind: of(objective) for kind, objective in kinds.items()}


def measure(kinds: dict[Any, Callable[[], None]], rounds: int, cuda: bool) -> dict[Any, list[float]]:
    """Seconds of every kind, in turn, after one round of warm-up."""
    times: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, step in kinds.items():
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                times[kind].append(time.perf_counter() - start)
    return times


SHARES = {  # of a step's time, by the beginning of the operator's name
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot", "aten::mkldnn_conv", "aten::convol"),
    "activations": ("aten::gelu", "aten::_softmax", "aten::native_layer_norm"),
    "optimiser": ("aten::_fused_adamw_", "Optimizer"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::_index", "aten::slice", "aten::fill_", "aten::roll"),
}


def shares(step: Callable[[], None]) -> dict[str, float]:
    """What part of one step's time each kind of operator takes, by torch's profiler; what is left over is `rest`."""
    with torch.profiler.profile() as profile:
        step()
    events = {
        event.key: max(event.self_cpu_time_total, event.self_device_time_total) for event in profile.key_averages()
    }
    total = sum(events.values())
    parts = {
        name: sum(t for key, t in events.items() if key.startswith(starts)) / total for name, starts in SHARES.items()
    }
    return parts | {"rest": 1 - sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["swin", "vit"])
    parser.add_argument("--widths", nargs="+", choices=["stream", "inner"], default=["stream", "inner"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes")
    args = parser.parse_args()
    device = torch.device(args.device)

    autocast = partial(devices.autocast, MachineOptions(amp=args.amp), device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads,"
        f" {'bf16 autocast' if args.amp else 'float32'}, batch {args.batch_size}, median of {args.rounds} rounds"
    )
    print(f"{'network':8} {'width':7} {'plain s':>8} {'search s':>9} {'search/plain':>13} {'MACs':>6}"
          f" {'over MACs':>10} {'masked/plain':>13} {'kcr/plain':>10} {'joint/search':>13}"
          f" {'retrain/both':>13}")  # fmt: skip
    for net in args.nets:
        for width in args.widths:
            kinds, costs = objectives(net, width, args.img_size)
            for objective in kinds.values():
                objective.to(device).train()
            size = objective.supernet.adapter.input_size
            images = torch.randn(args.batch_size, *size, device=device)
            target = torch.randint(0, 10, (args.batch_size,), device=device)
            run = steps(kinds, images, target, autocast)
            times = measure(run, args.rounds, device.type == "cuda")
            plain = times["plain"]
            ratio = {
                kind: statistics.median(a / b for a, b in zip(times[kind], times[base], strict=True))
                for kind, base in (("search", "plain"), ("masked", "plain"), ("kcr", "plain"), ("joint", "search"))
            }
            both = [a + b for a, b in zip(plain, times["compact"], strict=True)]
            retrain = statistics.median(a / b for a, b in zip(times["retrain"], both, strict=True))
            macs = mac_ratio(costs, gated=width == "inner")
            print(
                f"{net:8} {width:7} {statistics.median(plain):8.3f} {statistics.median(times['search']):9.3f}"
                f" {ratio['search']:13.2f} {macs:6.2f} {ratio['search'] / macs:10.2f} {ratio['masked']:13.2f}"
                f" {ratio['kcr']:10.2f} {ratio['joint']:13.2f} {retrain:13.2f}",
                flush=True,
            )
            for kind in ("plain", "search") if args.profile else ():
                print(f"  {kind}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares(run[kind]).items()))


if __name__ == "__main__":
    main()
