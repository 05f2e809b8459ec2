"""Importance order: sort heads, hidden neurons and stream channels so that a prefix keeps the best (section 2.7).

A permutation of the backbone's own parameters that leaves its function unchanged: one order of the stream per
stage, the same for everything that reads or writes it and in all four quadrants of patch merging; one order of
the heads and one of the hidden neurons per block.

Orders are named "stream.<stage>", "<block>.heads" and "<block>.hidden"; order[i] is the old place of what
stands at i.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from search_spaces.errors import UserError
from supernets.axes import qkv_rows, unit_sizes
from supernets.supernet import Supernet

Orders = Mapping[str, list[int]]


Axis = tuple[nn.Parameter, int, slice, str, dict[str, int], dict[str, str]]


def _axes(supernet: Supernet) -> Iterator[Axis]:
    """Every sorted axis: parameter, dimension, rows, their letters and these' sizes, and the order's name by letter.

    rows: all of the dimension; of fused q, k and v one part after the other.
    """
    adapter = supernet.adapter
    for name, axes in adapter.outer_axes.items():
        p = adapter.backbone.get_parameter(name)
        for dim, axis in enumerate(axes):
            if axis is not None:
                letters, stage = axis
                sizes = {"4": 4, "S": p.shape[dim] // 4 if letters == "4S" else p.shape[dim]}
                yield p, dim, slice(None), letters, sizes, {"S": f"stream.{stage}"}
    for block_name, block, shape in zip(adapter.block_names, adapter.blocks(), supernet.shapes, strict=True):
        stream = f"stream.{shape.stage}"
        orders = {"S": stream, "R": stream, "H": f"{block_name}.heads", "M": f"{block_name}.hidden"}
        sizes = unit_sizes(shape)
        for name in adapter.block_parameters(block):
            for dim, letters in enumerate(adapter.block_axes[name]):
                p = adapter.block_parameter(block, name)
                if letters == "3HD":
                    q, k, v = itertools.pairwise(itertools.accumulate(qkv_rows(shape), initial=0))
                    for rows, part in ((q, "HD"), (k, "HD"), (v, "HV")):
                        yield p, dim, slice(*rows), part, sizes, orders
                elif letters != ".":
                    yield p, dim, slice(None), letters, sizes, orders


def group_scores(
    supernet: Supernet, weight_score: Callable[[nn.Parameter], Tensor | None], inside: bool = False
) -> dict[str, Tensor]:
    """Sum a score of single weights over every group: order's name -> (units,) in float64.

    weight_score: parameter -> scores of its shape, or None to leave it out. inside: also of the channels of q and k and
    of v inside a block's heads, over all of its heads: "<block>.qk" and "<block>.v", (d,).
    """
    totals: dict[str, Tensor] = {}
    for p, dim, rows, letters, sizes, orders in _axes(supernet):
        scores = weight_score(p)
        if scores is None:
            continue
        own = _rows(scores.detach(), dim, rows)
        factors = own.double().unflatten(dim, [sizes[letter] for letter in letters])
        if inside and "H" in orders:
            block = orders["H"].removesuffix(".heads")
            orders = orders | {"D": f"{block}.qk", "V": f"{block}.v"}
        for offset, letter in enumerate(letters):
            if letter in orders:
                others = [d for d in range(factors.dim()) if d != dim + offset]
                group = factors.sum(others) if others else factors
                totals[orders[letter]] = totals.get(orders[letter], 0) + group
    return totals


def _rows(t: Tensor, dim: int, rows: slice) -> Tensor:
    """A view of some rows of a dimension."""
    return t[(slice(None),) * dim + (rows,)]


def magnitude_scores(supernet: Supernet) -> dict[str, Tensor]:
    """Squared norm of every group."""
    return group_scores(supernet, lambda p: p.detach().square())


def taylor_scores(supernet: Supernet, inside: bool = False) -> dict[str, Tensor]:
    """First-order Taylor: |w * dL/dw| summed over every group, from the gradients that the parameters hold."""
    return group_scores(supernet, lambda p: None if p.grad is None else (p.detach() * p.grad).abs(), inside)


def taylor_lost(supernet: Supernet, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What goes with all but the first units, by Taylor: names and shapes as in `Basis.lost`.

    scores: those of `taylor_pass` with inside. The heads of a block share its channels' scores alike.
    """
    lost = {}
    for name, shape in zip(supernet.adapter.block_names, supernet.shapes, strict=True):
        for part in (*(("heads", "qk", "v") if shape.attn else ()), *(("hidden",) if shape.mlp else ())):
            own = scores[f"{name}.{part}"].cpu()
            own = own[list(shape.qk_order)] if part == "qk" and shape.qk_order else own
            tails = own.flip(0).cumsum(0).flip(0)
            own = torch.cat([tails, tails.new_zeros(1)])
            lost[f"{name}.{part}"] = own.expand(shape.num_heads, -1) / shape.num_heads if part == "v" else own
    return lost


