"""A basis found on images, without labels and without training (section 2.7): second moments, then eigenvectors.

The large network runs over the images once; what is kept of them is the second moments, in float64: of each stage's
stream as its readers see it, of q, k and the attention's output inside the heads, of heads and neurons where their
order is by least squares. Where errors of halves are to be compared with each other, also the second moment of the
gradient at what each half adds, the loss being cross-entropy with labels drawn from the network's own prediction: to
second order, the divergence of the prediction that an error there makes is half its square in that metric. Of a network
without classifier the loss is <f, e>, f its features and e standard normal: to first order, half the squared error of
the features is half the square in that metric.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, identity_slice
from supernets.adapter import Adapter
from supernets.axes import layer_of, qkv_rows, slice_block, within
from supernets.basis import Basis, change_heads
from supernets.coordinates import isometry
from supernets.least_squares import gram_matrix, head_order, neuron_order, prefix_lost
from supernets.streams import Reading, readings, stage_is_centred
from supernets.supernet import Supernet

QK_IMAGES, QK_WIDTHS = 64, 8  # on which, and at how many widths, a narrowed softmax is measured
TINY = 1e-30  # of a sum that something is divided by, lest it be nothing
FLOOR = 1e-6  # of a second moment's mean eigenvalue: added, so that directions without images have a place


class Moment:
    """E[x xᵀ] over rows, (..., n, n) in float64; less E[x] E[x]ᵀ where centred."""

    def __init__(self, centred: bool = False) -> None:
        self.centred, self.rows = centred, 0
        self.total: Tensor | float = 0.0
        self.sum: Tensor | float = 0.0
        self.origin: Tensor | float | None = None if centred else 0.0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x (..., rows, n): products in its own precision over a batch, sums in float64."""
        if self.origin is None:  # near the mean, lest a variance be lost beside its square
            self.origin = x.mean(-2, keepdim=True)
        x = x - self.origin
        self.total, self.rows = self.total + gram_matrix(x).double(), self.rows + x.shape[-2]
        if self.centred:
            self.sum = self.sum + x.sum(-2, dtype=torch.float64)

    def value(self) -> Tensor:
        """(..., n, n)."""
        assert isinstance(self.total, Tensor), "no images"
        mean = self.total / self.rows
        if isinstance(self.sum, Tensor):
            average = self.sum / self.rows
            mean = mean - average[..., :, None] * average[..., None, :]
        return mean


@dataclass(frozen=True)
class Wanted:
    """What a basis is to hold: rotated stages; changes inside heads; orders by least squares.

    gradient_images: so many of the images weigh what halves add by its gradient; 0: channels of the stream count alike.
    """

    stages: frozenset[int] = frozenset()
    inside: bool = False
    error_order: bool = False
    gradient_images: int = 0
    seed: int = 0


@torch.no_grad()
def calibrate(supernet: Supernet, batches: Iterable[Tensor], wanted: Wanted) -> Basis:
    """The basis that the images ask for. batches: (B, C, H, W) on the backbone's device, as they are evaluated."""
    streams, heads, metric = looked_at(supernet, batches, wanted)
    rotations, energy, before = streams.rotations()
    qk, v = heads.changes() if wanted.inside else ({}, {})
    orders, lost = heads.orders() if wanted.error_order else ({}, {})
    if metric is not None:
        lost |= qk_lost(supernet, qk, metric)
    return Basis(rotations, energy, qk, v, orders, before, lost)


@torch.no_grad()
def as_it_stands(supernet: Supernet, batches: Iterable[Tensor], gradient_images: int, seed: int) -> dict[str, Tensor]:
    """What is lost with only the first units, by names and shapes as in `Basis.lost`, none of them moved.

    batches: as of `calibrate`.
    """
    wanted = Wanted(error_order=True, gradient_images=gradient_images, seed=seed)
    _, heads, metric = looked_at(supernet, batches, wanted)
    assert metric is not None
    return heads.lost() | qk_lost(supernet, {}, metric)


