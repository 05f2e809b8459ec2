"""A backbone rewritten in a basis in which the first channels, heads and neurons matter most (section 2.7).

Its function stays what it was. What a basis holds is found on images (calibration.py), or read from a run's folder;
here it is applied, and taken back.

Rotating a stream folds what stands between it and its coordinates: LayerScale into the writers, the norms' affines into
the readers. Each norm and each LayerScale keeps one number in all of its channels, such that the matrices beside it are
as large as they were: an optimiser whose steps do not follow the size of a weight would train them at another rate.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from search_spaces.errors import UserError
from supernets.adapter import Adapter
from supernets.axes import qkv_rows
from supernets.coordinates import compact_parameters, settle_norms
from supernets.families import adapter_for
from supernets.feature_head import feature_head, without_feature_head
from supernets.importance import Orders, check_orders, permute
from supernets.rotated import STREAMS, StemNorm, StreamNorm, Streams, replace_module
from supernets.streams import Reading, fixed_streams, readings, scalings, stage_is_centred, stream_axes
from supernets.supernet import Supernet


@dataclass(frozen=True)
class Basis:
    """What a backbone is rewritten in. All in float64.

    streams: stage -> (E, E) orthogonal, rows from the old to the new channels; where the stage's norms take the mean
    away, the first row is that mean, which none of its blocks sees. energy: stage -> (E,) the share of each new channel
    in what is read; before: of each old one. qk, v: block -> (H, d, d): q -> A q, k -> A^-T k and v -> T v, heads as
    they stood. orders: as in importance.py, of heads, of hidden neurons, and of streams that are not rotated. lost:
    what least squares cannot take over where only the first units stay, by the same names (calibration.py).
    """

    streams: Mapping[int, Tensor] = field(default_factory=dict)
    energy: Mapping[int, Tensor] = field(default_factory=dict)
    qk: Mapping[str, Tensor] = field(default_factory=dict)
    v: Mapping[str, Tensor] = field(default_factory=dict)
    orders: Orders = field(default_factory=dict)
    before: Mapping[int, Tensor] = field(default_factory=dict)
    lost: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for a file."""
        found = {f"stream.{stage}": q for stage, q in self.streams.items()}
        found |= {f"energy.{stage}": e for stage, e in self.energy.items()}
        found |= {f"before.{stage}": e for stage, e in self.before.items()}
        found |= {f"qk.{name}": a for name, a in self.qk.items()} | {f"v.{name}": t for name, t in self.v.items()}
        found |= {f"lost.{name}": t for name, t in self.lost.items()}
        return found | {f"order.{name}": torch.tensor(order) for name, order in self.orders.items()}

    def digest(self) -> str:
        """SHA-256 of what it holds, in hexadecimal: whether two are the same. arch.json and checkpoints name it."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Basis":
        """The opposite of `tensors`. ValueError for a name that is none of a basis."""
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind not in parts:
                raise ValueError(f"'{name}' is no part of a basis")
            parts[kind][rest] = tensor
        return cls(
            {int(stage): q for stage, q in parts["stream"].items()},
            {int(stage): e for stage, e in parts["energy"].items()},
            parts["qk"],
            parts["v"],
            {name: order.tolist() for name, order in parts["order"].items()},
            {int(stage): e for stage, e in parts["before"].items()},
            parts["lost"],
        )


KINDS = ("stream", "energy", "before", "qk", "v", "order", "lost")  # first parts of the names in a file
ORTHOGONAL = 1e-8  # largest deviation of a rotation that is applied, float64


def install(supernet: Supernet, rotations: Mapping[int, Tensor]) -> None:
    """Put the norms of rotated streams in place, and the rotations themselves; no weight changes."""
    model, adapter = supernet.backbone, supernet.adapter
    for reading in readings(adapter):
        if reading.stage in rotations:
            replace_module(model, reading.norm, StreamNorm(model.get_submodule(reading.norm), reading.quadrants))
    if 0 in rotations and adapter.stem_norm is not None:
        stem = StemNorm(model.get_submodule(adapter.stem_norm))
        stem.rotation.copy_(rotations[0])
        replace_module(model, adapter.stem_norm, stem)
    setattr(model, STREAMS, Streams({**adapter.streams, **rotations}))
    supernet.adapter = adapter_for(model)


def install_stages(supernet: Supernet, stages: tuple[int, ...]) -> None:
    """The structure of a backbone whose streams are rotated, without the rotations: for shapes and costs."""
    if not stages:
        return
    like = next(supernet.backbone.parameters())
    sizes = {shape.stage: shape.embed_dim for shape in supernet.shapes}
    with torch.no_grad():
        install(supernet, {stage: torch.eye(sizes[stage], device=like.device, dtype=like.dtype) for stage in stages})


@torch.no_grad()
def rewrite(supernet: Supernet, basis: Basis, again: bool = False) -> None:
    """Rewrite the backbone, in place. UserError when the basis is another network's.

    again: its weights have stood in this basis and were taken back by `timm_state`. Nothing is folded then, so that
    every slice is what it was: a norm's bias that was trained there is one that slices cut. But for the norm before
    features, which that has unfolded.
    """
    if supernet.basis is not None:
        raise ValueError("the network stands in a basis already; bases do not add up")
    check_fits(supernet, basis)
    change_heads(supernet, basis)
    permute(supernet, basis.orders)
    like = next(supernet.backbone.parameters())
    rotations = {stage: q.to(like.device).double() for stage, q in basis.streams.items()}
    if rotations:
        if again:
            _fold_features(supernet, set(rotations))
        else:
            fold(supernet, set(rotations))
        _rotate(supernet, rotations)
        install(supernet, {stage: q.to(like.dtype) for stage, q in rotations.items()})
    supernet.basis = basis


@torch.no_grad()
def timm_state(supernet: Supernet) -> dict[str, Tensor]:
    """The backbone's state dict in timm's own coordinates, as if it had never been rewritten (section 2.7)."""
    state = _unrotated(supernet)
    found = feature_head(supernet.backbone)
    if found is None or not found[1].added:
        return state
    return without_feature_head(state, found[0], _norm_before(supernet.adapter, found[0]))


def _norm_before(adapter: Adapter, layer: str) -> str | None:
    """The outer norm through which a layer reads the stream."""
    return next((norm for norm, readers in adapter.outer_readers.items() if layer in readers), None)


def _fold_features(supernet: Supernet, stages: set[int]) -> None:
    """The norm before the features, where the network has no layer after it, into the one that it was given."""
    found = feature_head(supernet.backbone)
    if found is None or not found[1].added:
        return
    for reading in readings(supernet.adapter):
        if reading.stage in stages and f"{found[0]}.weight" in reading.matrices:
            _fold_norm(dict(supernet.backbone.named_parameters()), reading)


def _unrotated(supernet: Supernet) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(supernet.backbone.state_dict())
    basis: Basis | None = supernet.basis
    if basis is None:
        return state
    values = compact_parameters(supernet.adapter, supernet.identity())
    state |= {name: value.to(state[name].dtype) for name, value in values.items()}
    backbone = copy.deepcopy(supernet.backbone)
    settle_norms(adapter_for(backbone), supernet.identity())
    backbone.load_state_dict(state)
    other = Supernet(backbone)
    permute(other, {name: _inverse(order) for name, order in basis.orders.items()})
    change_heads(other, basis, back=True)
    return dict(other.backbone.state_dict())


def _inverse(order: list[int]) -> list[int]:
    places = [0] * len(order)
    for new, old in enumerate(order):
        places[old] = new
    return places


def check_fits(supernet: Supernet, basis: Basis) -> None:
    """UserError when a basis has parts for which the network has no place, or of another size."""
    adapter = supernet.adapter
    sizes = {shape.stage: shape.embed_dim for shape in supernet.shapes}
    fixed = fixed_streams(adapter)
    for stage, q in basis.streams.items():
        if tuple(q.shape) != (sizes.get(stage), sizes.get(stage)):
            raise UserError(
                f"the basis rotates stage {stage} of {q.shape[0]} channels, the network has {sizes.get(stage, 'none')}"
            )
        if stage in fixed:
            raise UserError(f"stage {stage} cannot be rotated: {fixed[stage]} (docs/backbones.md)")
        q = q.double()
        error = float((q @ q.T - torch.eye(len(q), dtype=q.dtype, device=q.device)).abs().max())
        if stage_is_centred(adapter, stage):
            error = max(error, float((q[0] - len(q) ** -0.5).abs().max()))
        if not error < ORTHOGONAL:
            raise UserError(
                f"the basis of stage {stage} is no rotation that leaves the mean first (off by {error:.1e})"
            )
    check_orders(supernet, basis.orders)
    shapes = dict(zip(adapter.block_names, supernet.shapes, strict=True))
    for part, heads in (("qk", basis.qk), ("v", basis.v)):
        for name, t in heads.items():
            shape = shapes.get(name)
            d = 0 if shape is None else shape.head_dim if part == "qk" else shape.v_dim
            expected = None if shape is None or not shape.attn else (shape.num_heads, d, d)
            if tuple(t.shape) != expected:
                raise UserError(f"the basis has {part} {tuple(t.shape)} for block {name}, the network {expected}")
            against = adapter.head_parts(adapter.backbone.get_submodule(name)).get(part)
            if against:
                raise UserError(f"{part} of block {name} cannot be rotated: {against} (docs/backbones.md)")
            if part == "qk" and adapter.cosine_qk(adapter.backbone.get_submodule(name)):
                error = float((t.double() @ t.double().mT - torch.eye(d, device=t.device)).abs().max())
                if not error < ORTHOGONAL:
                    raise UserError(
                        f"the basis of q and k in block {name} is no rotation, which cosine attention needs (off by"
                        f" {error:.1e})"
                    )


def fold(supernet: Supernet, stages: set[int]) -> None:
    """LayerScale into the writers and norms' affines into the readers, in place, as far as those can take them."""
    params = dict(supernet.backbone.named_parameters())
    for scaling in scalings(supernet.adapter):
        if scaling.stage in stages:
            gamma = params[scaling.gamma].double()
            matrix = next(params[name] for name in scaling.writers if params[name].dim() == 2)
            kept = _ratio(matrix.double() * gamma[:, None], matrix)
            for name in scaling.writers:
                p = params[name]
                p.copy_(p.double() * (gamma if p.dim() == 1 else gamma[:, None]) / kept)
            params[scaling.gamma].fill_(kept)
    for reading in readings(supernet.adapter):
        if reading.stage in stages:
            _fold_norm(params, reading)


