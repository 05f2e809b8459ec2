"""What the kept weights can take over of what a cut leaves out: least squares, layer by layer (section 2.11).

Two networks run side by side over images, half by half: the large one, and the subnet with the layers that are refitted
so far. A layer of the subnet that reads the stream is fitted to what the large network has at its kept units; one that
writes it to the large network's stream in the kept channels, so that what earlier layers got wrong is corrected; the
classifier to the logits, and from there to the prediction; of a network without one, the layer in its place to the
features. Kept of the images are Gram matrices, both streams, and one half's units.

Every fit is of a change D of the weights that the slice has: min |X D^T - R|^2 + ridge |D|^2, R what they leave. Where
a cut removes nothing R is zero, and so is D.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.slices import BlockShape, BlockSlice, Kept, NetworkSlice, count
from supernets.axes import HalfAxes, Params, slice_block, take, within
from supernets.layers import linear, norm
from supernets.least_squares import gram_matrix
from supernets.supernet import Supernet

Run = Callable[[Any, BlockShape, Params, BlockSlice, Tensor], Tensor]  # an adapter's attention_half or mlp_half
Values = dict[str, Tensor]  # a subnet's parameters by their names in the backbone, as large as the slice


@dataclass(frozen=True)
class Ridge:
    """Shares of the mean diagonal of a layer's Gram matrix. The classifier overfits first.

    prediction: of the classifier's last step, to the divergence of predictions; infinite: it is not made.
    """

    layers: float = 1e-3
    classifier: float = 1e-2
    prediction: float = 5e-2


class Residual:
    """Least squares of what a layer leaves: X (rows, n) its input, R (rows, m) what its output lacks."""

    def __init__(self, bias: bool) -> None:
        """bias: whether the layer has one, which takes the means over."""
        self.bias, self.rows = bias, 0
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.sums: tuple[Any, Any] = 0.0, 0.0
        self.origin: Any = 0.0
        self.precision = torch.finfo(torch.float64).eps

    def add(self, x: Tensor, r: Tensor) -> None:
        """(..., n) and (..., m): products in their own precision over a batch, sums in float64."""
        x, r = x.flatten(0, -2), r.flatten(0, -2)
        if self.bias and not self.rows:  # near the mean, lest a variance be lost beside its square
            self.origin, self.precision = x.mean(0), torch.finfo(x.dtype).eps
        x = x - self.origin
        self.gram, self.cross = self.gram + gram_matrix(x).double(), self.cross + (x.T @ r).double()
        self.sums = self.sums[0] + x.sum(0, dtype=torch.float64), self.sums[1] + r.sum(0, dtype=torch.float64)
        self.rows += len(x)

    def solve(self, ridge: float, through: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The change (m, n) of the layer's matrix and that (m,) of its bias, float64.

        through (m', m): R is taken through this first, and m' outputs are fitted. What varies by no more than rounding
        is fitted by the bias alone.
        """
        gram, cross = self.gram / self.rows, self.cross / self.rows
        x, r = (total / self.rows for total in self.sums)
        held = gram.new_zeros(())
        if self.bias:
            gram, cross = gram - torch.outer(x, x), cross - torch.outer(x, r)
            x = x + self.origin
            held = self.precision * (gram.diagonal() + x.square()).mean()
        if through is not None:
            cross, r = cross @ through.T, through @ r
        held = (held + ridge * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)
        change = _solved(gram, held, cross).T
        return change, r - change @ x if self.bias else None


def _solved(gram: Tensor, held: Tensor, cross: Tensor) -> Tensor:
    """(gram + held)^-1 cross. Products in float32 may be below zero in directions without images: there held alone."""
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(held.expand(len(gram))))
    if not failed:
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(gram)
    found: Tensor = vectors / (values.clamp_min(0) + held) @ (vectors.T @ cross)
    return found


