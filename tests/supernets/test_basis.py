"""A backbone in another basis (section 2.7): invariants 0 to 4 over families and widths, on random rotations.

Its rows in docs/backbones.md, the way back to timm's coordinates, what is refused, and the norms by themselves.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from timm.layers import LayerNorm, RmsNorm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.errors import UserError
from search_spaces.slices import BlockSlice, NetworkSlice, network_slice, prefix_slice
from supernets.basis import Basis, install_stages, rewrite, timm_state
from supernets.compact import cut
from supernets.coordinates import isometry
from supernets.elastic import BlockMixture, Term
from supernets.rotated import StemNorm, StreamNorm
from supernets.streams import fixed_streams, readings, scalings
from supernets.supernet import Supernet
from tests.oracle import LAYER_NORMS, RMS_NORMS, blocks_of, norms_late, randomise, readers_of
from tests.strategies import BACKBONES, SEEDS, disturb, expected_logits, images, random_basis, rotation
from tests.supernets.test_backbones import SUPPORTED, build
from tests.supernets.test_invariants import draw_subnet, few, over_families, over_widths, relative

fewer = settings(few, max_examples=6)
STEMS: dict[str, dict[str, Any]] = {"vit": {"pre_norm": True}}  # a Swin's stem ends in a norm as it is
EXACT = 1e-12  # invariant 4
TIGHT = 1e-10  # of two networks of which one is cut
FLOAT = 1e-5  # invariant 2, in float32


def rewritten(backbone: nn.Module, seed: int) -> Supernet:
    """A copy of the backbone in a random basis, in eval mode."""
    net = Supernet(copy.deepcopy(backbone)).eval()
    rewrite(net, random_basis(net, seed))
    return net


def as_timm(backbone: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """timm's own network with other weights."""
    own = copy.deepcopy(backbone).eval()
    own.load_state_dict(state)
    return own


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def assert_costs(compact: nn.Module, net: Supernet, subnet: NetworkSlice, x: Tensor) -> None:
    """Invariant 3. Leaves the compact network on the meta device."""
    assert sum(p.numel() for p in compact.parameters()) == net.params(subnet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compact.to("meta").requires_grad_(False)(x[:1].to("meta"))
    assert counter.get_total_flops() == 2 * net.flops(subnet)


def norms_of(model: nn.Module) -> set[type]:
    """The classes of its norms."""
    return {type(m) for m in model.modules() if isinstance(m, nn.LayerNorm | RmsNorm | StreamNorm | StemNorm)}


@over_families
@given(data=st.data(), seed=SEEDS)
@few
def test_4_every_part_of_a_basis_leaves_the_function_unchanged(family: str, data: st.DataObject, seed: int) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    x, plain = images(backbone), Supernet(copy.deepcopy(backbone)).eval()
    before, basis = plain.large(x), random_basis(plain, seed)
    parts = (
        Basis(streams=basis.streams),
        Basis(qk=basis.qk),
        Basis(v=basis.v),
        Basis(orders=basis.orders),
        basis,
    )
    for part in parts:
        net = Supernet(copy.deepcopy(plain.backbone)).eval()
        rewrite(net, part)
        assert shapes_of(net.backbone) == shapes_of(backbone)
        assert relative(before, net.large(x)) <= EXACT
        assert relative(before, net.small(x, net.identity())) <= EXACT
        again = Supernet(copy.deepcopy(net.backbone))
        assert torch.equal(again.large(x), net.large(x))
        assert again.adapter.streams.keys() == part.streams.keys()


@over_families
@given(data=st.data(), seed=SEEDS)
@few
def test_matrices_stay_as_large_as_they_were(family: str, data: st.DataObject, seed: int) -> None:
    """One number in all channels of a norm or a LayerScale, and the matrices beside it of the same size."""
    backbone = data.draw(BACKBONES[family]()).double()
    net = Supernet(copy.deepcopy(backbone)).eval()
    basis = Basis(streams=random_basis(net, seed).streams)
    rewrite(net, basis)
    before, after = dict(backbone.named_parameters()), dict(net.backbone.named_parameters())

    def size(params: dict[str, nn.Parameter], names: tuple[str, ...]) -> float:
        return float(torch.cat([params[name].flatten() for name in names if params[name].dim() == 2]).norm())

    one_number = [(r.norm + ".weight", r.matrices) for r in readings(net.adapter) if r.stage in basis.streams]
    one_number += [(s.gamma, s.writers) for s in scalings(net.adapter) if s.stage in basis.streams]
    for name, matrices in one_number:
        assert torch.equal(after[name], after[name][:1].expand_as(after[name])), name
        assert size(after, matrices) == pytest.approx(size(before, matrices), rel=1e-9), name


@over_families
@given(data=st.data(), seed=SEEDS)
@few
def test_timms_own_network_comes_back_whatever_was_trained(family: str, data: st.DataObject, seed: int) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    net = rewritten(backbone, seed)
    x = images(backbone)
    before = backbone.eval()(x)
    assert relative(before, as_timm(backbone, timm_state(net))(x)) <= EXACT
    disturb(net.backbone, seed)
    trained = net.large(x)
    assert relative(before, trained) > 1e-6
    state = timm_state(net)
    assert relative(trained, as_timm(backbone, state)(x)) <= TIGHT
    assert torch.equal(trained, net.large(x))  # which itself stays as it is


def folded(backbone: nn.Module, stages: Iterable[int], got: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's state with norms of 1, and of 0 as far as readers have biases, and LayerScales of 1.

    Where they have none, the constant lies in the direction of the mean, on a scale that is that of `got`.
    """
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for stage, norm, readers, padded in readers_of(backbone):
        if stage not in stages:
            continue
        weight, bias = state[f"{norm}.weight"].clone(), state.get(f"{norm}.bias")
        state[f"{norm}.weight"] = torch.ones_like(weight)
        if bias is not None and (padded or any(f"{reader}.bias" not in state for reader in readers)):
            mean = torch.full_like(weight, len(weight) ** -0.5)
            size = mean @ got[f"{norm}.bias"]
            state[f"{norm}.bias"] = mean * size
            for reader in readers:
                matrix = state[f"{reader}.weight"]
                constant = matrix @ bias / size
                state[f"{reader}.weight"] = matrix * weight + torch.outer(constant - (matrix * weight) @ mean, mean)
            continue
        if bias is not None:
            for reader in readers:
                state[f"{reader}.bias"] += state[f"{reader}.weight"] @ bias
            state[f"{norm}.bias"] = torch.zeros_like(bias)
        for reader in readers:
            state[f"{reader}.weight"] *= weight
    of_token = [(0, f"blocks_token_only.{i}", None) for i, _ in enumerate(getattr(backbone, "blocks_token_only", ()))]
    for stage, name, _ in (*blocks_of(backbone), *of_token):
        scales = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
        for scale, writer in ((f"{name}.{leaf}", writer) for leaf, writer in scales.items()):
            if stage in stages and scale in state:
                for p in ("weight", "bias"):
                    if f"{name}.{writer}.{p}" in state:
                        state[f"{name}.{writer}.{p}"].T.mul_(state[scale])
                state[scale] = torch.ones_like(state[scale])
    return state


@over_families
@given(data=st.data(), seed=SEEDS)
@few
def test_weights_come_back_to_their_places(family: str, data: st.DataObject, seed: int) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    net = rewritten(backbone, seed)
    state = timm_state(net)
    for name, tensor in folded(backbone, net.adapter.streams, state).items():
        scale = max(float(tensor.abs().max()), 1.0)
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=TIGHT * scale, msg=lambda m, n=name: f"{n}: {m}")


@over_families
@over_widths
@given(data=st.data(), seed=SEEDS)
@fewer
def test_0_and_2_subnet_is_the_oracle_and_compact_is_the_subnet(
    family: str, kind: str, data: st.DataObject, seed: int
) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    subnet = draw_subnet(data, backbone, kind)
    net = rewritten(backbone, seed)
    x = images(backbone)
    if data.draw(st.booleans()):
        disturb(net.backbone, seed)
    logits = net.small(x, subnet)
    assert relative(logits, cut(net.backbone, subnet).eval()(x)) <= TIGHT
    assert relative(expected_logits(backbone, net, subnet, x), logits) <= TIGHT


@over_families
@over_widths
@given(data=st.data(), seed=SEEDS)
@fewer
def test_2_in_float32_and_3_flops_and_parameters_are_exact(
    family: str, kind: str, data: st.DataObject, seed: int
) -> None:
    backbone = data.draw(BACKBONES[family]())
    subnet = draw_subnet(data, backbone, kind)
    net = rewritten(backbone, seed)
    x = images(backbone)
    compact = cut(net.backbone, subnet).eval()
    assert relative(net.small(x, subnet), compact(x)) <= FLOAT
    assert_costs(compact, net, subnet, x)
    plain = Supernet(backbone)
    assert (net.params(), net.flops()) == (plain.params(), plain.flops())
    install_stages(plain, tuple(net.adapter.streams))  # the structure alone is enough for costs
    assert (plain.params(subnet), plain.flops(subnet)) == (net.params(subnet), net.flops(subnet))


@st.composite
def uniform_slices(draw: st.DrawFn, net: Supernet) -> NetworkSlice:
    """One width for all blocks of a stage, every other one whole; heads and neurons by block."""
    widths = {}
    for shape in net.shapes:
        if shape.stage not in widths:
            narrow = draw(st.booleans())
            widths[shape.stage] = draw(st.integers(4, shape.embed_dim - 1)) if narrow else shape.embed_dim
    blocks = [
        BlockSlice(widths[s.stage], draw(st.integers(1, s.num_heads)), draw(st.integers(1, s.hidden)))
        for s in net.shapes
    ]
    return NetworkSlice(tuple(blocks), tuple(widths.values()))


def new_names(backbone: nn.Module, cut_stages: set[int]) -> set[str]:
    """What a compact network needs that timm's own has not: a layer after a stem's norm."""
    found = set()
    there = [name for name in ("norm_pre", "patch_embed.norm") if f"{name}.weight" in backbone.state_dict()]
    if 0 in cut_stages and there:
        params = [name for name, _ in backbone.get_submodule(there[0]).named_parameters()]
        found |= {f"{there[0]}.linear.weight", *(f"{there[0]}.norm.{name}" for name in params)}
    return found


@over_families
@given(data=st.data(), seed=SEEDS)
@few
def test_uniform_stages_have_timms_norms_and_whole_ones_nothing_new(
    family: str, data: st.DataObject, seed: int
) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    net = rewritten(backbone, seed)
    subnet = data.draw(uniform_slices(net))
    whole = net.identity().stage_widths
    narrow = {stage for stage in net.adapter.streams if subnet.stage_widths[stage] < whole[stage]}
    compact = cut(net.backbone, subnet).eval()
    x = images(backbone)
    assert relative(net.small(x, subnet), compact(x)) <= TIGHT
    assert norms_of(compact) <= {*LAYER_NORMS, *RMS_NORMS}
    assert set(compact.state_dict()) - set(backbone.state_dict()) == new_names(backbone, narrow)
    assert_costs(compact, net, subnet, x)


def test_only_stages_of_different_widths_have_rms_norms_over_the_rotated_channels() -> None:
    backbone = randomise(build["swin"](), 0).double()
    net = rewritten(backbone, 0)
    blocks = [prefix_slice(shape, alpha, "stream") for shape, alpha in zip(net.shapes, (1, 2, 4), strict=True)]
    compact = cut(net.backbone, network_slice(net.shapes, blocks))
    rotated = {name for name, module in compact.named_modules() if isinstance(module, StreamNorm)}
    assert rotated == {*(f"layers.1.blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)), "norm"}
    assert compact.state_dict().keys() <= backbone.state_dict().keys()


@over_families
@pytest.mark.parametrize("alphas", [(1, 1, 1), (2, 2, 2), (1, 2, 4)], ids=["own", "plain", "prefix"])
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_what_is_frozen_stays_frozen(family: str, alphas: tuple[int, ...], frozen: tuple[str, ...]) -> None:
    """Norms that are made anew among it, and the layer after a stem's norm with that."""
    net = rewritten(randomise(build[family](**STEMS.get(family, {})), 0), 0)
    for name, p in net.backbone.named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    trained, stem = {name: p.requires_grad for name, p in net.backbone.named_parameters()}, net.adapter.stem_norm
    blocks = [prefix_slice(shape, alpha, "stream") for shape, alpha in zip(net.shapes, alphas, strict=False)]
    compact = cut(net.backbone, network_slice(net.shapes, blocks))
    narrowed = alphas == (1, 2, 4) and bool(net.adapter.streams)
    assert any(isinstance(m, StreamNorm) for m in compact.modules()) == narrowed
    for name, p in compact.named_parameters():
        in_stem = stem is not None and name.startswith(f"{stem}.")
        assert p.requires_grad == trained[f"{stem}.{name.rpartition('.')[2]}" if in_stem else name], name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), [row[1:] for row in SUPPORTED], ids=str)
