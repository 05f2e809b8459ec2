"""A basis found on images: what it is computed from, what its first rows keep, and networks that are dead in places."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.slices import NetworkSlice, identity_slice, network_slice, prefix_slice
from supernets.basis import Basis, rewrite, timm_state
from supernets.calibration import (
    FLOOR,
    Moment,
    StreamMoments,
    Wanted,
    calibrate,
    complement_of_ones,
    qk_change,
    rotation_of,
    v_change,
)
from supernets.compact import cut
from supernets.importance import magnitude_scores, orders_of, permute
from supernets.supernet import Supernet
from tests.oracle import blocks_of, randomise
from tests.strategies import disturb, images, well_conditioned
from tests.supernets.test_backbones import build

OPTIONS: dict[str, dict[str, Any]] = {  # LayerScale; padded windows and an odd feature map
    "vit": dict(init_values=1.0),
    "swin": dict(img_size=36, num_heads=(4, 4)),
    "t2t": dict(),
}
over_families = pytest.mark.parametrize("family", OPTIONS)


def small(family: str, seed: int = 0, **options: Any) -> Supernet:
    """A random backbone of the family, float64, eval mode."""
    return Supernet(randomise(build[family](**OPTIONS[family] | options), seed)).double().eval()


def batches(backbone: nn.Module, sizes: tuple[int, ...] = (6, 6, 4), seed: int = 0) -> list[Tensor]:
    """Images for a backbone, float64."""
    return list(images(backbone.double(), sum(sizes), seed).split(sizes))


def positive(size: int, seed: int, *before: int) -> Tensor:
    """(..., size, size) positive definite, of falling eigenvalues, float64."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(*before, size, 3 * size, generator=generator, dtype=torch.float64)
    columns = torch.logspace(0, -1.5, size, dtype=torch.float64)[:, None] * columns
    turned = torch.linalg.qr(torch.randn(*before, size, size, generator=generator, dtype=torch.float64))[0] @ columns
    return turned @ turned.mT / columns.shape[-1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


# Rotations of a stream


@pytest.mark.parametrize("mean_first", [True, False])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_rotation_has_the_eigenvectors_by_falling_energy(size: int, mean_first: bool) -> None:
    moment = positive(size, seed=size)
    q = rotation_of(moment, mean_first)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if mean_first:
        assert torch.allclose(q[0], torch.full((size,), size**-0.5, dtype=torch.float64))
    turned = (q @ moment @ q.T)[int(mean_first) :, int(mean_first) :]
    energy = turned.diagonal()
    assert torch.all(energy[:-1] >= energy[1:]) and torch.all(energy > 0)
    assert torch.allclose(turned, torch.diag(energy), atol=1e-12)
    assert torch.equal(rotation_of(moment.clone(), mean_first), q)
    free = q[int(mean_first) :]
    assert torch.all(free.gather(1, free.abs().argmax(1, keepdim=True)) > 0)  # an eigenvector has no sign of its own


def test_no_image_at_all_is_a_rotation_still() -> None:
    q = rotation_of(torch.zeros(5, 5, dtype=torch.float64), mean_first=True)
    assert torch.allclose(q @ q.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    rows = complement_of_ones(5)
    assert rows.shape == (4, 5) and torch.allclose(rows.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_a_moment_is_the_mean_over_rows_however_they_come() -> None:
    x = 30 + torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, centred = Moment(), Moment(centred=True)
    for part in x.split((1, 25, 14), 1):
        plain.add(part)
        centred.add(part)
    assert torch.allclose(plain.value(), x.mT @ x / 40)
    around = x - x.mean(1, keepdim=True)
    assert torch.allclose(centred.value(), around.mT @ around / 40, atol=1e-12)


def normalised(norm: Any, x: Tensor) -> Tensor:
    """What a norm makes of x without its weight and its bias."""
    shape = x.shape[-1:]
    return (
        F.layer_norm(x, shape, eps=norm.eps) if isinstance(norm, nn.LayerNorm) else F.rms_norm(x, shape, eps=norm.eps)
    )


def pooled(model: Any, before: Tensor) -> Tensor:
    """What the classifier reads of the tokens that enter the last norm, without affines, (B, E)."""
    if hasattr(model, "layers"):
        return normalised(model.norm, before).mean((1, 2))
    first = model.num_prefix_tokens
    if isinstance(model.norm, nn.Identity):
        return normalised(model.fc_norm, before[:, first:].mean(1))
    tokens = normalised(model.norm, before)
    return tokens[:, first:].mean(1) if getattr(model, "global_pool", "token") == "avg" else tokens[:, 0]


def moments_of_timm(model: Any, images: list[Tensor]) -> dict[int, Tensor]:
    """Of every stage the mean over its readers of E[n nᵀ], by timm's own forward on a copy."""
    model = copy.deepcopy(model)
    swin, rows = hasattr(model, "layers"), {}
    size = {stage: block.norm1.normalized_shape[0] for stage, _, block in blocks_of(model)}

    def watch(stage: int, key: str, norm: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
        def hook(_: Any, inputs: tuple[Tensor]) -> None:
            rows.setdefault((stage, key), []).append(read(inputs[0].detach()).reshape(-1, size[stage]))

        norm.register_forward_pre_hook(hook)

    for stage, name, block in blocks_of(model):
        for norm in (block.norm1, block.norm2):
            watch(stage, f"{name} {norm is block.norm1}", norm, partial(normalised, norm))
    for stage, layer in enumerate(model.layers[1:] if swin else ()):  # (..., 4 E): four rows
        watch(stage, "merging", layer.downsample.norm, partial(normalised, layer.downsample.norm))
    watch(max(size), "classifier", model.norm, partial(pooled, model))
    with torch.no_grad():
        for batch in images:
            model(batch)
    found: dict[int, list[Tensor]] = {}
    for (stage, _), seen in rows.items():
        n = torch.cat(seen)
        found.setdefault(stage, []).append(n.T @ n / len(n))
    return {stage: torch.stack(each).mean(0) for stage, each in found.items()}


POOLED: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit, mean of the patches": ("vit", {"global_pool": "avg", "fc_norm": False}),
    "vit, fc_norm": ("vit", {"global_pool": "avg"}),
    "vit, no class token": ("vit", {"global_pool": "avg", "fc_norm": False, "class_token": False}),
    "vit, rmsnorm": ("vit", {"norm_layer": "rmsnorm"}),
    "swin": ("swin", {}),
    "t2t": ("t2t", {}),
}


@pytest.mark.parametrize("case", POOLED)
def test_the_second_moment_is_that_of_timms_own_norms(case: str) -> None:
    """Over blocks, the four quadrants of a merging, and what the classifier reads of the tokens."""
    family, options = POOLED[case]
    supernet = small(family, seed=1, **options)
    seen = batches(supernet.backbone)
    expected = moments_of_timm(supernet.backbone, seen)
    with ExitStack() as hooks, torch.no_grad():
        moments = StreamMoments(supernet, expected, hooks)
        for batch in seen:
            supernet.large(batch)
    found = moments.second_moments()
    assert found.keys() == expected.keys() == {shape.stage for shape in supernet.shapes}
    for stage, moment in found.items():
        assert moment.dtype == torch.float64
        assert relative(expected[stage], moment) < 1e-10, stage


def test_only_the_stages_that_are_asked_for_are_watched() -> None:
    supernet = small("swin")
    with ExitStack() as hooks:
        moments = StreamMoments(supernet, {1}, hooks)
    assert {stage for stage, _ in moments.moments.values()} == {1}
    basis = calibrate(supernet, batches(supernet.backbone), Wanted(frozenset({1})))
    assert list(basis.streams) == [1] and not basis.qk and not basis.v and not basis.orders


def untouched(supernet: Supernet, before: dict[str, Tensor]) -> bool:
    """Whether a network in training mode has its weights, its mode and no hooks."""
    hooked = [n for n, m in supernet.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    same = all(torch.equal(before[name], t) for name, t in supernet.state_dict().items())
    return same and not hooked and all(m.training for m in supernet.modules())


@over_families
def test_a_calibration_sees_every_image_once_and_leaves_the_network_as_it_was(family: str) -> None:
    supernet = small(family).train()
    before, seen = copy.deepcopy(supernet.state_dict()), []
    images = batches(supernet.backbone)
    wanted = Wanted(frozenset({0}), inside=True, error_order=True)
    watch = supernet.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    basis = calibrate(supernet, iter(images), wanted)
    watch.remove()
    assert seen == [6, 6, 4] and untouched(supernet, before)
    once = calibrate(supernet, [torch.cat(images)], wanted)  # the batches do not matter, but for rounding
    for name, tensor in basis.tensors().items():
        assert torch.allclose(tensor.double(), once.tensors()[name].double(), atol=1e-6), name
    again = calibrate(supernet, images, wanted)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in basis.tensors().items())
    shares = basis.energy[0]
    assert float(shares.sum()) == pytest.approx(1) and torch.all(shares[1:-1] >= shares[2:])


def test_images_that_end_in_an_error_leave_the_network_as_it_was() -> None:
    supernet = small("swin").train()
    before = copy.deepcopy(supernet.state_dict())

    def broken() -> Iterator[Tensor]:
        yield from batches(supernet.backbone)
        raise OSError("no more images")

    with pytest.raises(OSError, match="no more images"):
        calibrate(supernet, broken(), Wanted(frozenset({0, 1}), inside=True, error_order=True))
    assert untouched(supernet, before)


@over_families
def test_4_what_was_found_leaves_the_function_unchanged(family: str) -> None:
    supernet = small(family, seed=2)
    images = batches(supernet.backbone)
    stages = frozenset(shape.stage for shape in supernet.shapes)
    x = batches(supernet.backbone, (3,), seed=9)[0]
    expected = supernet.large(x)
    rewrite(supernet, calibrate(supernet, images, Wanted(stages, inside=True, error_order=True)))
    assert relative(expected, supernet.large(x)) < 1e-9


@over_families
@pytest.mark.parametrize("alphas", [(2, 2, 2), (1, 2, 1)], ids=["one width", "several widths"])
def test_what_was_trained_in_a_basis_comes_back_slice_by_slice(family: str, alphas: tuple[int, ...]) -> None:
    """Through timm's own names, as a run saves it: the subnet, too, and not only the whole network."""
    supernet = small(family, seed=5)
    timm = copy.deepcopy(supernet.backbone)
    stages = frozenset(shape.stage for shape in supernet.shapes)
    basis = calibrate(supernet, batches(supernet.backbone), Wanted(stages, inside=True, error_order=True))
    rewrite(supernet, basis)
    disturb(supernet.backbone, seed=1)
    timm.load_state_dict(timm_state(supernet))
    again = Supernet(timm).eval()
    rewrite(again, basis, again=True)
    blocks = [prefix_slice(shape, alpha, "stream") for shape, alpha in zip(supernet.shapes, alphas, strict=False)]
    x, subnet = images(supernet.backbone, 3, seed=9), network_slice(supernet.shapes, blocks)
    assert relative(supernet.large(x), timm(x)) < 1e-8
    assert relative(supernet.large(x), again.large(x)) < 1e-8
    assert relative(supernet.small(x, subnet), again.small(x, subnet)) < 1e-8
    assert relative(supernet.small(x, subnet), cut(again.backbone, subnet)(x)) < 1e-8


# Inside the heads


@over_families
def test_inside_a_head_count_q_keys_less_their_mean_and_what_the_projection_reads(family: str) -> None:
    """Of every image, or every window of it, as timm's attention splits them."""
    supernet = small(family, seed=4)
    seen: dict[str, list[Tensor]] = {"qkv": [], "proj": []}
    block: Any = supernet.adapter.blocks()[0]
    H = supernet.shapes[0].num_heads
    hooks = [
        block.attn.qkv.register_forward_hook(lambda _, __, qkv: seen["qkv"].append(qkv)),
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen["proj"].append(inputs[0])),
    ]
    basis = calibrate(supernet, batches(supernet.backbone), Wanted(inside=True))
    for hook in hooks:
        hook.remove()
    qkv = torch.cat(seen["qkv"])
    q, k, _ = qkv.reshape(*qkv.shape[:2], 3, H, -1).permute(2, 3, 0, 1, 4)  # (H, images or windows, tokens, d)
    k = k - k.mean(-2, keepdim=True)
    out = torch.cat(seen["proj"]).flatten(0, -2).unflatten(-1, (H, -1)).transpose(0, 1)
    of_q, of_k, of_out = (x.mT @ x / x.shape[1] for x in (q.flatten(1, 2), k.flatten(1, 2), out))
    scale = getattr(getattr(block, "ls1", None), "gamma", torch.ones(1))  # of what the projection writes
    proj = (block.attn.proj.weight * scale[:, None]).unflatten(1, (H, -1)).transpose(0, 1)
    name = supernet.adapter.block_names[0]
    assert relative(qk_change(of_q, of_k), basis.qk[name]) < 1e-6
    assert relative(v_change(of_out, proj), basis.v[name]) < 1e-6
    assert basis.qk.keys() == basis.v.keys() == set(supernet.adapter.block_names) and not basis.streams


def logits_lost(q: Tensor, k: Tensor, a: Tensor, kept: int) -> Tensor:
    """E[(q·k - q'·k')²] of independent q and k of these second moments, q' and k' the first channels of A q, A^-T k."""
    project = a.mT[..., :kept] @ torch.linalg.inv(a).mT[..., :kept, :]
    left = torch.eye(a.shape[-1], dtype=torch.float64) - project
    return (q @ left @ k @ left.mT).diagonal(dim1=-2, dim2=-1).sum(-1)


def test_the_first_channels_of_q_and_k_keep_the_most_of_the_logits_variance() -> None:
    H, d = 3, 6
    q, k = positive(d, 0, H), positive(d, 1, H)
    a = qk_change(q, k)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, H, d, 20, generator=generator, dtype=torch.float64)
    changed = (a @ x).mT @ (torch.linalg.inv(a).mT @ y)
    assert torch.allclose(changed, x.mT @ y, atol=1e-9)  # the logits
    of_q, of_k = a @ q @ a.mT, torch.linalg.inv(a).mT @ k @ torch.linalg.inv(a)
    assert torch.allclose(of_q, of_k, rtol=1e-3, atol=1e-5)  # equally large in each channel
    sizes = of_q.diagonal(dim1=-2, dim2=-1)
    assert torch.all(sizes[:, :-1] >= sizes[:, 1:])
    for kept in range(1, d):
        best = logits_lost(q, k, a, kept)
        assert torch.allclose(best, (sizes[:, kept:] ** 2).sum(1), rtol=1e-3)
        for _ in range(20):
            assert torch.all(best <= logits_lost(q, k, well_conditioned(H, d, generator), kept) * (1 + 1e-6))


def output_lost(out: Tensor, proj: Tensor, t: Tensor, kept: int) -> Tensor:
    """E|proj o - proj T^-1 (T o cut to its first channels)|², by head."""
    left = proj - proj @ torch.linalg.inv(t)[..., :kept] @ t[..., :kept, :]
    return (left @ out @ left.mT).diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("E", [9, 4])  # channels of the stream: more than a head has, and fewer
def test_the_first_channels_of_v_keep_the_most_of_what_the_projection_writes(E: int) -> None:
    H, d = 3, 6
    out, generator = positive(d, 3, H), torch.Generator().manual_seed(4)
    proj = torch.randn(H, E, d, generator=generator, dtype=torch.float64)
    t = v_change(out, proj)
    x = torch.randn(H, d, 20, generator=generator, dtype=torch.float64)
    assert torch.allclose(proj @ torch.linalg.inv(t) @ (t @ x), proj @ x, atol=1e-8)
    of_v = (t @ out @ t.mT).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(of_v.sum(1), out.diagonal(dim1=-2, dim2=-1).sum(1))  # as large as it was on the whole
    for kept in range(1, d):
        best = output_lost(out, proj, t, kept)
        for _ in range(20):
            other = output_lost(out, proj, well_conditioned(H, d, generator), kept)
            assert torch.all(best <= other * (1 + 1e-6) + 1e-9)


def test_nothing_inside_a_head_is_a_change_still() -> None:
    nothing, some = torch.zeros(1, 4, 4, dtype=torch.float64), positive(4, 5, 1)
    line = torch.zeros(1, 4, 4, dtype=torch.float64)
    line[0, 1, 1] = 2.0  # one direction alone
    proj = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = [qk_change(q, k) for q in (nothing, line, some) for k in (nothing, line, some)]
    changes += [v_change(out, p) for out in (nothing, line, some) for p in (proj, torch.zeros_like(proj))]
    for change in changes:
        back = torch.linalg.inv(change)
        assert torch.isfinite(change).all() and torch.isfinite(back).all()
        assert torch.allclose(change @ back, torch.eye(4, dtype=torch.float64), atol=1e-6)
    assert FLOOR < 1e-3


# Whole networks


def with_dead_heads(supernet: Supernet) -> None:
    """One head whose q is 0, one whose k is 0 and v constant, a third without a projection."""
    shape = supernet.shapes[0]
    block: Any = supernet.adapter.blocks()[0]
    H, d = shape.num_heads, shape.head_dim
    with torch.no_grad():
        rows = block.attn.qkv.weight.view(3, H, d, -1)
        rows[0, 0] = rows[1, 1] = rows[2, 1] = 0
        if block.attn.qkv.bias is not None:
            of_bias = block.attn.qkv.bias.view(3, H, d)
            of_bias[0, 0] = of_bias[1, 1] = 0
        block.attn.proj.weight.view(-1, H, d)[:, 2] = 0


@over_families
def test_dead_heads_and_constant_images_give_a_basis_that_can_be_taken_back(family: str) -> None:
    supernet = small(family, seed=3)
    with_dead_heads(supernet)
    x = batches(supernet.backbone, (3,), seed=9)[0]
    expected, stages = supernet.large(x), frozenset(shape.stage for shape in supernet.shapes)
    for seen in (batches(supernet.backbone), [torch.full_like(x, 0.3)] * 2, [torch.zeros_like(x[:1])]):
        net = Supernet(copy.deepcopy(supernet.backbone)).eval()
        basis = calibrate(net, seen, Wanted(stages, inside=True, error_order=True))
        assert all(torch.isfinite(t).all() for t in basis.tensors().values())
        for changes in (basis.qk, basis.v):
            for t in changes.values():
                assert torch.allclose(t @ torch.linalg.inv(t), torch.eye(t.shape[-1], dtype=torch.float64), atol=1e-6)
        rewrite(net, basis)
        assert relative(expected, net.large(x)) < 1e-7


def test_a_network_of_zeros_is_rotated_all_the_same() -> None:
    supernet = small("vit")
    with torch.no_grad():
        for p in supernet.backbone.parameters():
            p.zero_()
    x = batches(supernet.backbone, (2,))[0]
    basis = calibrate(supernet, [x], Wanted(frozenset({0}), inside=True, error_order=True))
    assert all(torch.isfinite(t).all() for t in basis.tensors().values())
    rewrite(supernet, basis)
    assert torch.equal(supernet.large(x), torch.zeros_like(supernet.large(x)))


def low_rank(rank: int, seed: int = 0) -> Supernet:
    """A ViT whose stream never leaves `rank` directions, none of which is a channel."""
    torch.manual_seed(seed)
    model: Any = randomise(build["vit"](class_token=False, global_pool="avg", fc_norm=False), seed).double()
    E = model.embed_dim
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(E, rank, generator=generator, dtype=torch.float64))[0]
    project = directions @ directions.T
    with torch.no_grad():
        model.pos_embed.copy_(model.pos_embed @ project)
        writers = [model.patch_embed.proj] + [w for block in model.blocks for w in (block.attn.proj, block.mlp.fc2)]
        for writer in writers:
            writer.weight.copy_((project @ writer.weight.flatten(1)).view_as(writer.weight))
            writer.bias.copy_(project @ writer.bias)
    return Supernet(model).eval()