def looked_at(
    supernet: Supernet, batches: Iterable[Tensor], wanted: Wanted
) -> tuple["StreamMoments", "HeadMoments", "Metric | None"]:
    """The moments that are wanted, of the large network over the images."""
    seen = 0
    with ExitStack() as hooks:
        hooks.callback(supernet.train, supernet.training)
        supernet.eval()
        streams = StreamMoments(supernet, wanted.stages, hooks)
        metric = Metric(supernet, wanted.seed) if wanted.gradient_images else None
        heads = HeadMoments(supernet, wanted, hooks, metric)
        for images in batches:
            if metric is not None and seen < wanted.gradient_images:
                metric.large(images)
            else:
                supernet.large(images)
            seen += len(images)
    return streams, heads, metric


class Metric:
    """The second moment, per token, of the gradient at what each half of a block adds: (E, E) by block and half.

    And, where a norm ends the half, at what it reads: what the matrix of the heads or neurons writes.
    """

    def __init__(self, supernet: Supernet, seed: int) -> None:
        self.supernet, self.generator = supernet, torch.Generator().manual_seed(seed)
        self.moments: dict[tuple[str, int], Moment] = {}
        self.before_norm: dict[tuple[str, int], Moment] = {}
        self.images: list[Tensor] = []
        self.seen = 0

    @torch.enable_grad()
    def large(self, images: Tensor) -> None:
        """A forward and a backward pass of the large network; no parameter gets a gradient."""
        adapter = self.supernet.adapter
        with ExitStack() as hooks:
            for p in self.supernet.parameters():
                hooks.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(False)
            for name, block, shape in zip(adapter.block_names, adapter.blocks(), adapter.shapes, strict=True):
                for half, there in enumerate((shape.attn, shape.mlp)):
                    if there:
                        module, key = (block.drop_path1, block.drop_path2)[half], (name, half)
                        hooks.callback(module.register_forward_hook(self._watch(self.moments, key)).remove)
                        axes = (adapter.block_axes.attn, adapter.block_axes.mlp)[half]
                        if axes.output_norms:
                            layer = layer_of(block, axes.writers)
                            hooks.callback(layer.register_forward_hook(self._watch(self.before_norm, key)).remove)
            logits = self.supernet.large(images.detach().requires_grad_())
            if adapter.feature_head is None:
                drawn = drawn_labels(logits, self.generator)
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            else:
                (logits * drawn_directions(logits, self.generator)).sum().backward()
        self.seen += len(images)
        if self.seen <= QK_IMAGES or not self.images:
            self.images.append(images)

    def _watch(self, moments: dict[tuple[str, int], Moment], key: tuple[str, int]) -> Callable[..., None]:
        moment = moments.setdefault(key, Moment())

        def hook(_: Any, __: Any, y: Tensor) -> None:
            y.register_hook(lambda gradient: moment.add(gradient.flatten(0, -2)))

        return hook

    def root(self, name: str, half: int) -> Tensor:
        """(E, E), float64: of what a half adds, the square of the root times it is nats of divergence per image.

        Without a classifier it is half the squared error of the features.
        """
        return self._root_of(self.moments[name, half])

    def written_root(self, name: str, half: int) -> Tensor:
        """The same of what the matrix of the heads or neurons writes; LayerScale comes after it, a norm does not."""
        return self._root_of(self.before_norm.get((name, half), self.moments[name, half]))

    def _root_of(self, moment: Moment) -> Tensor:
        tokens = moment.rows / self.seen
        root, _ = _root(moment.value() * (tokens / 2), floor=0.0)
        return root


def drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) labels drawn from a prediction (B, classes); the generator is of the CPU."""
    drawn = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)
    return drawn[:, 0].to(logits.device)


def drawn_directions(features: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, as many as the features (B, E); the generator is of the CPU."""
    return torch.randn(features.shape, generator=generator).to(features)


