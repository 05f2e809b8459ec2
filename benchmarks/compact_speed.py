"""Is the compact network as fast as its FLOPs promise? (images/s gain) / (FLOPs gain) of compact against large.

    python benchmarks/compact_speed.py --nets vit-s swin-b --batches 32 --threads 1
    python benchmarks/compact_speed.py --nets vit-s --kinds kcr-half joint     # channel selection, random channels
    python benchmarks/compact_speed.py --nets vit-s --kinds heads odd          # widths inside heads, uneven widths

Large and all compact networks run in turn in one process, fused attention on for all; each number is the median over
rounds of the ratio within a round. `part` would be 1.00 had the time gone down with the multiply-accumulates.
Random weights: speed does not depend on them.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import nn

from nas.machine import devices
from nas.machine.options import MachineOptions
from nas.machine.timing import sample_times
from search_spaces.channels import channel_count
from search_spaces.registry import SPACES
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, network_slice, prefix_slice
from supernets.compact import cut
from supernets.supernet import Supernet

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-s": ("vit_small_patch16_224", {}),
    "vit-s-4": ("vit_small_patch16_224", dict(depth=4)),
    "vit-b": ("vit_base_patch16_224", {}),
    "vit-b-4": ("vit_base_patch16_224", dict(depth=4)),
    "swin-t": ("swin_tiny_patch4_window7_224", {}),
    "swin-t-4": ("swin_tiny_patch4_window7_224", dict(depths=(2, 2, 2, 2))),
    "swin-b": ("swin_base_patch4_window7_224", {}),
    "swin-b-4": ("swin_base_patch4_window7_224", dict(depths=(2, 2, 2, 2))),
    "nano": (SPACES["swin-dan-nano"].model, dict(SPACES["swin-dan-nano"].model_kwargs)),
}


def channels(shape: BlockShape, kept: BlockSlice, fraction: float, random: torch.Generator) -> BlockSlice:
    """The slice with a random choice of the channels that its MLP reads and writes, as scores leave it."""
    count = channel_count(kept.stream, fraction)
    index = torch.randperm(kept.stream, generator=random)[:count].sort().values.tolist()
    return BlockSlice(kept.stream, kept.heads, kept.hidden, mlp_stream=tuple(index) if fraction < 1 else None)


def pruned(shape: BlockShape, part: str, random: torch.Generator) -> BlockSlice:
    """UVC's slice of a block: half of the heads or neurons, V of uneven heads, or all of these at three quarters."""
    H, d, M = shape.num_heads, shape.head_dim, shape.hidden
    heads = {"uvc-heads": H // 2, "uvc": 3 * H // 4}.get(part, H)
    hidden = {"uvc-neurons": M // 2, "uvc": 3 * M // 4}.get(part, M)
    uneven = None
    if part in ("uvc-uneven", "uvc"):
        widths = torch.randint(d // 2, d + 1, (heads,), generator=random).tolist()
        uneven = tuple(tuple(range(w)) for w in widths)
    return BlockSlice(shape.embed_dim, tuple(range(heads)), tuple(range(hidden)), v_channels=uneven)


def of_heads(shape: BlockShape, eighths: float) -> BlockSlice:
    """All heads, q, k and v narrowed to so many eighths of their width, the rest whole."""
    width = max(1, round(shape.head_dim * eighths / 8))
    return BlockSlice(shape.embed_dim, shape.num_heads, shape.hidden, qk=width, v_channels=width)


def less(shape: BlockShape, channels: float) -> BlockSlice:
    """Three quarters of the stream and of the neurons, less so many of each: widths that are multiples of less."""
    stream, hidden = (3 * n // 4 - int(channels) for n in (shape.embed_dim, shape.hidden))
    return BlockSlice(stream, shape.num_heads, hidden)


def subnets(shapes: tuple[BlockShape, ...], kinds: list[str], alphas: list[int]) -> Iterator[tuple[str, NetworkSlice]]:
    """Every network to measure, by name. kinds: an, inner and stream width; searched ones mix their candidates."""
    for kind in kinds:
        random = torch.Generator().manual_seed(0)
        if kind in ("stream", "inner"):
            for alpha in alphas:
                if all(shape.num_heads % alpha == 0 for shape in shapes):
                    yield f"{kind} {alpha}", network_slice(shapes, [prefix_slice(s, alpha, kind) for s in shapes])
            continue
        if kind in ("heads", "odd"):  # what free widths may be
            name, narrowed, sizes = {
                "heads": ("q/k, v {}/8", of_heads, (7, 6, 5, 4, 3, 2, 1.5, 1)),
                "odd": ("3/4 - {}", less, (0, 16, 8, 4, 2, 1)),
            }[kind]
            for size in sizes:
                yield name.format(size), network_slice(shapes, [narrowed(s, size) for s in shapes])
            continue
        if kind.startswith("uvc"):
            blocks = [pruned(shape, kind, random) for shape in shapes]
            if kind in ("uvc-skip", "uvc"):  # the last block of every four
                blocks = [replace(b, attn=i % 4 != 3, mlp=i % 4 != 3) for i, b in enumerate(blocks)]
            yield kind, network_slice(shapes, blocks)
            continue
        allowed = [[a for a in alphas if shape.num_heads % a == 0] or [1] for shape in shapes]
        drawn = [a[int(torch.randint(len(a), (), generator=random))] for a in allowed]
        fractions = [(1.0, 0.75, 0.5, 0.25)[int(torch.randint(4, (), generator=random))] for _ in shapes]
        if kind.startswith("dan"):
            yield (
                kind,
                network_slice(shapes, [prefix_slice(s, a, kind[4:]) for s, a in zip(shapes, drawn, strict=True)]),
            )
            continue
        if kind != "joint":
            drawn = [1] * len(shapes)
        if kind == "kcr-half":
            fractions = [0.5] * len(shapes)
        if kind == "kcr-quarter":
            fractions = [0.25] * len(shapes)
        slices = [
            channels(shape, prefix_slice(shape, alpha, "stream"), fraction, random)
            for shape, alpha, fraction in zip(shapes, drawn, fractions, strict=True)
        ]
        yield kind, network_slice(shapes, slices)


def main() -> None:
    kinds = ["stream", "inner", "dan-stream", "dan-inner", "kcr", "kcr-half", "kcr-quarter", "joint"]
    kinds += ["uvc", "uvc-skip", "uvc-heads", "uvc-uneven", "uvc-neurons", "heads", "odd"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["vit-s", "swin-t"])
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=["stream", "inner"])
    parser.add_argument("--alphas", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0, help="per network, after five rounds")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, operator by operator")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    autocast = partial(devices.autocast, MachineOptions(amp=args.amp), device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads,"
        f" {'bf16 autocast' if args.amp else 'float32'}"
    )
    print(
        f"{'network':9} {'subnet':12} {'batch':>5} {'large/s':>8} {'compact/s':>9} {'gain':>6} {'FLOPs':>6} {'part':>5}"
    )
    for net in args.nets:
        torch.manual_seed(0)
        supernet = Supernet(timm.create_model(NETS[net][0], **NETS[net][1])).to(device).eval()
        chosen = dict(subnets(supernet.shapes, args.kinds, args.alphas))
        networks: dict[str, nn.Module] = {"large": supernet.backbone}
        networks |= {name: cut(supernet.backbone, subnet).eval() for name, subnet in chosen.items()}
        for batch in args.batches:
            images = torch.randn(batch, *supernet.adapter.input_size, device=device)
            times = sample_times(networks, images, autocast, args.rounds, args.seconds * len(chosen))
            speeds = {which: batch / statistics.median(t) for which, t in times.items()}
            for name, subnet in chosen.items():
                flops = supernet.flops() / supernet.flops(subnet)
                gain = statistics.median(a / b for a, b in zip(times["large"], times[name], strict=True))
                print(
                    f"{net:9} {name:12} {batch:5} {speeds['large']:8.1f} {speeds[name]:9.1f} {gain:6.2f}"
                    f" {flops:6.2f} {gain / flops:5.2f}",
                    flush=True,
                )
            for which, network in networks.items() if args.profile else ():
                with torch.no_grad(), torch.profiler.profile() as profile, autocast():
                    network(images)
                print(which, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16,
                      max_name_column_width=40))  # fmt: skip


if __name__ == "__main__":
    main()