def test_every_accepted_backbone_is_rotated_or_says_why_not(family: str, options: dict[str, Any]) -> None:
    backbone = randomise(build[family](**options), 1).double().eval()
    plain = Supernet(copy.deepcopy(backbone)).eval()
    last = plain.shapes[-1].stage
    fixed = fixed_streams(plain.adapter)
    evas = options.get("use_fc_norm", True) or options.get("use_post_transformer_norm", True)
    readable = options.get("final_norm", evas) and options.get("global_pool") not in ("max", "avgmax")
    readable &= not (options.get("global_pool") == "map" and options.get("fc_norm"))  # a norm after the pooling
    norms_come_late = {
        shape.stage for shape, b in zip(plain.shapes, plain.adapter.blocks(), strict=True) if norms_late(b)
    }
    assert fixed.keys() == norms_come_late | (set() if readable else {last}) and all(fixed.values())
    net = rewritten(backbone, 1)
    assert sorted({*net.adapter.streams, *fixed}) == list(range(last + 1))
    x = torch.randn(2, *net.adapter.input_size, generator=torch.Generator().manual_seed(0)).double()
    assert relative(backbone(x), net.large(x)) <= EXACT
    for width in ("stream", "inner"):
        subnet = network_slice(net.shapes, [prefix_slice(shape, 2, width) for shape in net.shapes])
        small = net.small(x, subnet)
        compact = cut(net.backbone, subnet).eval()
        assert relative(small, compact(x)) <= TIGHT
        mixtures = [BlockMixture((Term(kept),)) for kept in subnet.blocks]  # all of the stream, of which gates leave w
        embed_dims = net.identity().stage_widths
        gates = [(torch.arange(e) < w).double() for e, w in zip(embed_dims, subnet.stage_widths, strict=True)]
        assert relative(small, net.small(x, mixtures, gates)) <= TIGHT
        assert relative(expected_logits(backbone, net, subnet, x), small) <= TIGHT
        assert_costs(compact, net, subnet, x)


