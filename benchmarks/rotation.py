"""Which rotation of the stream: by energy, by the readers' weights, by the second moment of the gradient; or an order.

    python benchmarks/rotation.py --space vit-an --model NAME --checkpoint FILE --data-dir DIR --epochs 0 --widths 288

Of a network of one stage everything but the stream is kept: blocks read and write the first `width` channels of each
rotation. Cut and not trained; KL(large || cut) and top-1 on the validation split.

The weighted rotations start from that by energy and lower, over readers and a range of widths, the sum of tr(G R C R):
R projects onto what is left out, C is the second moment of what a reader sees, G that of the gradient there (labels
drawn from the network's own prediction), or W^T W of the reader's weights. Readers are joined in groups.
"""

import copy
import itertools
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.importance import opened, option_parser
from nas.data.loaders import Loaders
from nas.machine.progress import progress
from nas.training.basis import TAYLOR_BATCHES
from nas.training.calibration import images_from
from nas.training.losses import cross_entropy
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice, identity_slice, network_slice
from supernets.basis import Basis, rewrite
from supernets.calibration import Moment, rotation_of
from supernets.importance import orders_of, taylor_pass
from supernets.streams import Reading, readings, stage_is_centred
from supernets.supernet import Supernet

GROUPS, STEPS, RATE = 5, 120, 1e-3

Pair = tuple[Tensor, Tensor]  # C and G, (E, E) float64


def reader_moments(
    supernet: Supernet, images: Iterable[Tensor], readers: list[Reading]
) -> tuple[list[Pair], list[Pair]]:
    """Of every reader (C, G of the gradient) and (C, W^T W)."""
    model: Any = supernet.backbone
    seen, gradients = [Moment() for _ in readers], [Moment() for _ in readers]

    def watch(i: int, norm: Any, _: Any, inputs: tuple[Tensor]) -> None:
        y = inputs[0]
        seen[i].add(((y if norm.bias is None else y - norm.bias) / norm.weight).detach().flatten(0, -2))
        y.register_hook(lambda g: gradients[i].add((g * norm.weight).detach().flatten(0, -2)))

    with ExitStack() as hooks:
        for i, reading in enumerate(readers):
            layer = model.get_submodule(reading.matrices[0].removesuffix(".weight"))
            hook = partial(watch, i, model.get_submodule(reading.norm))
            hooks.callback(layer.register_forward_pre_hook(hook).remove)
        generator = torch.Generator().manual_seed(0)
        for batch in images:
            logits = supernet.large(batch)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            supernet.zero_grad(set_to_none=True)
    weights = []
    for reading in readers:
        w = torch.cat([model.get_parameter(name) for name in reading.matrices]).detach().double()
        w = w * model.get_submodule(reading.norm).weight.detach().double()
        weights.append(w.T @ w)
    c = [moment.value() for moment in seen]
    return list(zip(c, [m.value() for m in gradients], strict=True)), list(zip(c, weights, strict=True))


