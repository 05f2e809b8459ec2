"""What is lost with only the first units (section 2.10), against errors computed the long way."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import Tensor, nn

from search_spaces.slices import identity_slice, network_slice
from supernets.basis import Basis, rewrite
from supernets.calibration import QK_IMAGES, Metric, Wanted, as_it_stands, calibrate
from supernets.compact import cut
from supernets.streams import fixed_streams
from supernets.supernet import Supernet
from tests.nas.small import MIXED, small_supernet
from tests.oracle import blocks_of, norms_late
from tests.strategies import images

# Tokens stand in the order of the image in all of them: a Swin's windows are as large as its maps.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit, norms": ("vit", dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=None)),
    "vit, attention pooling": ("vit", dict(global_pool="map", pool_include_prefix=True)),
    "swin": ("swin", dict(img_size=16)),
    "swinv2": ("swinv2", dict(img_size=16)),
    "t2t": ("t2t", {}),
    "eva": ("eva", {}),
    "eva, mixed": ("eva", MIXED),
    "vit, norms late": ("vit", dict(block_fn=ResPostBlock)),
    "cait": ("cait", {}),
    "beit": ("beit", {}),
    "relpos": ("relpos", {}),
    "relpos, norms after": ("relpos", dict(block_fn=ResPostRelPosBlock)),
    "eva, fused, not turned": ("eva", dict(qkv_fused=True, use_rot_pos_emb=False, scale_mlp=True)),
}
over_networks = pytest.mark.parametrize("network", NETWORKS)
SEED = 5


def small(network: str, seed: int = 2) -> Supernet:
    family, options = NETWORKS[network]
    return small_supernet(family, seed, **options)


def batches(supernet: Supernet, sizes: tuple[int, ...] = (12, 12, 8)) -> list[Tensor]:
    return list(images(supernet.backbone, sum(sizes), 1).split(sizes))


def found(supernet: Supernet, gradient_images: int = 24, seed: int = SEED, inside: bool = True) -> Basis:
    """With what is lost; the gradients of the first images."""
    stages = frozenset(shape.stage for shape in supernet.shapes) - fixed_streams(supernet.adapter).keys()
    wanted = Wanted(stages, inside, error_order=True, gradient_images=gradient_images, seed=seed)
    return calibrate(supernet, batches(supernet), wanted)


def after_attention(block: Any) -> Any:
    """The module whose input is the stream between a block's halves."""
    return block.mlp if norms_late(block) else block.norm2