@over_families
@given(data=st.data(), seed=SEEDS)
@few
def test_the_oracle_of_a_rotated_network_is_timms_own_forward(family: str, data: st.DataObject, seed: int) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    net = rewritten(backbone, seed)
    x = images(backbone)
    assert relative(backbone.eval()(x), expected_logits(backbone, net, net.identity(), x)) <= EXACT


def test_the_rotations_are_those_that_the_backbone_holds_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, moved or of another precision; and no forward pass searches the tree of modules for them."""
    net = rewritten(randomise(build["swin"](), 0), 0)
    x, (first, second) = images(net.backbone), net.adapter.streams.values()
    other = Supernet(copy.deepcopy(net.backbone)).eval().double()
    with torch.no_grad():
        net.backbone.get_buffer("streams.0").zero_()
    assert not first.any() and not net.adapter.streams[0].any()
    found = other.adapter.streams
    assert list(found) == [0, 1] and all(q.dtype == torch.float64 for q in found.values())
    assert found[0].any() and torch.equal(found[1], second.double())
    assert all(q.is_meta for q in other.to("meta").adapter.streams.values())

    def searched(*_: Any, **__: Any) -> None:
        raise AssertionError("a search of the tree of modules")

    monkeypatch.setattr(nn.Module, "named_buffers", searched)
    net.small(x, net.identity())


def refused(family: str, basis: Basis, message: str, **options: Any) -> Any:
    return pytest.param(partial(build[family], **options), basis, message, id=message)


def eye(*shape: int) -> Tensor:
    return torch.eye(shape[-1], dtype=torch.float64).expand(shape)


@pytest.mark.parametrize(
    ("make", "basis", "message"),
    [
        refused("vit", Basis(streams={0: eye(31, 31)}), "stage 0 of 31 channels, the network has 32"),
        refused("vit", Basis(streams={1: eye(32, 32)}), "stage 1 of 32 channels, the network has none"),
        refused("vit", Basis(streams={0: eye(32, 32)}), "stage 0 cannot be rotated: .*final_norm", final_norm=False),
        refused("vit", Basis(streams={0: eye(32, 32)}), "stage 0 .*global_pool=max", global_pool="max"),
        refused("swin", Basis(streams={1: eye(32, 32)}), "stage 1 .*global_pool=avgmax", global_pool="avgmax"),
        refused("vit", Basis(qk={"blocks.0": eye(4, 7, 7)}), r"qk \(4, 7, 7\) for block blocks\.0, .* \(4, 8, 8\)"),
        refused("vit", Basis(v={"blocks.2": eye(4, 8, 8)}), r"v \(4, 8, 8\) for block blocks\.2, the network None"),
        refused("vit", Basis(qk={"blocks.0": eye(4, 8, 8)}), "qk of block .*qk_norm", qk_norm=True),
        refused("vit", Basis(v={"blocks.0": eye(4, 8, 8)}), "v of block .*scale_attn_norm", scale_attn_norm=True),
        refused("vit", Basis(orders={"blocks.0.heads": [0, 1]}), "'blocks.0.heads' sorts 2 units, the backbone has 4"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused(make: Callable[[], nn.Module], basis: Basis, message: str) -> None:
    net = Supernet(make())
    before = copy.deepcopy(net.backbone.state_dict())
    with pytest.raises(UserError, match=message):
        rewrite(net, basis)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.backbone.state_dict().items())


def test_a_basis_is_a_file_of_tensors() -> None:
    basis = random_basis(Supernet(build["swin"](global_pool="max")), 0)
    found = Basis.of_tensors(basis.tensors())
    assert found.orders == basis.orders and "stream.1" in basis.orders
    for part in ("streams", "energy", "qk", "v"):
        parts = getattr(basis, part)
        assert parts and getattr(found, part).keys() == parts.keys()
        assert all(torch.equal(tensor, getattr(found, part)[name]) for name, tensor in parts.items())
    with pytest.raises(ValueError, match=r"'rotation\.0' is no part of a basis"):
        Basis.of_tensors({"rotation.0": torch.eye(2)})


@pytest.mark.parametrize("width", [1, 2, 3, 8, 97])
def test_isometry_is_orthogonal_and_its_first_column_constant(width: int) -> None:
    matrix = isometry(width)
    assert matrix.shape == (width, width) and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, eye(width, width), rtol=0, atol=1e-14)
    constant = torch.full((width,), width**-0.5, dtype=torch.float64)
    torch.testing.assert_close(matrix[:, 0], constant, rtol=0, atol=1e-14)


NORMS: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "layer norm": (nn.LayerNorm, False),
    "timm's layer norm": (LayerNorm, False),
    "layer norm of four tokens": (LayerNorm, True),
    "RMS norm": (RmsNorm, False),
    "RMS norm of four tokens": (RmsNorm, True),
}


def norm_and_stream_norm(kind: str, eps: float = 1e-5) -> tuple[Any, StreamNorm, Tensor]:
    """A norm of one weight and any bias, the same in rotated channels, and the rotation of 6 channels or 4 times 6."""
    cls, quadrants = NORMS[kind]
    generator = torch.Generator().manual_seed(0)
    plain: Any = cls(24 if quadrants else 6, eps=eps).double()
    q = rotation(6, isinstance(plain, nn.LayerNorm), generator)
    q = torch.block_diag(q, q, q, q) if quadrants else q
    rotated: Any = copy.deepcopy(plain)
    with torch.no_grad():
        for module in (plain, rotated):
            module.weight.fill_(1.3)
        if hasattr(plain, "bias"):
            plain.bias.copy_(torch.randn(plain.bias.shape, generator=generator))
            rotated.bias.copy_(q @ plain.bias)
    return plain, StreamNorm(rotated, quadrants), q


def stream(*shape: int) -> Tensor:
    """Tokens whose channels have a mean."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.7