def narrowed(supernet: Supernet, width: int) -> NetworkSlice:
    """All heads and neurons, on the first channels of the stream alone."""
    return network_slice(supernet.shapes, [replace(identity_slice(shape), stream=width) for shape in supernet.shapes])


def test_a_rotated_prefix_keeps_what_an_ordered_one_loses() -> None:
    """Eight directions hold a stream of 32 channels: with the mean, nine rotated channels are the whole network."""
    rank, width = 8, 9
    rotated, ordered = low_rank(rank), low_rank(rank)
    images = batches(rotated.backbone, (24, 24))
    x = batches(rotated.backbone, (4,), seed=9)[0]
    expected = rotated.large(x)
    basis = calibrate(rotated, images, Wanted(frozenset({0})))
    assert float(basis.energy[0][:width].sum()) == pytest.approx(1)
    rewrite(rotated, basis)
    permute(ordered, orders_of(magnitude_scores(ordered)))
    with ExitStack() as hooks, torch.no_grad():
        moments = StreamMoments(ordered, {0}, hooks)
        for batch in images:
            ordered.large(batch)
    shares = moments.second_moments()[0].diagonal()
    assert float(shares[:width].sum() / shares.sum()) < 0.7
    lost = [relative(expected, net.small(x, narrowed(net, width))) for net in (rotated, ordered)]
    assert lost[0] < 1e-3 < 0.1 < lost[1]  # the norm's epsilon is what is left
    assert relative(expected, cut(rotated.backbone, narrowed(rotated, width))(x)) < 1e-3
    assert isinstance(basis, Basis)