def _fold_norm(params: Mapping[str, Tensor], reading: Reading) -> None:
    """A norm's affine into its readers, as far as they can take it."""
    weight, bias = params[f"{reading.norm}.weight"], params.get(f"{reading.norm}.bias")
    gain = weight.double()
    matrices = [params[name] for name in reading.matrices]
    kept = _ratio(torch.cat([m.double() * gain for m in matrices]), torch.cat([m.detach() for m in matrices]))
    folded = [m.double() * gain / kept for m in matrices]
    constants = [] if bias is None else [m.double() @ bias.double() for m in matrices]
    if bias is not None and reading.folded and all(name in params for name in reading.biases):
        for name, constant in zip(reading.biases, constants, strict=True):
            params[name].copy_(params[name].double() + constant)
        bias.zero_()
    elif bias is not None:
        # No place in a bias. But what a LayerNorm gives has no mean, so that the matrix may take anything in the
        # direction of the mean, and the norm's bias points there: in rotated channels the first, which slices keep.
        mean = torch.full_like(gain, len(gain) ** -0.5)
        large = float(torch.linalg.vector_norm(torch.cat(constants)) / torch.linalg.vector_norm(torch.cat(folded)))
        size = large * len(gain) ** 0.5 or 1.0
        folded = [
            m + torch.outer(constant / size - m @ mean, mean) for m, constant in zip(folded, constants, strict=True)
        ]
        after = _ratio(torch.cat(folded), torch.cat([m.detach() for m in matrices]))
        folded, kept = [m / after for m in folded], kept * after
        bias.copy_(mean * size * after)
    for matrix, value in zip(matrices, folded, strict=True):
        matrix.copy_(value)
    weight.fill_(kept)