@pytest.mark.parametrize("kind", NORMS)
def test_a_stream_norm_is_the_norm_in_rotated_channels(kind: str) -> None:
    plain, rotated, q = norm_and_stream_norm(kind)
    x = stream(3, 5, len(q))
    torch.testing.assert_close(rotated(x @ q.T), plain(x) @ q.T, rtol=0, atol=1e-13)
    assert dict(rotated.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert type(rotated.plain(4)) is type(plain)


@pytest.mark.parametrize("kind", NORMS)
def test_a_sliced_stream_norm_takes_what_it_lacks_for_zero(kind: str) -> None:
    """But for epsilon, which stands beside another mean. A gate of ones and zeros is the same slice."""
    _, rotated, q = norm_and_stream_norm(kind, eps=1e-14)
    kept = (torch.arange(6) < 4).repeat(len(q) // 6)
    x = stream(3, 5, len(q)) * kept
    expected = rotated(x)[..., kept]
    bias = None if rotated.bias is None else rotated.bias[kept]
    sliced = rotated.sliced(x[..., kept], rotated.weight[kept], bias)
    torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-12)
    gated = rotated.sliced(x, rotated.weight, rotated.bias, kept.double())
    torch.testing.assert_close(gated[..., kept], expected, rtol=0, atol=1e-12)
    assert not gated[..., ~kept].any()


@pytest.mark.parametrize("cls", [nn.LayerNorm, LayerNorm, RmsNorm])
def test_a_stem_norm_is_the_norm_and_a_rotation_after_it(cls: Callable[..., nn.Module]) -> None:
    plain: Any = randomise(cls(6).double(), 0)
    q, x = rotation(6, True, torch.Generator().manual_seed(0)), stream(3, 5, 6)
    stem = StemNorm(plain)
    torch.testing.assert_close(stem(x), plain(x), rtol=0, atol=1e-14)
    with torch.no_grad():
        stem.rotation.copy_(q)
    torch.testing.assert_close(stem(x), plain(x) @ q.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(stem.sliced(x, q[:4]), (plain(x) @ q.T)[..., :4], rtol=0, atol=1e-13)
    assert stem.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(stem.plain()(x), plain(x), rtol=0, atol=0)