@torch.no_grad()
def qk_lost(supernet: Supernet, qk: Mapping[str, Tensor], metric: Metric) -> dict[str, Tensor]:
    """By "<block>.qk" what is lost with only the first channels of q and k in every head: (d + 1,).

    Measured on the metric's first images, as an error in logits goes through a softmax; between at most QK_WIDTHS
    widths it is taken as linear, and with no channel at all as with the first few.
    """
    changed = Supernet(copy.deepcopy(supernet.backbone)).eval()
    change_heads(changed, Basis(qk=qk))
    adapter, lost = changed.adapter, {}
    outer = adapter.outer(changed.identity().stage_widths)
    streams, stage = [adapter.stem(outer, images) for images in metric.images], 0
    for name, block, shape in zip(adapter.block_names, adapter.blocks(), adapter.shapes, strict=True):
        if shape.stage != stage:
            stage = shape.stage
            streams = [adapter.enter_stage(stage, outer, z) for z in streams]
        params, d, whole = adapter.block_parameters(block), shape.head_dim, identity_slice(shape)
        if not shape.attn:
            streams = mlp_added(adapter, block, shape, streams)
            continue
        added = [adapter.attention_half(block, shape, params, whole, z) for z in streams]
        root, widths, errors = metric.root(name, 0), [], []
        unit = shape.qk_unit
        for width in sorted({unit * max(1, round(d * k / QK_WIDTHS / unit)) for k in range(1, QK_WIDTHS)} - {d}):
            kept = replace(whole, qk=width)
            own = slice_block(params, adapter.block_axes, shape, kept)
            error = Moment()
            for z, y in zip(streams, added, strict=True):
                error.add((adapter.attention_half(block, shape, own, kept, z) - y).flatten(0, -2))
            widths.append(width)
            errors.append(float((root @ error.value() @ root).diagonal().sum()))
        points = torch.from_numpy(np.interp(np.arange(d + 1), [*widths, d], [*errors, 0.0]))
        lost[f"{name}.qk"] = points.flip(0).cummax(0).values.flip(0)  # more channels never lose more
        streams = mlp_added(adapter, block, shape, [z + y for z, y in zip(streams, added, strict=True)])
    return lost


def mlp_added(adapter: Adapter, block: Any, shape: BlockShape, streams: list[Tensor]) -> list[Tensor]:
    """Streams after a whole block's MLP, where it has one."""
    if not shape.mlp:
        return streams
    params, whole = adapter.block_parameters(block), identity_slice(shape)
    return [z + adapter.mlp_half(block, shape, params, whole, z) for z in streams]


class StreamMoments:
    """The second moment of each stage's normalised stream, summed over its readers.

    A classifier that reads some tokens, or their mean, counts with what it reads.
    """

    def __init__(self, supernet: Supernet, stages: Iterable[int], hooks: ExitStack) -> None:
        self.supernet = supernet
        self.moments: dict[str, tuple[int, Moment]] = {}
        model, stages = supernet.backbone, set(stages)
        for reading in readings(supernet.adapter):
            if reading.stage not in stages:
                continue
            norm: Any = model.get_submodule(reading.norm)
            if reading.block is not None or reading.quadrants:
                self._watch(reading, reading.norm, hooks, norm.register_forward_hook, lambda _, __, y: y)
                continue
            for matrix in reading.matrices:
                layer = matrix.removesuffix(".weight")
                register = model.get_submodule(layer).register_forward_pre_hook
                self._watch(reading, layer, hooks, register, lambda _, inputs: inputs[0])

    def _watch(
        self, reading: Reading, key: str, hooks: ExitStack, register: Callable[..., Any], pick: Callable[..., Tensor]
    ) -> None:
        norm: Any = self.supernet.backbone.get_submodule(reading.norm)
        moment = Moment()
        self.moments[key] = (reading.stage, moment)

        def hook(*args: Any) -> None:
            y = pick(*args) if getattr(norm, "bias", None) is None else pick(*args) - norm.bias
            n = torch.where(norm.weight == 0, 0.0, y / norm.weight).flatten(0, -2)  # before the affine
            moment.add(n.view(len(n) * 4, -1) if reading.quadrants else n)

        hooks.callback(register(hook).remove)

    def second_moments(self) -> dict[int, Tensor]:
        """Stage -> (E, E), float64, the mean over its readers."""
        found: dict[int, list[Tensor]] = {}
        for stage, moment in self.moments.values():
            found.setdefault(stage, []).append(moment.value())
        return {stage: torch.stack(each).mean(0) for stage, each in found.items()}

    def rotations(self) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """Of each stage the rotation, and the share of what its readers see that each new and each old channel has."""
        rotations, energy, before = {}, {}, {}
        for stage, moment in self.second_moments().items():
            q = rotation_of(moment, stage_is_centred(self.supernet.adapter, stage))
            shares, own = ((q @ moment) * q).sum(1).clamp_min(0), moment.diagonal()
            rotations[stage], energy[stage] = q.cpu(), (shares / shares.sum().clamp_min(TINY)).cpu()
            before[stage] = (own / own.sum().clamp_min(TINY)).cpu()
        return rotations, energy, before