def towards_prediction(
    x: Tensor, expected: Tensor, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """A classifier moved on to the least divergence KL(expected || its prediction), in nats per image.

    x: (B, n) features. expected: (B, m) logits. weight: (m, n) and bias (m,), float64. ridge: of a change D, as a share
    of the features' mean variance v (mean square where there is no bias): ridge/2 v |D|^2. By L-BFGS.
    """
    x = x.double()
    mean = x.mean(0) if bias is not None else torch.zeros_like(x[0])
    x = x - mean
    held, target = ridge * x.square().mean() / 2, expected.double().log_softmax(1)
    at_mean = weight @ mean if bias is None else bias + weight @ mean
    change, added = (
        torch.zeros_like(weight, requires_grad=True),
        torch.zeros_like(at_mean, requires_grad=bias is not None),
    )
    optimizer = torch.optim.LBFGS(
        [p for p in (change, added) if p.requires_grad], max_iter=50, history_size=20, line_search_fn="strong_wolfe"
    )

    def lost() -> Tensor:
        optimizer.zero_grad()
        q = (x @ (weight + change).T + at_mean + added).log_softmax(1)
        loss = F.kl_div(q, target, log_target=True, reduction="batchmean") + held * change.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(lost)
    weight = weight + change.detach()
    return weight, None if bias is None else at_mean + added.detach() - weight @ mean


@torch.no_grad()
def write(supernet: Supernet, subnet: NetworkSlice, values: Mapping[str, Tensor]) -> None:
    """Put refitted values where a subnet has them of the backbone's parameters, in place."""
    adapter = supernet.adapter
    blocks = dict(zip(adapter.block_names, zip(adapter.shapes, subnet.blocks, strict=True), strict=True))
    for name, value in values.items():
        p = supernet.backbone.get_parameter(name)
        places = torch.arange(p.numel(), device=p.device).view(p.shape)
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            kept = adapter.slice_outer(name, places, subnet.stage_widths)
        else:
            leaf = name.removeprefix(f"{block}.")
            kept = slice_block({leaf: places}, adapter.block_axes, *blocks[block])[leaf]
        p.view(-1)[kept.flatten()] = value.flatten().to(p)


@contextmanager
def written(supernet: Supernet, subnet: NetworkSlice, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The backbone with refitted values inside, and as it was afterwards."""
    before = {name: supernet.backbone.get_parameter(name).detach().clone() for name in values}
    try:
        write(supernet, subnet, values)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                supernet.backbone.get_parameter(name).copy_(value)


def bytes_held(supernet: Supernet, subnet: NetworkSlice) -> int:
    """What a refit holds of one image, at most: the large stream before and after a half, the subnet's, its units."""
    most = 0
    for shape, costs, kept in zip(supernet.shapes, supernet.adapter.costs.blocks, subnet.blocks, strict=True):
        v = kept.v_channels if isinstance(kept.v_channels, int) else shape.v_dim
        units = max(costs.attn_tokens * count(kept.heads) * v, costs.mlp_tokens * count(kept.hidden))
        most = max(most, costs.mlp_tokens * (2 * shape.embed_dim + kept.stream) + units)
    return most * torch.float32.itemsize


@torch.no_grad()
def refit(
    supernet: Supernet,
    subnet: NetworkSlice,
    batches: Iterable[Tensor],
    ridge: Ridge | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Values:
    """What least squares makes of a subnet's layers; nothing is written.

    batches: (B, C, H, W) on the backbone's device, as they are evaluated. advance: called after every half of a block.
    """
    was_training = supernet.training
    supernet.eval()
    try:
        return _Refit(supernet, subnet, ridge or Ridge()).run(batches, advance)
    finally:
        supernet.train(was_training)


@dataclass(frozen=True)
class _Half:
    """One half of a block: what it computes, and at which slice.

    run: (parameters, slice, stream) -> what the half adds. full, rows, small: the block's parameters, those of the kept
    units over the whole stream, and those of the slice. columns: the channels that it reads and writes. zeros: tokens
    of zeros that come between norm and reader, in an image (Swin pads windows after the norm).
    """

    axes: HalfAxes
    norm: Any
    run: Callable[[Params, BlockSlice, Tensor], Tensor]
    full: Params
    rows: Params
    small: dict[str, Tensor]
    whole: BlockSlice
    kept: BlockSlice
    columns: Kept
    zeros: int

    def normed(self, params: Params, z: Tensor) -> Tensor:
        """A stream as the half's readers see it, but for the columns."""
        return z if self.axes.norm is None else norm(self.norm, params, self.axes.norm, z)

    def written(self, params: Params, kept: BlockSlice, z: Tensor) -> Tensor:
        """What the half adds or, where a norm ends it, what that reads; without the writer's parameters, its units."""
        return self.run({leaf: p for leaf, p in params.items() if not within(leaf, self.axes.output_norms)}, kept, z)


class _Refit:
    """Both networks' streams over all images, as far as they have come, and what was refitted on the way."""

    def __init__(self, supernet: Supernet, subnet: NetworkSlice, ridge: Ridge) -> None:
        self.supernet, self.adapter, self.subnet, self.ridge = supernet, supernet.adapter, subnet, ridge
        self.values: Values = {}
        self.whole = supernet.identity()
        self.large_outer = self.adapter.outer(self.whole.stage_widths)
        self.small_outer = self.adapter.outer(subnet.stage_widths)
        self.large: list[Tensor] = []
        self.small: list[Tensor] = []

    def run(self, batches: Iterable[Tensor], advance: Callable[[], None]) -> Values:
        adapter, stage = self.adapter, 0
        for images in batches:
            self.large.append(adapter.stem(self.large_outer, images))
            self.small.append(adapter.stem(self.small_outer, images))
        if not self.large:
            raise ValueError("no images to refit on")
        for i, shape in enumerate(adapter.shapes):
            if shape.stage != stage:
                stage = shape.stage
                self._merge(stage)
            for half in self._halves(i):
                before = self.large
                if any(leaf in half.full for leaf in half.axes.axes):
                    self.large = [z + half.run(half.full, half.whole, z) for z in before]
                if any(leaf in half.small for leaf in half.axes.axes):
                    read = self._read(half, before)
                    values = read | self._write(replace(half, small=_with(half.small, read)), before)
                    self.values |= {f"{adapter.block_names[i]}.{leaf}": value for leaf, value in values.items()}
                advance()
        self._read_for_pooling()
        self._classify()
        return self.values

    def _halves(self, index: int) -> list[_Half]:
        adapter, shape = self.adapter, self.adapter.shapes[index]
        block, axes = adapter.blocks()[index], adapter.block_axes
        kept, whole = self.subnet.blocks[index], self.whole.blocks[index]
        full = adapter.block_parameters(block)
        rows = slice_block(full, axes, shape, replace(kept, stream=whole.stream, mlp_stream=None))
        small = slice_block(full, axes, shape, kept)
        read_by_mlp = kept.stream if kept.mlp_stream is None else kept.mlp_stream
        costs = adapter.costs.blocks[index]
        zeros = costs.attn_tokens - costs.mlp_tokens if adapter.pads_after_norm(block) else 0
        return [
            _Half(
                half,
                getattr(block, half.norm, None) if half.norm is not None else None,
                partial(_run, run, block, shape),
                full,
                rows,
                small,
                whole,
                kept,
                columns,
                nothing,
            )
            for half, run, columns, nothing in (
                (axes.attn, adapter.attention_half, kept.stream, zeros),
                (axes.mlp, adapter.mlp_half, read_by_mlp, 0),
            )
        ]

    def _read(self, half: _Half, before: Sequence[Tensor]) -> Values:
        """The readers: at their units what the large network has there, from the subnet's own stream."""
        matrices = [leaf for leaf in half.axes.readers if leaf in half.small]
        if not matrices:
            return {}
        parts = {leaf: _parts(half, leaf) for leaf in matrices}
        moments = {biased: Residual(biased) for biased in {bias is not None for own in parts.values() for bias in own}}
        for z_E, z in zip(before, self.small, strict=True):
            n = take(half.normed(half.small, z[..., : half.kept.stream]), -1, half.columns)
            left = _less(half.normed(half.full, z_E), n, half.columns)
            for each in moments.values():
                each.add(_with_zeros(n, half.zeros), _with_zeros(left, half.zeros))
        values: Values = {}
        for leaf, own in parts.items():
            weights, rows = [], half.rows[leaf].double().split(list(own.values()))
            for bias, part in zip(own, rows, strict=True):
                weight, added = moments[bias is not None].solve(self.ridge.layers, part)
                weights.append(weight)
                if bias is not None and added is not None:
                    values[bias] = half.small[bias].double() + added
            values[leaf] = half.small[leaf].double() + torch.cat(weights)
        return values

    def _write(self, half: _Half, before: Sequence[Tensor]) -> Values:
        """The writer, to the large network's stream after the half less the subnet's; and on with the subnet's.

        Where a norm ends the half, to what that reads in the large network. before: the large network's stream.
        """
        writer = half.axes.writer
        matrix, bias = f"{writer}.weight", f"{writer}.bias"
        if matrix not in half.axes.writers or matrix not in half.small:  # what the half adds is not linear in it
            self.small = [_plus(z, half.run(half.small, half.kept, z), half.kept.stream) for z in self.small]
            return {}
        scale = next((p for leaf, p in half.small.items() if within(leaf, half.axes.scales)), None)
        reading = {leaf: p for leaf, p in half.small.items() if not within(leaf, half.axes.outputs)}
        units = [half.run(reading, half.kept, z) for z in self.small]
        if half.axes.output_norms:
            moments = Residual(bias in half.small)
            for u, z_E in zip(units, before, strict=True):
                expected = take(half.written(half.full, half.whole, z_E), -1, half.columns)
                moments.add(u, expected - linear(half.small, writer, u))
            weight, more = moments.solve(self.ridge.layers)
            values = _changed(half.small, matrix, weight, bias, more)
            small = _with(half.small, values)
            self.small = [_plus(z, half.run(small, half.kept, z), half.kept.stream) for z in self.small]
            return values

        def added(params: Params, u: Tensor) -> Tensor:
            y = linear(params, writer, u)
            return y if scale is None else y * scale

        moments = Residual(bias in half.small)
        for u, z, z_E in zip(units, self.small, self.large, strict=True):
            lacking = take(z_E, -1, half.columns) - take(z, -1, half.columns) - added(half.small, u)
            moments.add(u, lacking if scale is None else torch.where(scale == 0, 0.0, lacking / scale))
        weight, more = moments.solve(self.ridge.layers)
        values = _changed(half.small, matrix, weight, bias, more)
        small = _with(half.small, values)
        self.small = [_plus(z, added(small, u), half.columns) for z, u in zip(self.small, units, strict=True)]
        return values

    def _merge(self, stage: int) -> None:
        """Patch merging reads one stage and writes the next: to the large network's stream after it.

        Or before the norm that follows there.
        """
        adapter, width = self.adapter, self.subnet.stage_widths[stage]
        layer, after = adapter.merging(stage)

        def without(params: Params, *modules: str | None) -> dict[str, Tensor]:
            return {name: p for name, p in params.items() if not within(name, filter(None, modules))}

        expected = [adapter.enter_stage(stage, without(self.large_outer, after), z) for z in self.large]
        inputs = [adapter.enter_stage(stage, without(self.small_outer, layer, after), z) for z in self.small]
        moments = Residual(bias=False)
        for x, y_E in zip(inputs, expected, strict=True):
            moments.add(x, y_E[..., :width] - linear(self.small_outer, layer, x))
        weight, _ = moments.solve(self.ridge.layers)
        values = _changed(self.small_outer, f"{layer}.weight", weight, f"{layer}.bias", None)
        self.values |= values
        small = _with(self.small_outer, values)
        self.large = [adapter.enter_stage(stage, self.large_outer, z) for z in self.large]
        self.small = [adapter.enter_stage(stage, small, z) for z in self.small]

    def _read_for_pooling(self) -> None:
        """What reads the stream for a pooling that has layers: what the large network has there, like a block's."""
        adapter = self.adapter
        for name, layers in adapter.outer_readers.items():
            if adapter.outer_norms[name][0] == "4S" or set(layers) <= set(adapter.classifiers):
                continue
            for layer in layers:
                matrix, bias = f"{layer}.weight", f"{layer}.bias"
                moments = Residual(bias in self.small_outer)
                for z, z_E in zip(self.small, self.large, strict=True):
                    n, n_E = (adapter.pool_reads(*at)[layer] for at in ((self.small_outer, z), (self.large_outer, z_E)))
                    moments.add(n, _less(n_E, n, n.shape[-1]))
                weight, added = moments.solve(self.ridge.layers, self.large_outer[matrix].double())
                values = _changed(self.small_outer, matrix, weight, bias, added)
                self.values |= values
                self.small_outer = _with(self.small_outer, values)

    def _classify(self) -> None:
        """The classifiers, to the large network's logits; from there on to its prediction, if that is nearer.

        Of a network without one the layer in its place, to the features.
        """
        adapter = self.adapter
        features = torch.cat([adapter.pool(self.small_outer, z) for z in self.small])
        targets = torch.cat([adapter.pool(self.large_outer, z) for z in self.large])
        for i, layer in enumerate(adapter.classifiers):
            x, y = (f if f.dim() == 2 else f[:, i] for f in (features, targets))
            matrix, bias = f"{layer}.weight", f"{layer}.bias"
            expected, moments = linear(self.large_outer, layer, y), Residual(bias in self.small_outer)
            moments.add(x, expected - linear(self.small_outer, layer, x))
            weight, added = moments.solve(self.ridge.classifier)
            values = _changed(self.small_outer, matrix, weight, bias, added)
            if math.isfinite(self.ridge.prediction) and adapter.feature_head is None:
                moved = towards_prediction(x, expected, values[matrix], values.get(bias), self.ridge.prediction)
                values |= {name: value for name, value in zip((matrix, bias), moved, strict=True) if value is not None}
            self.values |= values


def _parts(half: _Half, matrix: str) -> dict[str | None, int]:
    """How many rows of a reader have which bias, in their order; None: none, of at most one part."""
    biases = [bias if bias in half.small else None for bias in half.axes.biases(matrix)]
    rows = {bias: 0 if bias is None else len(half.small[bias]) for bias in biases}
    if None in rows:
        rows[None] = len(half.small[matrix]) - sum(rows.values())
    return rows


def _run(half: Run, block: Any, shape: BlockShape, params: Params, at: BlockSlice, z: Tensor) -> Tensor:
    return half(block, shape, params, at, z[..., : at.stream])


def _changed(params: Params, matrix: str, weight: Tensor, bias: str, added: Tensor | None) -> Values:
    """A layer's parameters with their changes, float64."""
    values = {matrix: params[matrix].double() + weight}
    return values if added is None else values | {bias: params[bias].double() + added}


def _with(params: Params, values: Values) -> dict[str, Tensor]:
    """Parameters with some of them replaced, each in its own precision."""
    return dict(params) | {name: value.to(params[name].dtype) for name, value in values.items()}


def _with_zeros(x: Tensor, number: int) -> Tensor:
    """Tokens (B, ..., n) with so many of zeros after those of each image."""
    return F.pad(x.flatten(1, -2), (0, 0, 0, number)) if number else x


def _less(z_E: Tensor, y: Tensor, columns: Kept) -> Tensor:
    """z_E with y taken off these channels."""
    return _plus(z_E, -y, columns)


def _plus(z: Tensor, y: Tensor, columns: Kept) -> Tensor:
    """z with y added to these of its channels."""
    if isinstance(columns, int):
        z = z.clone()
        z[..., :columns] += y
        return z
    return z.index_add(-1, torch.tensor(columns, device=z.device), y)
