"""Section 2.11: a refit is the least squares that it says it is, layer by layer, and its values are a slice's own."""

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import Tensor, nn

import supernets.refit
from search_spaces.slices import BlockSlice, NetworkSlice, count, identity_slice, network_slice
from supernets.axes import within
from supernets.basis import Basis, rewrite
from supernets.compact import cut
from supernets.coordinates import compact_parameters
from supernets.refit import Residual, Ridge, _Refit, bytes_held, refit, towards_prediction, write, written
from supernets.rotary import FREQS
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, MIXED, small_supernet
from tests.oracle import blocks_of, kept_weights, norms_late, readers_of
from tests.strategies import block_shapes, general_slices, images, qk_width, random_basis
from tests.supernets import test_invariants
from tests.supernets.test_invariants import few, relative

over_families = pytest.mark.parametrize("family", FAMILIES)
over_bases = pytest.mark.parametrize("basis", ["own", "rotated"])
SQUARES = Ridge(prediction=math.inf)


def seen(supernet: Supernet, number: int = 24, seed: int = 3) -> list[Tensor]:
    """Images in three batches."""
    return list(images(supernet.backbone, number, seed).split(-(-number // 3)))


def narrow(shape: Any, i: int) -> BlockSlice:
    """Every width of its own, all of them prefixes, the stream's that of the stage."""
    E, H, d, M = shape.embed_dim, shape.num_heads, shape.head_dim, shape.hidden
    return BlockSlice(3 * E // 4, H - i % 2, M // 2 + 3 * i, qk=qk_width(shape, d - 1 + i % 2), v_channels=d - 2)


def indices(shape: Any, i: int) -> BlockSlice:
    """Heads, neurons, and channels of the MLP and of every head's v by their indices; blocks of several widths."""
    E, H, d, M = shape.embed_dim, shape.num_heads, shape.head_dim, shape.hidden
    heads, stream = tuple(range(i % 2, H, 2)), E - 2 * i
    uneven = tuple(tuple(range(1 + (h + i) % d)) for h in heads)
    return BlockSlice(stream, heads, tuple(range(1, M, 2)), tuple(range(i, stream, 3)), qk=d - 2, v_channels=uneven)


def halves(shape: Any, i: int) -> BlockSlice:
    """One block without attention, one without an MLP, one with neither."""
    return BlockSlice(shape.embed_dim - 3, shape.num_heads, shape.hidden, attn=i == 1, mlp=i == 0)


def inner(shape: Any, i: int) -> BlockSlice:
    """The stream whole."""
    return BlockSlice(shape.embed_dim, shape.num_heads - 1, shape.hidden - 5, qk=shape.head_dim - 2, v_channels=2)


def named(shape: Any, i: int) -> BlockSlice:
    """All of a block, index by index."""
    v = (tuple(range(shape.head_dim)),) * shape.num_heads
    heads, hidden, stream = (tuple(range(n)) for n in (shape.num_heads, shape.hidden, shape.embed_dim))
    return BlockSlice(shape.embed_dim, heads, hidden, stream, shape.head_dim, v)


def whole(shape: Any, i: int) -> BlockSlice:
    return identity_slice(shape)


Cut = Callable[[Any, int], BlockSlice]
over_cuts = pytest.mark.parametrize("make", [narrow, indices, halves, inner], ids=lambda make: make.__name__)


def subnet_of(supernet: Supernet, make: Cut) -> NetworkSlice:
    return network_slice(supernet.shapes, [make(shape, i) for i, shape in enumerate(supernet.shapes)])


def moved(supernet: Supernet, subnet: NetworkSlice, values: Mapping[str, Tensor]) -> float:
    """How far refitted values are from the slice's own, of the largest entry of each parameter."""
    before = supernet.backbone.state_dict()
    with written(supernet, subnet, values):
        after = {name: supernet.backbone.get_parameter(name).detach().clone() for name in values}
    return max(relative(before[name], after[name]) for name in values)


# Invariant 11


@over_families
@over_bases
@pytest.mark.parametrize("make", [whole, named], ids=["whole", "every index"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_11_a_cut_that_removes_nothing_changes_no_weight(
    make: Cut, family: str, basis: str, dtype: torch.dtype
) -> None:
    supernet = small_supernet(family, 1, basis).to(dtype)
    subnet = subnet_of(supernet, make)
    values = refit(supernet, subnet, seen(supernet))
    # What float32 rounds off a stream is much beside what a small LayerScale lets through; the function is the same.
    assert moved(supernet, subnet, values) < (1e-9 if dtype is torch.float64 else 1e-2)
    x = images(supernet.backbone, 3, 9)
    expected = supernet.large(x)
    with written(supernet, subnet, values):
        assert relative(expected, supernet.large(x)) < (1e-10 if dtype is torch.float64 else 1e-4)
    layers = {name for name, module in supernet.backbone.named_modules() if isinstance(module, nn.Linear)}
    left = re.compile(
        r"tokens_to_token|.*cpb_mlp|.*rel_pos|.*attn\.proj_[lw]$|blocks_token_only\.\d+\.(attn\.proj|mlp\.fc2)$"
    )
    layers = {name for name in layers if not left.match(name)}
    there = {name for name, _ in supernet.backbone.named_parameters()}
    parted = {name for name in there if name.endswith(("attn.q_bias", "attn.v_bias"))}
    assert values.keys() == {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")} & there | parted


@pytest.mark.parametrize("family", test_invariants.BACKBONES)
@given(data=st.data())
@few
def test_11_whatever_the_network(family: str, data: st.DataObject) -> None:
    """Norms of q and k, after heads and neurons; RMS norms; no bias; registers; two classifiers."""
    supernet = Supernet(data.draw(test_invariants.BACKBONES[family]()).double()).eval()
    if data.draw(st.booleans()):
        rewrite(supernet, random_basis(supernet, 0))
    subnet = supernet.identity()
    assert moved(supernet, subnet, refit(supernet, subnet, [images(supernet.backbone, 6)])) < 1e-7


# Least squares


def by_lstsq(x: Tensor, r: Tensor, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
    """Change of matrix and bias: rows of images, and below them a row for each entry that the ridge holds."""
    x, r = x.flatten(0, -2), r.flatten(0, -2)
    size = (x.var(0, correction=0) if bias else x.square().mean(0)).mean()
    if bias and size < 1e-20:  # CaiT's class token, before it has read: the bias takes all
        return torch.zeros(r.shape[1], x.shape[1], dtype=x.dtype), r.mean(0)
    held = (len(x) * ridge * size).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    ones = torch.ones(len(x), int(bias), dtype=x.dtype)
    rows = torch.cat([torch.cat([x, ones], 1), torch.cat([held, held.new_zeros(len(held), int(bias))], 1)])
    found = torch.linalg.lstsq(rows, torch.cat([r, r.new_zeros(len(held), r.shape[1])]), driver="gelsd").solution
    return found[: x.shape[1]].T, found[x.shape[1] :].sum(0)


class Watched:
    """What every layer, norm and block of a network reads and writes on some images, one forward pass at a time."""

    def __init__(self, model: Any, x: Tensor) -> None:
        self.model, self.x = model, x
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> "Watched":
        hooks = [
            module.register_forward_hook(lambda _, i, o, name=name: self._keep(name, i[0], o))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | nn.LayerNorm)
        ]
        hooks += [
            block.register_forward_hook(lambda _, i, o, name=name: self._keep(name, i[0], o))
            for _, name, block in blocks_of(self.model)
        ]
        self.model(self.x)
        for hook in hooks:
            hook.remove()
        return self

    def _keep(self, name: str, read: Tensor, wrote: Tensor) -> None:
        self.inputs[name], self.outputs[name] = read.clone(), wrote.clone()


def tokens_of(t: Tensor) -> Tensor:
    """(B, N, E), of a Swin's (B, H, W, E), too."""
    return t.flatten(1, -2)


@torch.no_grad()
def reference(supernet: Supernet, subnet: NetworkSlice, x: Tensor, ridge: Ridge) -> dict[str, Tensor]:
    """The refit on timm's own modules, the compact network's and the backbone's, layer by layer."""
    backbone: Any = supernet.backbone
    small: Any = cut(backbone, subnet).eval()
    large = Watched(backbone, x).run()
    masks = kept_weights(backbone, subnet).tensors
    found: dict[str, Tensor] = {}
    readers = {norm: layers for _, norm, layers, _ in readers_of(backbone)}

    def fit(name: str, read: Tensor, lacking: Tensor, share: float) -> None:
        layer, owner = small.get_submodule(name), name.rpartition(".")[0]
        places: list[tuple[slice, str]] = [(slice(None), f"{name}.bias")]
        if name.endswith("qkv") and hasattr(small.get_submodule(owner), "q_bias"):
            # timm: torch.cat((self.q_bias, self.k_bias, self.v_bias)), the second of zeros
            qk = len(small.get_submodule(owner).q_bias)
            rows = slice(qk), slice(qk, 2 * qk), slice(2 * qk, None)
            places = list(zip(rows, (f"{owner}.q_bias", "", f"{owner}.v_bias"), strict=True))
        params = dict(small.named_parameters())
        for part, bias in places:
            change, more = by_lstsq(read, lacking[..., part], share, bias in params)
            layer.weight[part] += change
            if bias in params:
                params[bias] += more
                found[bias] = params[bias].clone()
        found[f"{name}.weight"] = layer.weight.clone()

    def to_outputs(name: str, read: Tensor, reads_large: Tensor, share: float = ridge.layers) -> None:
        kept = masks[f"{name}.weight"].any(1)
        expected, now = backbone.get_submodule(name)(reads_large)[..., kept], small.get_submodule(name)(read)
        fit(name, read, expected - now, share)

    stage = 0
    for (of, name, block), kept in zip(blocks_of(backbone), subnet.blocks, strict=True):
        if of != stage:
            stage = of
            layer = f"layers.{stage}.downsample.reduction"
            to_outputs(layer, Watched(small, x).run().inputs[layer], large.inputs[layer])
        read_by_mlp = kept.stream if kept.mlp_stream is None else kept.mlp_stream
        for there, norm, writer, scales, after, columns in (
            (kept.attn, "norm1", "attn.proj", ("ls1", "gamma_1"), f"{name}.norm2", kept.stream),
            (kept.mlp, "norm2", "mlp.fc2", ("ls2", "gamma_2"), None, read_by_mlp),
        ):
            if not there:
                continue
            index = torch.arange(columns) if isinstance(columns, int) else torch.tensor(columns)
            if norms_late(block):  # readers see the stream itself; what a writer writes is what the norm reads
                now = Watched(small, x).run()
                sees = name if writer == "attn.proj" else f"{name}.mlp.fc1"
                for reader in readers[f"{name}.{norm}"]:
                    read = tokens_of(now.inputs[sees])[..., : len(index)]
                    to_outputs(reader, read, tokens_of(large.inputs[sees]))
                now, written = Watched(small, x).run(), tokens_of(large.inputs[f"{name}.{norm}"])[..., index]
                lacking = written - now.outputs[f"{name}.{writer}"].view_as(written)
                fit(f"{name}.{writer}", now.inputs[f"{name}.{writer}"], lacking, ridge.layers)
                continue
            read = tokens_of(Watched(small, x).run().outputs[f"{name}.{norm}"])[..., index]
            for reader in readers[f"{name}.{norm}"]:
                to_outputs(reader, read, tokens_of(large.outputs[f"{name}.{norm}"]))
            target = large.outputs[name] if after is None else large.inputs[after]
            scale: Any = next(
                (s for key in scales if (s := getattr(small.get_submodule(name), key, None)) is not None), 1
            )
            gamma = torch.as_tensor(getattr(scale, "gamma", 1) if isinstance(scale, nn.Module) else scale)
            now = Watched(small, x).run()
            before = tokens_of(now.inputs[f"{name}.{norm}"])[..., index]
            left = tokens_of(target)[..., index] - before - gamma * now.outputs[f"{name}.{writer}"].view_as(before)
            units = now.inputs[f"{name}.{writer}"]
            fit(f"{name}.{writer}", units, torch.where(gamma == 0, 0.0, left / gamma), ridge.layers)
    if getattr(backbone, "attn_pool", None) is not None:
        to_outputs("attn_pool.kv", Watched(small, x).run().inputs["attn_pool.kv"], large.inputs["attn_pool.kv"])
    for i, _ in enumerate(getattr(backbone, "blocks_token_only", ())):  # CaiT's class attention
        for layer in (f"blocks_token_only.{i}.{leaf}" for leaf in ("attn.q", "attn.k", "attn.v", "mlp.fc1")):
            to_outputs(layer, Watched(small, x).run().inputs[layer], large.inputs[layer])
    for classifier in supernet.adapter.classifiers:
        now = Watched(small, x).run()
        to_outputs(classifier, now.inputs[classifier], large.inputs[classifier], ridge.classifier)
    return found


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {  # of a Swin no window is padded or shifted: tokens keep their order
    "vit": ("vit", {}),
    "vit, no bias": ("vit", dict(qkv_bias=False, proj_bias=False, init_values=None)),
    "vit, mean of the patches": ("vit", dict(global_pool="avg", class_token=False)),
    "vit, attention pooling": ("vit", dict(global_pool="map", class_token=False)),
    "swin": ("swin", dict(img_size=16)),
    "swinv2": ("swinv2", dict(img_size=16)),
    "t2t": ("t2t", {}),
    "eva": ("eva", {}),
    "eva, mixed": ("eva", MIXED),
    "vit, norms late": ("vit", dict(block_fn=ResPostBlock)),
    "eva, norms late": ("eva", dict(use_post_norm=True)),
    "beit": ("beit", dict(scale_mlp=True)),
    "beit, gated": ("beit", dict(swiglu_mlp=True, qkv_bias=False, global_pool="token")),
    "beit, one table": ("beit", dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    "relpos": ("relpos", {}),
    "relpos, norms after": ("relpos", dict(block_fn=ResPostRelPosBlock, shared_rel_pos=True, qk_norm=True)),
    "eva, attention pooling": ("eva", dict(global_pool="map", attn_pool_num_heads=3)),
    "eva, q, k and v fused": ("eva", dict(qkv_fused=True, scale_mlp=True)),
    "cait": ("cait", {}),
    "eva, gates in one layer": ("eva", dict(attn_type="rope", swiglu_align_to=0, init_values=None)),
}


@pytest.mark.parametrize("network", PLAIN)
@over_cuts
def test_every_layer_is_least_squares_on_stacked_activations(network: str, make: Cut) -> None:
    family, options = PLAIN[network]
    supernet = small_supernet(family, 2, **options)
    if network == "vit":
        with torch.no_grad():
            supernet.backbone.blocks[0].ls1.gamma[::3] = 0
            supernet.backbone.blocks[1].ls2.gamma[1::2] = 0
    subnet, x = subnet_of(supernet, make), images(supernet.backbone, 40, 3)
    ridge = Ridge(layers=2e-3, classifier=3e-2, prediction=math.inf)
    expected = reference(supernet, subnet, x, ridge)
    found = refit(supernet, subnet, x.split(16), ridge)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(value, found[name]) < 1e-7, name


def test_both_classifiers_of_a_distilled_network_are_fitted() -> None:
    from timm.models.deit import VisionTransformerDistilled

    from tests.nas.small import VIT
    from tests.oracle import randomise

    supernet = Supernet(randomise(VisionTransformerDistilled(**VIT), 0)).double().eval()
    subnet, x = subnet_of(supernet, narrow), images(supernet.backbone, 40)
    expected, found = reference(supernet, subnet, x, SQUARES), refit(supernet, subnet, [x], SQUARES)
    assert {"head.weight", "head_dist.bias"} <= found.keys() == expected.keys()
    assert all(relative(value, found[name]) < 1e-7 for name, value in expected.items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_classifiers_last_step_is_the_least_divergence(bias: bool) -> None:
    torch.manual_seed(0)
    x, expected = torch.randn(60, 7) + 3, 2 * torch.randn(60, 5)
    weight = torch.randn(5, 7, dtype=torch.float64)
    start = torch.randn(5, dtype=torch.float64) if bias else None
    moved, added = towards_prediction(x, expected, weight, start, 0.05)

    def loss(weight: Tensor, bias: Tensor | None) -> Tensor:
        q = torch.nn.functional.linear(x.double(), weight, bias).log_softmax(1)
        p = expected.double().log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean()

    def penalised(at: Tensor, bias: Tensor | None) -> Tensor:
        spread = (x - x.mean(0) if added is not None else x).double().square().mean()
        return loss(at, bias) + 0.05 / 2 * spread * (at - weight).square().sum()

    assert loss(moved, added) < 0.5 * loss(weight, start)
    at = moved.clone().requires_grad_()
    if added is None:
        found = torch.autograd.grad(penalised(at, None), at)
    else:
        around = added.clone().requires_grad_()
        found = torch.autograd.grad(penalised(at, around), [at, around])
    assert all(float(gradient.abs().max()) < 1e-3 for gradient in found)


def test_a_classifier_that_predicts_right_is_left_alone() -> None:
    x, weight = torch.randn(20, 6), torch.randn(4, 6, dtype=torch.float64)
    moved, added = towards_prediction(x, x.double() @ weight.T, weight, None, 0.05)
    assert torch.equal(moved, weight) and added is None


@over_families
@over_cuts
def test_the_divergence_of_predictions_grows_less(family: str, make: Cut) -> None:
    supernet = small_supernet(family, 4)
    subnet, batches = subnet_of(supernet, make), seen(supernet)
    x, far = torch.cat(batches), []
    for ridge in (SQUARES, Ridge()):
        with torch.no_grad(), written(supernet, subnet, refit(supernet, subnet, batches, ridge)):
            inside = supernet.small(x, subnet).log_softmax(1)
        with torch.no_grad():
            expected = supernet.large(x).log_softmax(1)
        far.append(float((expected.exp() * (expected - inside)).sum(1).mean()))
    assert far[1] <= far[0]


class Recorded(Residual):
    """A fit that knows its rows, and what it left of them, before and after."""

    errors: list[tuple[float, float]]

    def __init__(self, bias: bool) -> None:
        super().__init__(bias)
        self.of_x: list[Tensor] = []
        self.of_r: list[Tensor] = []

    def add(self, x: Tensor, r: Tensor) -> None:
        super().add(x, r)
        self.of_x.append(x.flatten(0, -2))
        self.of_r.append(r.flatten(0, -2))

    def solve(self, ridge: float, through: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        change, more = super().solve(ridge, through)
        x, r = torch.cat(self.of_x), torch.cat(self.of_r)
        r = r if through is None else r @ through.T
        left = r - x @ change.T - (0 if more is None else more)
        self.errors.append((float(r.square().mean()), float(left.square().mean())))
        return change, more


@over_families
@over_bases
@over_cuts
def test_11_no_layers_error_grows(family: str, basis: str, make: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given what precedes it; and the logits come nearer to the large network's."""
    supernet = small_supernet(family, 4, basis)
    subnet, batches = subnet_of(supernet, make), seen(supernet)
    errors: list[tuple[float, float]] = []
    monkeypatch.setattr(Recorded, "errors", errors, raising=False)
    monkeypatch.setattr(supernets.refit, "Residual", Recorded)
    values = refit(supernet, subnet, batches, SQUARES)
    parted = sum(name.endswith("q_bias") for name in values)  # rows of q, k and v, each by its own bias or none
    assert len(errors) == sum(name.endswith("weight") for name in values) + 2 * parted
    assert all(after <= before * (1 + 1e-9) for before, after in errors)
    x = torch.cat(batches)
    with torch.no_grad():
        with written(supernet, subnet, values):
            inside = supernet.small(x, subnet)
        outside, expected = supernet.small(x, subnet), supernet.large(x)
    assert float((inside - expected).square().mean()) < float((outside - expected).square().mean())


@over_families
def test_a_rotation_makes_no_difference_where_the_stream_stays_whole(family: str) -> None:
    """But by the ridge, which holds other matrices."""
    supernet = small_supernet(family, 5)
    rotated = Supernet(copy.deepcopy(supernet.backbone)).eval()
    rewrite(rotated, Basis(streams=random_basis(rotated, 0).streams))
    subnet, batches = subnet_of(supernet, inner), seen(supernet)
    logits = []
    for net in (supernet, rotated):
        values = refit(net, subnet, batches, Ridge(1e-11, 1e-11, math.inf))
        with written(net, subnet, values):
            logits.append(net.small(batches[0], subnet))
    assert relative(*logits) < 1e-5


# What is written


@pytest.mark.parametrize("family", test_invariants.BACKBONES)
@given(data=st.data(), seed=st.integers(0, 1000))
@few
def test_exactly_the_entries_of_a_slice_are_written(family: str, data: st.DataObject, seed: int) -> None:
    supernet = Supernet(data.draw(test_invariants.BACKBONES[family]()).double())
    subnet = data.draw(general_slices(block_shapes(supernet.backbone)))
    with torch.no_grad():
        own = compact_parameters(supernet.adapter, subnet)
    own.pop(FREQS, None)  # no layer's
    values = {name: torch.arange(1, t.numel() + 1).view(t.shape) * 1e3 + seed for name, t in own.items()}
    before = {name: p.detach().clone() for name, p in supernet.backbone.named_parameters()}
    masks = kept_weights(supernet.backbone, subnet).tensors
    write(supernet, subnet, values)
    for name, p in supernet.backbone.named_parameters():
        kept = masks[name] if name in values else torch.zeros_like(p, dtype=torch.bool)
        assert torch.equal(p[~kept], before[name][~kept]), name
        assert not kept.any() or torch.equal(p[kept], values[name].flatten().double()), name


@over_families
@over_bases
@pytest.mark.parametrize("how", ["as it should", "an error inside", "values of another slice"])
def test_what_was_there_comes_back_bit_for_bit(how: str, family: str, basis: str) -> None:
    supernet = small_supernet(family, 6, basis)
    subnet = subnet_of(supernet, narrow)
    values = refit(supernet, subnet, seen(supernet, 12))
    before = copy.deepcopy(supernet.state_dict())
    if how == "values of another slice":
        last = list(values)[-1]
        values[last] = values[last].new_zeros(7, 7, 7)
    try:
        with written(supernet, subnet, values):
            assert not all(torch.equal(t, before[name]) for name, t in supernet.state_dict().items())
            if how == "an error inside":
                raise KeyboardInterrupt
        assert how == "as it should"
    except KeyboardInterrupt:
        assert how == "an error inside"
    except (RuntimeError, IndexError):
        assert how == "values of another slice"
    assert all(torch.equal(t, before[name]) for name, t in supernet.state_dict().items())


@over_families
@over_bases
@over_cuts
def test_2_the_compact_network_is_that_of_the_values_inside(family: str, basis: str, make: Cut) -> None:
    supernet = small_supernet(family, 7, basis)
    subnet, x = subnet_of(supernet, make), images(supernet.backbone, 3, 9)
    outside = supernet.small(x, subnet)
    with written(supernet, subnet, refit(supernet, subnet, seen(supernet, 9))):
        inside = supernet.small(x, subnet)
        compact = cut(supernet.backbone, subnet).eval()
    assert relative(inside, compact(x)) < 1e-9
    assert torch.equal(supernet.small(x, subnet), outside) and relative(outside, inside) > 1e-3


# How it is done


@pytest.mark.parametrize("training", [True, False])
def test_a_refit_reads_the_network_as_it_is_evaluated_and_leaves_it_alone(training: bool) -> None:
    drops = dict(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_rate=0.5, pos_drop_rate=0.5)
    supernet = small_supernet("vit", 8, **drops)
    subnet, batches = subnet_of(supernet, narrow), seen(supernet, 24)
    expected = refit(supernet, subnet, batches)
    supernet.train(training)
    before, calls = copy.deepcopy(supernet.state_dict()), []
    values = refit(supernet, subnet, iter(batches), advance=lambda: calls.append(1))
    assert len(calls) == 2 * len(supernet.shapes)
    assert all(module.training == training for module in supernet.modules())
    assert all(torch.equal(t, before[name]) for name, t in supernet.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in supernet.parameters())
    assert values.keys() == expected.keys() and all(torch.equal(t, values[name]) for name, t in expected.items())
    assert all(t.dtype == torch.float64 and not t.requires_grad for t in values.values())


@over_families
def test_the_batches_do_not_matter(family: str) -> None:
    supernet = small_supernet(family, 9)
    subnet, x = subnet_of(supernet, narrow), images(supernet.backbone, 12)
    first, second = (refit(supernet, subnet, x.split(size)) for size in (12, 5))
    assert all(relative(t, second[name]) < 1e-8 for name, t in first.items())


def test_an_error_among_the_images_leaves_the_network_in_its_mode() -> None:
    supernet = small_supernet("vit").train()

    def broken() -> Any:
        yield images(supernet.backbone)
        raise OSError("no more images")

    with pytest.raises(OSError, match="no more images"):
        refit(supernet, supernet.identity(), broken())
    assert supernet.training


# Little to go by


def test_no_images_are_refused() -> None:
    supernet = small_supernet("vit")
    with pytest.raises(ValueError, match="no images to refit on"):
        refit(supernet, supernet.identity(), [])


FEW: dict[str, Callable[[Tensor], Tensor]] = {
    "one image": lambda x: x[:1],
    "one image, again and again": lambda x: x[:1].expand(20, -1, -1, -1),
    "images of one colour": lambda x: torch.full_like(x, 0.3),
    "black images": torch.zeros_like,
}


@over_families
@pytest.mark.parametrize("what", FEW)
@pytest.mark.parametrize(("basis", "dtype"), [("rotated", torch.float64), ("own", torch.float32)], ids=str)
def test_what_images_do_not_say_stays_as_it_was(what: str, family: str, basis: str, dtype: torch.dtype) -> None:
    """A classifier that sees one point has nothing but its bias to fit."""
    supernet = small_supernet(family, 10, basis).to(dtype)
    subnet = subnet_of(supernet, narrow)
    values = refit(supernet, subnet, FEW[what](images(supernet.backbone, 20)).split(8))
    assert all(torch.isfinite(t).all() for t in values.values())
    assert max(float(t.abs().max()) for t in values.values()) < 1e3
    for classifier in supernet.adapter.classifiers:
        name = f"{classifier}.weight"
        own = supernet.backbone.get_parameter(name).detach()[:, : subnet.stage_widths[-1]]
        assert relative(own, values[name]) < 1e-3


@over_families
def test_dead_units_stay_dead_and_do_no_harm(family: str) -> None:
    """Neurons that never fire, a head whose v is 0, and a channel that no norm lets through."""
    supernet = small_supernet(family, 11).float()
    block: Any = supernet.adapter.blocks()[0]
    H, d = supernet.shapes[0].num_heads, supernet.shapes[0].head_dim
    with torch.no_grad():
        for p in (block.mlp.fc1_x if family == "eva" else block.mlp.fc1).parameters():
            p[::2] = 0
        for p in (block.attn.v_proj if family == "eva" else block.attn.qkv).parameters():
            p.view(-1, H, d, *p.shape[1:])[-1, 0] = 0
        block.norm1.weight[1] = block.norm1.bias[1] = 0
    subnet = subnet_of(supernet, narrow)
    values = refit(supernet, subnet, seen(supernet))
    assert all(torch.isfinite(t).all() and float(t.abs().max()) < 1e3 for t in values.values())
    subnet = supernet.identity()
    assert (
        moved(supernet, subnet, refit(supernet, subnet, seen(supernet))) < 2e-3
    )  # where LayerScale is small, rounding


def test_a_network_of_zeros_is_refitted_to_zeros() -> None:
    supernet = small_supernet("vit")
    with torch.no_grad():
        for p in supernet.parameters():
            p.zero_()
    values = refit(supernet, subnet_of(supernet, narrow), seen(supernet, 12))
    assert all(not t.any() for t in values.values())


def test_counts_of_the_cuts() -> None:
    """That they are what their names say."""
    shapes = small_supernet("vit").shapes
    assert {count(indices(s, i).heads) for i, s in enumerate(shapes)} == {3}
    assert [(k.attn, k.mlp) for k in map(halves, shapes, range(3))] == [(False, True), (True, False), (False, False)]
    uneven = indices(shapes[0], 0).v_channels
    assert isinstance(uneven, tuple) and len({len(channels) for channels in uneven}) > 1


@over_families
@pytest.mark.parametrize("make", [whole, narrow], ids=["whole", "narrow"])
def test_a_refit_holds_no_more_of_an_image_than_is_said(
    family: str, make: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two large streams, the subnet's and its units, counted at every half."""
    supernet, most, write_half = small_supernet(family), 0, _Refit._write
    subnet = subnet_of(supernet, make)

    def watched(self: Any, half: Any, before: Any) -> Any:
        nonlocal most
        reading = {name: p for name, p in half.small.items() if not within(name, half.axes.outputs)}
        held = [*self.large, *self.large, *self.small, *(half.run(reading, half.kept, z) for z in self.small)]
        most = max(most, sum(z.numel() for z in held) // sum(map(len, self.small)))
        return write_half(self, half, before)

    monkeypatch.setattr(_Refit, "_write", watched)
    refit(supernet, subnet, [images(supernet.backbone, 4)])
    assert most * torch.float32.itemsize <= bytes_held(supernet, subnet) <= 1.25 * most * torch.float32.itemsize