def gradients(
    supernet: Supernet, seen: list[Tensor], seed: int = SEED, written: bool = False
) -> dict[tuple[str, int], Tensor]:
    """Of the stream after each half, which are those of what the half adds: (E, E), summed over tokens, by image.

    written: of what its last matrix writes, where a norm comes after that. L is cross-entropy with labels drawn from
    the network's own prediction.
    """
    model, generator = copy.deepcopy(supernet.backbone), torch.Generator().manual_seed(seed)
    streams: dict[tuple[str, int], Tensor] = {}
    totals: dict[tuple[str, int], Any] = {}

    def keep(key: tuple[str, int], z: Tensor) -> None:
        z.retain_grad()
        streams[key] = z

    for _, name, block in blocks_of(model):
        if written and norms_late(block):
            block.norm1.register_forward_pre_hook(lambda _, i, name=name: keep((name, 0), i[0]))
            block.norm2.register_forward_pre_hook(lambda _, i, name=name: keep((name, 1), i[0]))
            continue
        after_attention(block).register_forward_pre_hook(lambda _, i, name=name: keep((name, 0), i[0]))
        block.register_forward_hook(lambda _, __, z, name=name: keep((name, 1), z))
    for x in seen:
        logits = model(x)
        labels = torch.multinomial(logits.detach().float().softmax(1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for key, z in streams.items():
            assert z.grad is not None
            g = z.grad.flatten(0, -2)
            totals[key] = totals.get(key, 0) + g.T @ g
    return {key: total / sum(map(len, seen)) for key, total in totals.items()}


def relative(expected: Tensor, a: Tensor) -> float:
    return float((expected - a).detach().abs().max() / expected.detach().abs().max())


@over_networks
def test_the_metric_is_half_the_second_moment_of_the_gradient_at_what_a_half_adds(network: str) -> None:
    supernet = small(network)
    seen = batches(supernet)[:2]
    metric = Metric(supernet, SEED)
    for x in seen:
        metric.large(x)
    for (name, half), moment in gradients(supernet, seen).items():
        root = metric.root(name, half)
        assert relative(moment / 2, root @ root) < 1e-9
        assert torch.allclose(root, root.T) and root.dtype == torch.float64


def watched(supernet: Supernet, layer: str) -> Tensor:
    """What a layer of every batch reads, all tokens, float64."""
    seen: list[Tensor] = []
    module = supernet.backbone.get_submodule(layer)
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for x in batches(supernet):
            supernet.large(x)
    hook.remove()
    return torch.cat(seen)


def written(supernet: Supernet, name: str, writer: str, scale: str) -> Tensor:
    """The matrix to what a half adds, LayerScale and all."""
    weight = supernet.backbone.get_parameter(f"{name}.{writer}.weight").detach()
    params = dict(supernet.backbone.named_parameters())
    gamma = params.get(f"{name}.{scale}.gamma", params.get(f"{name}.gamma_{scale[-1]}"))
    return weight if gamma is None else weight * gamma.detach()[:, None]


def after_least_squares(x: Tensor, output: Tensor, kept: Tensor, metric: Tensor) -> float:
    """Squared error in the metric, by token, when kept units and a bias are fitted to the output."""
    inputs = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=x.dtype)], 1)
    left = output - inputs @ torch.linalg.lstsq(inputs, output, driver="gelsd").solution
    return float(((left @ metric) * left).sum(1).mean())