def grouped(pairs: list[Pair]) -> list[Pair]:
    """Neighbouring readers joined: C weighted by the trace of G, G summed."""
    joined = []
    for i in range(0, len(pairs), -(-len(pairs) // GROUPS)):
        part = pairs[i : i - (-len(pairs) // GROUPS)]
        traces = torch.stack([g.trace() for _, g in part])
        c = torch.stack([trace * c for trace, (c, _) in zip(traces, part, strict=True)]).sum(0) / traces.sum()
        joined.append((c, torch.stack([g for _, g in part]).sum(0)))
    return joined


def weighted_rotation(start: Tensor, pairs: list[Pair]) -> Tensor:
    """Rows that lower tr(G R C R), summed over widths from a quarter to seven eighths; the first, the mean, stays."""
    E = len(start)
    place = torch.arange(E)
    lowest = torch.minimum(place[:, None], place[None, :])
    counts = torch.stack([(lowest >= E * k // 8).double() for k in range(2, 8)]).sum(0)
    C, G = (torch.stack(each) for each in zip(*pairs, strict=True))
    q, first, second = start.clone(), torch.zeros_like(start), 0.0
    for step in range(1, STEPS + 1):
        leaf = q.clone().requires_grad_()
        loss = ((leaf @ C @ leaf.T) * (leaf @ G @ leaf.T) * counts).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        turn = gradient @ q.T
        turn = turn - turn.T  # inside the group
        turn[0], turn[:, 0] = 0, 0
        first, second = 0.9 * first + 0.1 * turn, 0.99 * second + 0.01 * float(turn.square().mean())
        pace = RATE / (1 - 0.9**step) / ((second / (1 - 0.99**step)) ** 0.5 + 1e-300)
        q = torch.linalg.matrix_exp(-pace * first) @ q
    return q


def lost(q: Tensor, pairs: list[Pair], width: int) -> float:
    """The sum over readers of tr(G R C R) at a width."""
    rest = q[width:]
    return sum(float(((rest @ c @ rest.T) * (rest @ g @ rest.T)).sum()) for c, g in pairs)


def main() -> None:
    """Rotate, cut, print the table."""
    parser = option_parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[288])
    parser.add_argument("--calibration-images", type=int, default=384)
    options = parser.parse_args()
    supernet, loaders, _ = opened(options)
    if len({shape.stage for shape in supernet.shapes}) > 1:
        raise UserError("this benchmark takes networks of one stage")
    images = images_from(loaders.calibration(0), torch.device("cpu"), 0, options.calibration_images)
    batches = [batch for batch, _ in images]
    readers = readings(supernet.adapter)
    gradient, weights = reader_moments(supernet, progress(batches, "second moments", len(batches)), readers)
    start = rotation_of(torch.stack([c for c, _ in gradient]).mean(0), stage_is_centred(supernet.adapter, 0))
    labelled = list(itertools.islice(loaders.train, TAYLOR_BATCHES))
    order = orders_of(taylor_pass(supernet, labelled, cross_entropy))["stream.0"]
    bases = {"order, Taylor": Basis(orders={"stream.0": order}), "energy": Basis({0: start})}
    rotations = {
        name: weighted_rotation(start, grouped(pairs)) for name, pairs in (("weights", weights), ("gradient", gradient))
    }
    columns = "".join(f"{f'{w}: surrogate':>16}{'KL':>8}{'top-1':>8}" for w in options.widths)
    print(f"{'':<14}{columns}")
    for name, basis in (bases | {name: Basis({0: q}) for name, q in rotations.items()}).items():
        other = Supernet(copy.deepcopy(supernet.backbone)).eval()
        rewrite(other, basis)
        q, cells = basis.streams.get(0), ""
        for width in options.widths:
            kl, top1 = measured(supernet, other, narrowed(supernet, width), loaders)
            surrogate = "" if q is None else f"{lost(q, gradient, width):.5f}"
            cells += f"{surrogate:>16}{kl:>8.4f}{top1:>8.2f}"
        print(f"{name:<14}{cells}", flush=True)
    print(f"{loaders.test.num_images} images of the {loaders.reported}; surrogate: of the gradient, all readers")


@torch.no_grad()
def measured(large: Supernet, rotated: Supernet, subnet: NetworkSlice, loaders: Loaders) -> tuple[float, float]:
    """KL(large || subnet), mean over images, and the subnet's top-1 in percent."""
    kl, hits, seen = 0.0, 0, 0
    for images, target in loaders.test:
        p, q = large.large(images).log_softmax(-1), rotated.small(images, subnet).log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        hits += int((q.argmax(-1) == target).sum())
        seen += len(target)
    return kl / seen, 100 * hits / seen


def narrowed(supernet: Supernet, width: int) -> NetworkSlice:
    """Only the stream is narrowed."""
    return network_slice(supernet.shapes, [replace(identity_slice(shape), stream=width) for shape in supernet.shapes])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