def orders_of(scores: Mapping[str, Tensor], supernet: Supernet | None = None) -> dict[str, list[int]]:
    """Descending order of every group's scores; equal scores keep their place.

    supernet: whose heads are left out where they stay (`Adapter.heads_stay`).
    """
    stay = () if supernet is None else fixed_orders(supernet)
    sorted_by = {name: torch.argsort(s, descending=True, stable=True) for name, s in scores.items() if name not in stay}
    return {name: order.tolist() for name, order in sorted_by.items()}


def fixed_orders(supernet: Supernet) -> set[str]:
    """Units that cannot be sorted: the heads of blocks that all read one bias by relative positions."""
    adapter = supernet.adapter
    return {f"{name}.heads" for name in adapter.block_names} if adapter.heads_stay else set()


def check_orders(supernet: Supernet, orders: Orders) -> None:
    """UserError when the orders are another network's."""
    known: dict[str, int] = {}
    for _, _, _, letters, sizes, names in _axes(supernet):
        known |= {names[letter]: sizes[letter] for letter in letters if letter in names}
    stay = fixed_orders(supernet)
    for name, order in orders.items():
        if name in stay and order != sorted(order):
            raise UserError(f"importance order '{name}': all blocks read one bias by head, whose order stays")
        if known.get(name) != len(order):
            raise UserError(
                f"importance order '{name}' sorts {len(order)} units, the backbone has {known.get(name, 'none')};"
                " the architecture was made for another network"
            )


@torch.no_grad()
def permute(supernet: Supernet, orders: Orders) -> None:
    """Reorder the backbone's parameters in place. UserError when the orders are another network's."""
    check_orders(supernet, orders)
    for p, dim, rows, letters, sizes, names in _axes(supernet):
        if not any(names.get(letter) in orders for letter in letters):
            continue
        own = _rows(p.detach(), dim, rows)
        moved = own.unflatten(dim, [sizes[letter] for letter in letters])
        for offset, letter in enumerate(letters):
            if letter in names and names[letter] in orders:
                index = torch.tensor(orders[names[letter]], device=p.device)
                moved = moved.index_select(dim + offset, index)
        own.copy_(moved.flatten(dim, dim + len(letters) - 1))


def taylor_pass(
    supernet: Supernet,
    batches: list[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    reduce_gradients: Callable[[Iterable[nn.Parameter]], None] | None = None,
    inside: bool = False,
) -> dict[str, Tensor]:
    """Taylor scores of the large network, summed over batches of (images, target). Leaves no gradients behind.

    reduce_gradients: makes a batch's gradients those of all processes' batches, where there are several. inside: as in
    `group_scores`.
    """
    was_training = supernet.training
    supernet.eval()
    totals: dict[str, Tensor] = {}
    for images, target in batches:
        supernet.zero_grad(set_to_none=True)
        loss(supernet.large(images), target).backward()
        if reduce_gradients is not None:
            reduce_gradients(supernet.parameters())
        for name, score in taylor_scores(supernet, inside).items():
            totals[name] = totals.get(name, 0) + score
    supernet.zero_grad(set_to_none=True)
    supernet.train(was_training)
    return totals
