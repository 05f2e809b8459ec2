"""A basis found on images, without labels and without training (section 2.7): second moments, then eigenvectors.

The large network runs over the images once; what is kept of them is the second moments, in float64: of each stage's
stream as its readers see it, of q, k and the attention's output inside the heads, of heads and neurons where their
order is by least squares.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from supernets.basis import Basis
from supernets.coordinates import isometry
from supernets.least_squares import head_order, neuron_order
from supernets.streams import Reading, readings, stage_is_centred
from supernets.supernet import Supernet

TINY = 1e-30  # of a sum that something is divided by, lest it be nothing
FLOOR = 1e-6  # of a second moment's mean eigenvalue: added, so that directions without images have a place


class Moment:
    """E[x xᵀ] over rows, (..., n, n) in float64; less E[x] E[x]ᵀ where centred."""

    def __init__(self, centred: bool = False) -> None:
        self.centred, self.rows = centred, 0
        self.total: Tensor | float = 0.0
        self.sum: Tensor | float = 0.0
        self.origin: Tensor | float | None = None if centred else 0.0

    def add(self, x: Tensor) -> None:
        """x (..., rows, n): products in its own precision over a batch, sums in float64."""
        if self.origin is None:  # near the mean, lest a variance be lost beside its square
            self.origin = x.mean(-2, keepdim=True)
        x = x - self.origin
        self.total, self.rows = self.total + (x.mT @ x).double(), self.rows + x.shape[-2]
        if self.centred:
            self.sum = self.sum + x.double().sum(-2)

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
    """What a basis is to hold: rotated stages; changes inside heads; orders by least squares."""

    stages: frozenset[int] = frozenset()
    inside: bool = False
    error_order: bool = False


@torch.no_grad()
def calibrate(
    supernet: Supernet,
    batches: Iterable[Tensor],
    wanted: Wanted,
    on_batch: Callable[[int], None] | None = None,
) -> Basis:
    """The basis that the images ask for. batches: (B, C, H, W) on the backbone's device, as they are evaluated.

    on_batch: called with the number of images seen so far.
    """
    seen, was_training = 0, supernet.training
    supernet.eval()
    with ExitStack() as hooks:
        streams = StreamMoments(supernet, wanted.stages, hooks)
        heads = HeadMoments(supernet, wanted, hooks)
        for images in batches:
            supernet.large(images)
            seen += len(images)
            if on_batch is not None:
                on_batch(seen)
    supernet.train(was_training)
    rotations, energy, before = streams.rotations()
    qk, v = heads.changes() if wanted.inside else ({}, {})
    orders = heads.orders() if wanted.error_order else {}
    return Basis(rotations, energy, qk, v, orders, before)


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
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    signed: Tensor = rows * torch.where(largest < 0, -1.0, 1.0)
    return signed


class HeadMoments:
    """Second moments inside the heads of every block and, for an order by least squares, of its heads and neurons."""

    def __init__(self, supernet: Supernet, wanted: Wanted, hooks: ExitStack) -> None:
        self.supernet, adapter = supernet, supernet.adapter
        self.q: dict[str, Moment] = {}
        self.k: dict[str, Moment] = {}
        self.out: dict[str, Moment] = {}
        self.heads: dict[str, Moment] = {}
        self.hidden: dict[str, Moment] = {}
        for name, block in zip(adapter.block_names, adapter.blocks(), strict=True):
            against = adapter.head_parts(block)
            attn, mlp = adapter.block_axes.attn, adapter.block_axes.mlp
            reader, writer = (_layer(block, names) for names in (attn.readers, attn.writers))
            if wanted.inside and "qk" not in against:
                self.q[name], self.k[name] = Moment(), Moment()
                hooks.callback(reader.register_forward_hook(self._qk(name)).remove)
            if wanted.inside and "v" not in against:
                self.out[name] = Moment()
            if wanted.error_order:
                self.heads[name], self.hidden[name] = Moment(centred=True), Moment(centred=True)
                hooks.callback(_layer(block, mlp.writers).register_forward_pre_hook(self._hidden(name)).remove)
            if name in self.out or name in self.heads:
                hooks.callback(writer.register_forward_pre_hook(self._out(name)).remove)

    def _shape(self, name: str) -> tuple[int, int]:
        shape = self.supernet.shapes[self.supernet.adapter.block_names.index(name)]
        return shape.num_heads, shape.head_dim

    def _qk(self, name: str) -> Callable[..., None]:
        H, d = self._shape(name)

        def hook(_: Any, __: Any, qkv: Tensor) -> None:
            q, k, _v = qkv.flatten(0, -3).unflatten(-1, (3, H, d)).permute(2, 3, 0, 1, 4).unbind(0)  # (H, B, N, d)
            k = k - k.mean(2, keepdim=True)  # a key that all tokens share changes no softmax
            self.q[name].add(q.flatten(1, 2))
            self.k[name].add(k.flatten(1, 2))

        return hook

    def _out(self, name: str) -> Callable[..., None]:
        H, d = self._shape(name)

        def hook(_: Any, inputs: tuple[Tensor]) -> None:
            o = inputs[0].flatten(0, -2)
            if name in self.out:
                self.out[name].add(o.unflatten(-1, (H, d)).transpose(0, 1))
            if name in self.heads:
                self.heads[name].add(o)

        return hook

    def _hidden(self, name: str) -> Callable[..., None]:
        return lambda _, inputs: self.hidden[name].add(inputs[0].flatten(0, -2))

    def changes(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A of q and k and T of v, by block (H, d, d)."""
        qk = {name: qk_change(self.q[name].value(), self.k[name].value()).cpu() for name in self.q}
        v = {}
        for name, moment in self.out.items():
            H, d = self._shape(name)
            proj, _ = self._writers(name)
            v[name] = v_change(moment.value(), proj.unflatten(1, (H, d)).transpose(0, 1)).cpu()
        return qk, v

    def orders(self) -> dict[str, list[int]]:
        """Of heads and neurons by what least squares could not take over, by name as in importance.py."""
        orders = {}
        for name in self.heads:
            (H, _), (proj, fc2) = self._shape(name), self._writers(name)
            orders[f"{name}.heads"] = head_order(self.heads[name].value(), proj, H)[0]
            orders[f"{name}.hidden"] = neuron_order(self.hidden[name].value(), fc2)[0]
        return orders

    def _writers(self, name: str) -> tuple[Tensor, Tensor]:
        """The matrices from a block's heads and neurons to the stream, float64."""
        proj, fc2 = self.supernet.adapter.writers(self.supernet.backbone.get_submodule(name))
        return proj.detach().double(), fc2.detach().double()


