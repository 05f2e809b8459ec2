"""Which rotation of the stream: by energy, by the readers' weights, by the second moment of the gradient.

    python benchmarks/rotation.py --space vit-an --model NAME --checkpoint FILE --data-dir DIR --widths 288

Everything but the stream is kept: blocks read and write the first `width` channels of each rotation. Cut and not
trained; KL(large || cut) and top-1 on the validation split. A rotation weighted by gradients or by weights starts from
that by energy and lowers sum over readers and widths of tr(G R C R), R the projection onto what is left out, C the
second moment of what a reader sees, G that of the gradient there, or W^T W of its weights (docs/design.md, section 2.10).
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.importance import opened, option_parser
from nas.training.basis import first_images
from nas.training.evaluate import progress
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice, identity_slice, network_slice
from supernets.basis import Basis, rewrite
from supernets.calibration import Moment, StreamMoments, rotation_of
from supernets.streams import stage_is_centred
from supernets.supernet import Supernet

KINDS = ("energy", "weights", "gradient", "gradient of labels")


def reader_moments(supernet: Supernet, images: Iterable[Tensor], kind: str) -> list[tuple[Tensor, Tensor]]:
    """(C, G) of every reader of the stream of a network of one stage."""
    found: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as hooks:
        streams = StreamMoments(supernet, {0}, hooks)
        gradients: dict[str, Moment] = {}
        watched = {}
        if kind.startswith("gradient"):
            for key in streams.moments:
                gradients[key] = Moment()
                watched[key] = supernet.backbone.get_submodule(key)

        def watch(key: str):  # type: ignore[no-untyped-def]
            def forward(module, inputs, output):  # type: ignore[no-untyped-def]
                t = output if "norm" in key.rpartition(".")[2] else inputs[0]
                if t.requires_grad:
                    t.register_hook(lambda g: gradients[key].add(g.detach().flatten(0, -2)))

            return forward

        for key, module in watched.items():
            hooks.callback(module.register_forward_hook(watch(key)).remove)
        generator = torch.Generator().manual_seed(0)
        for batch in images:
            with torch.set_grad_enabled(bool(watched)):
                logits = supernet.large(batch)
                if watched:
                    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
                    supernet.zero_grad(set_to_none=True)
        for key, (_, moment) in streams.moments.items():
            C = moment.value()
            if watched:
                G = gradients[key].value()
            else:
                matrix = supernet.backbone.get_submodule(READER[key.rpartition(".")[2]](key)).weight
                norm = (
                    supernet.backbone.get_submodule(key).weight
                    if "norm" in key.rpartition(".")[2]
                    else supernet.backbone.norm.weight
                )
                W = matrix.detach().double() * norm.detach().double()
                G = W.T @ W
            found.append((C, G))
    return found


READER = {
    "norm1": lambda key: key.replace("norm1", "attn.qkv"),
    "norm2": lambda key: key.replace("norm2", "mlp.fc1"),
    "head": lambda key: key,
}


def weighted_rotation(
    start: Tensor, moments: list[tuple[Tensor, Tensor]], widths: list[int], steps: int, lr: float
) -> Tensor:
    """Rows lower sum over widths and readers of tr(G R C R); the first row, the mean, stays."""
    E = len(start)
    index = torch.arange(E)
    lowest = torch.minimum(index[:, None], index[None, :])
    counts = sum((lowest >= w).double() for w in widths)
    Cs, Gs = torch.stack([c for c, _ in moments]), torch.stack([g for _, g in moments])
    keep = Cs.diagonal(dim1=1, dim2=2).sum(1) > 0
    Cs, Gs = Cs[keep], Gs[keep]
    q = start.clone()
    m, v = torch.zeros_like(q), torch.zeros(())
    for step in range(steps + 1):
        q.requires_grad_(True)
        c, g = q @ Cs @ q.T, q @ Gs @ q.T
        loss = (c * g * counts).sum()
        if step in (0, steps):
            print(f"    loss {float(loss):.6g} after {step} steps", flush=True)
        if step == steps:
            return q.detach()
        (grad,) = torch.autograd.grad(loss, q)
        with torch.no_grad():
            q = q.detach()
            a = grad @ q.T
            a = a - a.T  # skew: the direction inside the group
            a[0], a[:, 0] = 0, 0
            m = 0.9 * m + 0.1 * a
            v = 0.99 * v + 0.01 * a.square().mean()
            move = -lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-30)
            q = torch.linalg.matrix_exp(move) @ q
    raise AssertionError


def main() -> None:
    """Rotate, cut, print the table."""
    parser = option_parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[288])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rotation-lr", type=float, default=1e-3)
    options = parser.parse_args()
    supernet, loaders, device = opened(options)
    images = list(first_images(loaders.calibration(0), options.images))
    moments = {
        kind: reader_moments(supernet, progress(images, kind, len(images)), kind) for kind in ("weights", "gradient")
    }
    C = torch.stack([c for c, _ in moments["gradient"]]).mean(0)
    start = rotation_of(C, stage_is_centred(supernet.adapter, 0))
    E = len(start)
    rotations = {"energy": start}
    for kind in ("weights", "gradient"):
        rotations[kind] = weighted_rotation(
            start, moments[kind], [E * k // 8 for k in range(2, 8)], options.steps, options.rotation_lr
        )
    subnets = {w: narrowed(supernet, w) for w in options.widths}
    print(f"{'rotation':<12}" + "".join(f"{f'{w}: KL':>12}{'top-1':>8}" for w in options.widths))
    nets = {}
    for kind, q in rotations.items():
        nets[kind] = Supernet(copy.deepcopy(supernet.backbone)).eval()
        rewrite(nets[kind], Basis({0: q}))
    sums = {(k, w): torch.zeros(2, dtype=torch.float64) for k in nets for w in subnets}
    seen = 0
    started = time.perf_counter()
    with torch.no_grad():
        for x, y in loaders.test:
            p = supernet.large(x).log_softmax(-1)
            seen += len(x)
            for (kind, w), total in sums.items():
                z = nets[kind].small(x, subnets[w]).log_softmax(-1)
                total += torch.tensor([(p.exp() * (p - z)).sum(), (z.argmax(-1) == y).sum()]).double()
    for kind in nets:
        print(
            f"{kind:<12}"
            + "".join(
                f"{float(sums[kind, w][0] / seen):>12.4f}{float(100 * sums[kind, w][1] / seen):>8.2f}" for w in subnets
            )
        )
    print(f"{seen} images, {time.perf_counter() - started:.0f} s")


def narrowed(supernet: Supernet, width: int) -> NetworkSlice:
    """Only the stream is narrowed."""
    from dataclasses import replace

    return network_slice(supernet.shapes, [replace(identity_slice(s), stream=width) for s in supernet.shapes])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