@over_networks
def test_neurons_and_heads_lose_what_least_squares_leaves_in_the_metric(network: str) -> None:
    """In nats of an image: the metric is that of all its tokens, the error a token's."""
    supernet = small(network)
    basis, moments = found(supernet), gradients(supernet, batches(supernet)[:2], written=True)
    for name, shape in zip(supernet.adapter.block_names, supernet.shapes, strict=True):
        H, d, M = shape.num_heads, shape.head_dim, shape.hidden
        for half, part, writer, scale, of_unit, widths in (
            (0, "heads", "attn.proj", "ls1", d, range(H + 1)),
            (1, "hidden", "mlp.fc2", "ls2", 1, (0, 1, 5, M // 2, M - 1, M)),
        ):
            x, order = watched(supernet, f"{name}.{writer}"), torch.tensor(basis.orders[f"{name}.{part}"])
            output = x @ written(supernet, name, writer, scale).T
            metric, lost = moments[name, half] / 2, basis.lost[f"{name}.{part}"]
            assert lost.shape == (len(order) + 1,) and lost.dtype == torch.float64
            for width in widths:
                kept = (order[:width, None] * of_unit + torch.arange(of_unit)).flatten()
                error = after_least_squares(x, output, kept, metric)
                assert float(lost[width]) == pytest.approx(error, rel=5e-2, abs=1e-4 * float(lost[0]))  # its ridge


@over_networks
@pytest.mark.parametrize("inside", [True, False], ids=["rotated inside", "as they stand"])
def test_channels_of_v_lose_what_goes_with_them_head_by_head(network: str, inside: bool) -> None:
    """In the order of the heads; where nothing is rotated inside the heads, of the channels as they stand."""
    supernet = small(network)
    basis, moments = found(supernet, inside=inside), gradients(supernet, batches(supernet)[:2], written=True)
    assert bool(basis.v) == (inside and network != "vit, norms")
    for name, shape in zip(supernet.adapter.block_names, supernet.shapes, strict=True):
        H, d = shape.num_heads, shape.head_dim
        x = watched(supernet, f"{name}.attn.proj")
        o = x.unflatten(1, (H, d))
        by_head = written(supernet, name, "attn.proj", "ls1").unflatten(1, (H, d))
        identity = torch.eye(d, dtype=torch.float64).expand(H, d, d)
        change, metric, lost = basis.v.get(name, identity), moments[name, 0] / 2, basis.lost[f"{name}.v"]
        assert lost.shape == (H, d + 1)
        for place, head in enumerate(basis.orders[f"{name}.heads"]):
            t, own, largest = change[head], o[:, head], 0.0
            for width in range(d, -1, -1):  # more channels never lose more
                left = own - torch.linalg.solve(t, torch.where(torch.arange(d) < width, own @ t.T, 0).T).T
                error = left @ by_head[:, head].T
                largest = max(largest, float(((error @ metric) * error).sum(1).mean()))
                assert float(lost[place, width]) == pytest.approx(largest, rel=1e-3, abs=1e-4 * float(lost[place, 0]))


def stream_after_attention(model: nn.Module, name: str, seen: list[Tensor]) -> Tensor:
    """(images * tokens, E)"""
    streams: list[Tensor] = []
    module = after_attention(model.get_submodule(name))
    hook = module.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for x in seen:
            model(x)
    hook.remove()
    return torch.cat(streams)


@over_networks
def test_channels_of_q_and_k_lose_what_a_network_narrowed_there_does(network: str) -> None:
    supernet = small(network)
    basis, seen = found(supernet), batches(supernet)[:2]
    assert sum(map(len, seen)) <= QK_IMAGES
    moments, shapes = gradients(supernet, seen), supernet.shapes
    changed = Supernet(copy.deepcopy(supernet.backbone)).eval()
    rewrite(changed, Basis(qk=basis.qk))
    # in pairs that turn they stay as they are
    assert bool(basis.qk) == (network not in ("vit, norms", "eva", "eva, mixed"))
    for i, (name, shape) in enumerate(zip(supernet.adapter.block_names, shapes, strict=True)):
        whole, errors = stream_after_attention(supernet.backbone, name, seen), {shape.head_dim: 0.0}
        for width in range(shape.qk_unit, shape.head_dim, shape.qk_unit):
            own = [identity_slice(s) for s in shapes]
            own[i] = type(own[i])(own[i].stream, own[i].heads, own[i].hidden, qk=width)
            left = stream_after_attention(cut(changed.backbone, network_slice(shapes, own)).eval(), name, seen) - whole
            errors[width] = float(((left @ (moments[name, 0] / 2)) * left).sum(1).mean())
        lost = basis.lost[f"{name}.qk"]
        assert lost.shape == (shape.head_dim + 1,) and float(lost[0]) == float(lost[1])
        for width in range(shape.qk_unit, shape.head_dim + 1, shape.qk_unit):  # more channels never lose more
            expected = max(error for w, error in errors.items() if w >= width)
            assert float(lost[width]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "swin, padded and shifted": ("swin", {}),
    "swinv2, padded and shifted": ("swinv2", {}),
}


@pytest.mark.parametrize("network", NETWORKS | PADDED)
@pytest.mark.parametrize("inside", [True, False])
def test_wider_never_loses_more_and_the_whole_loses_nothing(network: str, inside: bool) -> None:
    family, options = (NETWORKS | PADDED)[network]
    supernet = small_supernet(family, 3, **options)
    lost = found(supernet, inside=inside).lost
    parts = ("heads", "qk", "v", "hidden")
    assert lost.keys() == {f"{name}.{part}" for name in supernet.adapter.block_names for part in parts}
    for name, each in lost.items():
        assert torch.isfinite(each).all() and (each[..., -1] == 0).all(), name
        assert (each.diff(dim=-1) <= 1e-9 * each.max()).all() and (each[..., 0] > 0).all(), name


@over_networks
def test_without_a_metric_errors_are_of_the_plain_output(network: str) -> None:
    supernet = small(network)
    basis = calibrate(supernet, batches(supernet), Wanted(error_order=True))
    name, shape = supernet.adapter.block_names[0], supernet.shapes[0]
    x = watched(supernet, f"{name}.mlp.fc2")
    variance = float((x @ written(supernet, name, "mlp.fc2", "ls2").T).var(0, correction=0).sum())
    assert float(basis.lost[f"{name}.hidden"][0]) == pytest.approx(variance, rel=1e-5)
    assert f"{name}.qk" not in basis.lost and shape.hidden + 1 == len(basis.lost[f"{name}.hidden"])


# What it leaves behind


def test_a_seed_has_one_metric() -> None:
    supernet = small("vit")
    first, again, other = found(supernet).lost, found(supernet).lost, found(supernet, seed=6).lost
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    assert not torch.allclose(first["blocks.0.hidden"], other["blocks.0.hidden"])


def test_only_so_many_images_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole batches."""
    supernet, seen = small("vit"), []
    large = Metric.large
    monkeypatch.setattr(Metric, "large", lambda self, x: (seen.append(len(x)), large(self, x)))
    for number, expected in ((1, [12]), (12, [12]), (13, [12, 12]), (99, [12, 12, 8])):
        seen.clear()
        found(supernet, number)
        assert seen == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["as it should", "an error among the images", "an error in the network"])
def test_parameters_get_no_gradients_and_are_trained_as_before(how: str, training: bool) -> None:
    supernet = small("vit").train(training)
    frozen = list(supernet.parameters())[::3]
    for p in frozen:
        p.requires_grad_(False)
    before = [p.requires_grad for p in supernet.parameters()]
    weights = copy.deepcopy(supernet.state_dict())

    def broken() -> Iterator[Tensor]:
        yield from batches(supernet)
        if how == "an error among the images":
            raise OSError("no more images")
        if how == "an error in the network":
            yield torch.full_like(batches(supernet)[0], torch.nan)  # nothing can be drawn from its prediction

    if how == "as it should":
        found(supernet)
    else:
        with pytest.raises((OSError, RuntimeError)):
            calibrate(supernet, broken(), Wanted(frozenset({0}), True, True, gradient_images=99))
    assert [p.requires_grad for p in supernet.parameters()] == before
    assert all(p.grad is None for p in supernet.parameters())
    assert all(module.training == training for module in supernet.modules())
    assert not [n for n, m in supernet.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert all(torch.equal(t, weights[name]) for name, t in supernet.state_dict().items())


def test_orders_of_errors_begin_with_what_matters_most() -> None:
    """One neuron alone that writes: all others lose nothing."""
    supernet = small("vit")
    with torch.no_grad():
        fc2 = supernet.backbone.get_parameter("blocks.1.mlp.fc2.weight")
        fc2[:, [i for i in range(fc2.shape[1]) if i != 7]] = 0
    basis = found(supernet)
    assert basis.orders["blocks.1.hidden"][0] == 7
    lost = basis.lost["blocks.1.hidden"]
    assert float(lost[1]) < 1e-5 * float(lost[0])
    assert all(float(a) >= float(b) for a, b in pairwise(lost))


@over_networks
def test_as_it_stands_in_its_basis_a_network_loses_what_the_basis_said(network: str) -> None:
    """Heads and neurons in the order that was found, q, k and v in the basis that was found."""
    supernet = small(network)
    basis = found(supernet)
    rewrite(supernet, basis)
    again = as_it_stands(supernet, batches(supernet), gradient_images=24, seed=SEED)
    assert again.keys() == basis.lost.keys()
    for name, lost in basis.lost.items():
        if name.endswith(".v") and name.removesuffix(".v") not in basis.v:
            continue  # there the basis speaks of an error that is not refitted
        assert torch.allclose(again[name], lost, rtol=2e-3, atol=1e-5 * float(lost.max())), name