def rotation_of(moment: Tensor, mean_first: bool) -> Tensor:
    """(E, E) orthogonal whose rows are eigenvectors of a second moment by falling eigenvalue, signs fixed.

    mean_first: the first row is (1, ..., 1)/sqrt(E), the others are the eigenvectors of what is orthogonal to it.
    """
    E = moment.shape[0]
    if not mean_first:
        return _signed(torch.linalg.eigh(moment).eigenvectors.flip(1).T)
    basis = complement_of_ones(E).to(moment.device)
    vectors = torch.linalg.eigh(basis @ moment @ basis.T).eigenvectors.flip(1).T @ basis
    mean = torch.full((1, E), E**-0.5, dtype=torch.float64, device=moment.device)
    return torch.cat([mean, _signed(vectors)])


def complement_of_ones(size: int) -> Tensor:
    """(size - 1, size) orthonormal rows, all orthogonal to (1, ..., 1)."""
    return isometry(size)[:, 1:].T.contiguous()


def _signed(rows: Tensor) -> Tensor:
    """Rows whose largest entry is positive: an eigenvector has no sign of its own."""
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    signed: Tensor = rows * torch.where(largest < 0, -1.0, 1.0)
    return signed


class HeadMoments:
    """Second moments inside the heads of every block and, for an order by least squares, of its heads and neurons."""

    def __init__(self, supernet: Supernet, wanted: Wanted, hooks: ExitStack, metric: Metric | None = None) -> None:
        self.supernet, self.metric, adapter = supernet, metric, supernet.adapter
        self.q: dict[str, Moment] = {}
        self.k: dict[str, Moment] = {}
        self.out: dict[str, Moment] = {}
        self.rotated: set[str] = set()  # blocks whose v is changed
        self.cosine: set[str] = set()  # blocks whose q and k count normalised
        self.heads: dict[str, Moment] = {}
        self.hidden: dict[str, Moment] = {}
        attn, mlp = adapter.block_axes.attn, adapter.block_axes.mlp
        for name, block, shape in zip(adapter.block_names, adapter.blocks(), adapter.shapes, strict=True):
            if wanted.error_order and shape.mlp:
                self.hidden[name] = Moment(centred=True)
                hooks.callback(layer_of(block, mlp.writers).register_forward_pre_hook(self._hidden(name)).remove)
            if not shape.attn:
                continue
            against, writer = adapter.head_parts(block), layer_of(block, attn.writers)
            if adapter.cosine_qk(block):
                self.cosine.add(name)
            if wanted.inside and "qk" not in against:
                self.q[name], self.k[name] = Moment(), Moment()
                hooks.callback(adapter.watch_qkv(block, self._qk(name)))
            if wanted.inside and "v" not in against:
                self.rotated.add(name)
            if name in self.rotated or metric is not None:
                self.out[name] = Moment()
            if wanted.error_order:
                self.heads[name] = Moment(centred=True)
            if name in self.out or name in self.heads:
                hooks.callback(writer.register_forward_pre_hook(self._out(name)).remove)

    def _shape(self, name: str) -> BlockShape:
        return self.supernet.shapes[self.supernet.adapter.block_names.index(name)]

    def _qk(self, name: str) -> Callable[[Tensor], None]:
        shape = self._shape(name)

        def see(qkv: Tensor) -> None:
            q, k, _v = qkv.flatten(0, -3).split(qkv_rows(shape), -1)
            q, k = (t.unflatten(-1, (shape.num_heads, -1)).permute(2, 0, 1, 3) for t in (q, k))  # (H, B, N, d)
            if name in self.cosine:
                q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
            else:
                k = k - k.mean(2, keepdim=True)  # a key that all tokens share changes no softmax
            self.q[name].add(q.flatten(1, 2))
            self.k[name].add(k.flatten(1, 2))

        return see

    def _out(self, name: str) -> Callable[..., None]:
        shape = self._shape(name)

        def hook(_: Any, inputs: tuple[Tensor]) -> None:
            o = inputs[0].flatten(0, -2)
            if name in self.out:
                self.out[name].add(o.unflatten(-1, (shape.num_heads, shape.v_dim)).transpose(0, 1))
            if name in self.heads:
                self.heads[name].add(o)

        return hook

    def _hidden(self, name: str) -> Callable[..., None]:
        return lambda _, inputs: self.hidden[name].add(inputs[0].flatten(0, -2))

    def changes(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A of q and k and T of v, by block (H, d, d)."""
        qk = {}
        for name, q in self.q.items():
            change = qk_rotation if name in self.cosine else qk_change
            qk[name] = change(q.value(), self.k[name].value()).cpu()
        rotated = [name for name in self.out if name in self.rotated]
        return qk, {name: v_change(self.out[name].value(), self._by_head(name)).cpu() for name in rotated}

    def _by_head(self, name: str) -> Tensor:
        """The matrix from the heads to the stream, (H, E, d)."""
        by_head: Tensor = self._writer(name, 0).unflatten(1, (self._shape(name).num_heads, -1))
        return by_head.transpose(0, 1)

    def orders(self) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        """Of heads and neurons by what least squares could not take over, by name as in importance.py; and that.

        What is lost with only the first units, by the same names: (H + 1,) and (M + 1,); by "<block>.v" with only the
        first channels of v in a head, in the order of the heads, (H, d + 1).
        """
        orders: dict[str, list[int]] = {}
        lost: dict[str, Tensor] = {}
        for name in self.heads:
            H, proj = self._shape(name).num_heads, self._writer(name, 0)
            if self.supernet.adapter.heads_stay:
                order, heads = list(range(H)), prefix_lost(self.heads[name].value(), proj, self._shape(name).v_dim)
            else:
                order, heads = head_order(self.heads[name].value(), proj, H)
                orders[f"{name}.heads"] = order
            lost[f"{name}.heads"] = heads.cpu()
            if name in self.out:
                kept = torch.tensor(order)
                tails = v_lost if name in self.rotated else v_lost_as_it_stands
                lost[f"{name}.v"] = tails(self.out[name].value(), self._by_head(name))[kept].cpu()
        for name in self.hidden:
            orders[f"{name}.hidden"], hidden = neuron_order(self.hidden[name].value(), self._writer(name, 1))
            lost[f"{name}.hidden"] = hidden.cpu()
        return orders, lost

    def lost(self) -> dict[str, Tensor]:
        """What is lost with only the first units as they stand, the others refitted, by name as of `orders`."""
        found: dict[str, Tensor] = {}
        for name in self.heads:
            width = self._shape(name).v_dim
            found[f"{name}.heads"] = prefix_lost(self.heads[name].value(), self._writer(name, 0), width).cpu()
            found[f"{name}.v"] = prefix_lost(self.out[name].value(), self._by_head(name)).cpu()
        for name in self.hidden:
            found[f"{name}.hidden"] = prefix_lost(self.hidden[name].value(), self._writer(name, 1)).cpu()
        return found

    def _writer(self, name: str, half: int) -> Tensor:
        """The matrix from a block's heads, or with half 1 neurons, to what that half adds, in the metric, float64."""
        adapter, block = self.supernet.adapter, self.supernet.backbone.get_submodule(name)
        axes = (adapter.block_axes.attn, adapter.block_axes.mlp)[half]
        (matrix,) = axes.writers
        weight = block.get_parameter(matrix).detach().double()
        for leaf, scale in block.named_parameters():
            if within(leaf, axes.scales):
                weight = weight * scale.detach().double()[:, None]
        return weight if self.metric is None else self.metric.written_root(name, half) @ weight


def _root(moment: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment (..., n, n), floored, and its inverse; finite with a floor."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    if floor:
        least = floor * values.mean(-1, keepdim=True)
        values = values + torch.where(least > 0, least, 1.0)
    values = values.sqrt()
    return vectors * values[..., None, :] @ vectors.mT, vectors / values[..., None, :] @ vectors.mT


def qk_change(q: Tensor, k: Tensor) -> Tensor:
    """A (H, d, d) of q -> A q, k -> A^-T k, from the second moments of q and of centred k (H, d, d).

    With U S Vᵀ the singular values of C_q^½ C_k^½, A = S^½ Uᵀ C_q^-½: the first r channels keep the most of the
    logits' variance, and q and k are equally large in each.
    """
    (root_q, inverse_q), (root_k, _) = _root(q), _root(k)
    u, s, _ = torch.linalg.svd(root_q @ root_k)
    a: Tensor = s.sqrt()[..., None] * (u.mT @ inverse_q)
    return a


def qk_rotation(q: Tensor, k: Tensor) -> Tensor:
    """A (H, d, d) orthogonal of q -> A q, k -> A k, from the second moments of normalised q and k (H, d, d).

    The first r channels keep the most of both together.
    """
    return _signed(torch.linalg.eigh(q + k).eigenvectors.flip(-1).mT)


def v_change(out: Tensor, proj: Tensor) -> Tensor:
    """T (H, d, d) of v -> T v, from the second moment of the heads' outputs (H, d, d) and proj by head (H, E, d).

    With U S Vᵀ the singular values of proj C_v^½, T = S^½ Vᵀ C_v^-½, as large as it was on the whole.
    """
    root, inverse = _root(out)
    s, vt = _right_singular(proj @ root)
    s = s + FLOOR * s.mean(-1, keepdim=True).clamp_min(TINY)
    t = s.sqrt()[..., None] * (vt @ inverse)
    before = out.diagonal(dim1=-2, dim2=-1).sum(-1)
    after = (t @ out @ t.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = torch.where((after > 0) & (before > 0), before / after, 1.0).sqrt()
    changed: Tensor = t * ratio[:, None, None]
    return changed


def v_lost(out: Tensor, proj: Tensor) -> Tensor:
    """(H, d + 1): the squared error of each head's part of the output with only the first channels of `v_change`."""
    s, _ = _right_singular(proj @ _root(out)[0])
    tails = s.square().flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, tails.new_zeros(len(tails), 1)], dim=1)


def v_lost_as_it_stands(out: Tensor, proj: Tensor) -> Tensor:
    """(H, d + 1): the same with only the first channels of v as they are, and more channels never lose more."""
    products = out * (proj.mT @ proj)  # what two channels lose together
    tails = products.flip(-2, -1).cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).cummax(-1).values.flip(-1)
    return torch.cat([tails, tails.new_zeros(len(tails), 1)], dim=1)


def _right_singular(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (H, d) of (H, E, d), of which there are d even if E is less, and right vectors (H, d, d)."""
    if matrices.shape[-2] >= matrices.shape[-1]:
        _, s, vt = torch.linalg.svd(matrices, full_matrices=False)
        return s, vt
    _, squares, vt = torch.linalg.svd(matrices.mT @ matrices)
    return squares.sqrt(), vt