def _layer(block: nn.Module, matrices: Iterable[str]) -> Any:
    """The linear layer of the one matrix of these that the block has."""
    (name,) = (n for n in matrices if n in dict(block.named_parameters()))
    return block.get_submodule(name.removesuffix(".weight"))


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment (..., n, n), floored, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    floor = FLOOR * values.clamp_min(0).mean(-1, keepdim=True)
    values = (values.clamp_min(0) + torch.where(floor > 0, floor, 1.0)).sqrt()
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


def v_change(out: Tensor, proj: Tensor) -> Tensor:
    """T (H, d, d) of v -> T v, from the second moment of the heads' outputs (H, d, d) and proj by head (H, E, d).

    With U S Vᵀ the singular values of proj C_v^½, T = S^½ Vᵀ C_v^-½, as large as it was on the whole.
    """
    root, inverse = _root(out)
    _, s, vt = torch.linalg.svd(proj @ root, full_matrices=False)
    if vt.shape[-2] < vt.shape[-1]:  # fewer stream channels than channels of a head
        _, s_, vt = torch.linalg.svd((proj @ root).mT @ (proj @ root))
        s = s_.sqrt()
    s = s + FLOOR * s.mean(-1, keepdim=True).clamp_min(TINY)
    t = s.sqrt()[..., None] * (vt @ inverse)
    before = out.diagonal(dim1=-2, dim2=-1).sum(-1)
    after = (t @ out @ t.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = torch.where((after > 0) & (before > 0), before / after, 1.0).sqrt()
    changed: Tensor = t * ratio[:, None, None]
    return changed