def _ratio(a: Tensor, b: Tensor) -> float:
    """Root mean square of a by that of b; 1 where either is zero or not finite."""
    ratio = float(torch.linalg.vector_norm(a.double()) / torch.linalg.vector_norm(b.double()))
    return ratio if 0 < ratio < float("inf") else 1.0


def _rotate(supernet: Supernet, rotations: Mapping[int, Tensor]) -> None:
    """Everything that reads or writes the streams, in place, folded before."""
    adapter, params = supernet.adapter, dict(supernet.backbone.named_parameters())
    axes = stream_axes(adapter)
    for reading in readings(adapter):
        bias = f"{reading.norm}.bias"
        if bias in params:
            axes[bias] = {0: ("4S" if reading.quadrants else "S", reading.stage)}
    for name, dims in axes.items():
        for dim, (_, stage) in dims.items():
            if stage in rotations:
                q, p = rotations[stage], params[name]
                moved = p.double().movedim(dim, -1)
                moved = (moved.unflatten(-1, (-1, len(q))) @ q.T).flatten(-2)
                p.copy_(moved.movedim(-1, dim))


def change_heads(supernet: Supernet, basis: Basis, back: bool = False) -> None:
    """q -> A q, k -> A^-T k, v -> T v and the projection after it by T^-1, in place; or back."""
    adapter = supernet.adapter
    for name, block, shape in zip(adapter.block_names, adapter.blocks(), supernet.shapes, strict=True):
        found = basis.qk.get(name), basis.v.get(name)
        if all(m is None for m in found):
            continue
        device = next(block.parameters()).device
        a, t = (None if m is None else m.to(device).double() for m in found)
        if back:
            a, t = (None if m is None else torch.linalg.inv(m) for m in (a, t))
        q, v = a, t
        k, out = (None if m is None else torch.linalg.inv(m).mT for m in (a, t))
        attn = adapter.block_axes.attn
        for leaf, p in adapter.block_parameters(block).items():
            for dim, letters in enumerate(adapter.block_axes[leaf]):
                rows = [p.shape[dim]]
                if letters == "3HD":
                    changes, rows = [q, k, v], qkv_rows(shape)
                elif letters == "HD":
                    changes = [k if leaf in attn.keys else q]
                elif letters == "HV":  # a norm over them would stand against it: head_parts
                    changes = [out if leaf in attn.writers else v]
                else:
                    continue
                parts = p.detach().double().movedim(dim, 0).split(rows)
                by_head = [part.unflatten(0, (shape.num_heads, -1)) for part in parts]
                moved = torch.cat([_in_heads(m, part).flatten(0, 1) for m, part in zip(changes, by_head, strict=True)])
                block.get_parameter(leaf).data.copy_(moved.movedim(0, dim))


def _in_heads(matrices: Tensor | None, t: Tensor) -> Tensor:
    """(H, d, d) on the first two axes of (H, d, ...); None: nothing."""
    if matrices is None:
        return t
    return (matrices @ t.flatten(2)).view_as(t) if t.dim() > 2 else (matrices @ t[..., None])[..., 0]
