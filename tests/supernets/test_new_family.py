"""A family is one adapter and one line of the table: here one whose blocks norm after the MLP, which is a GLU."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.errors import UserError
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, identity_slice, network_slice, prefix_slice
from supernets import timm_block
from supernets.axes import BlockAxes, HalfAxes, Params, head_widths, slice_block
from supernets.basis import Basis, rewrite, timm_state
from supernets.compact import cut
from supernets.compact_block import CompactBlock
from supernets.elastic import BlockMixture, Term, mixed_block
from supernets.families import ADAPTED, Adapted
from supernets.flops import NetworkCosts, PerWidth, UnitFlops, unit_flops
from supernets.importance import magnitude_scores, orders_of, permute
from supernets.layers import attention, norm, on_channels
from supernets.supernet import Supernet
from tests.oracle import randomise
from tests.strategies import general_slices, prefix_slices, random_basis
from tests.supernets.test_invariants import few, over_widths, relative

TOKENS, CLASSES = 16, 5


class ResPostViT(nn.Module):
    """A ViT of timm's ResPostBlock, x + norm(attention(x)) and x + norm(GLU(x)), pooled by the mean."""

    def __init__(self, glu: Callable[..., nn.Module], dim: int = 24, depth: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.embed_dim = dim
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, dim))
        self.blocks = nn.Sequential(
            *(ResPostBlock(dim, num_heads, mlp_ratio=2, qkv_bias=True, mlp_layer=glu) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, classes)."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


class CompactResPostBlock(CompactBlock):
    def attention_half(self, z: Tensor) -> Tensor:
        return self.norm1(self.attn(z))

    def mlp_half(self, z: Tensor) -> Tensor:
        return self.norm2(self.mlp(self.mlp_channels(z)))


class ResPostAdapter(timm_block.TimmBlockAdapter):
    block_axes = BlockAxes(
        HalfAxes(timm_block.ATTENTION.axes, outputs=("norm1",), late_norms=("norm1",)),
        HalfAxes(
            axes={
                "mlp.fc1.weight": ("2M", "R"),  # of GluMlp: what is gated and the gate side by side
                "mlp.fc1.bias": ("2M",),
                "mlp.fc1_g.weight": ("M", "R"),  # of SwiGLU
                "mlp.fc1_g.bias": ("M",),
                "mlp.fc1_x.weight": ("M", "R"),
                "mlp.fc1_x.bias": ("M",),
                "mlp.fc2.weight": ("R", "M"),
                "mlp.fc2.bias": ("R",),
                "norm2.weight": ("R",),
                "norm2.bias": ("R",),
            },
            outputs=("norm2",),
            late_norms=("norm2",),
        ),
    )
    compact_block = CompactResPostBlock

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        E = backbone.embed_dim
        self.input_size = (3, 32, 32)
        self.block_names = tuple(f"blocks.{i}" for i in range(len(backbone.blocks)))
        self.shapes = tuple(
            BlockShape(0, E, b.attn.num_heads, b.attn.head_dim, b.mlp.fc2.in_features) for b in backbone.blocks
        )
        self.outer_axes = {
            "patch_embed.weight": (("S", 0), None, None, None),
            "patch_embed.bias": (("S", 0),),
            "pos_embed": (None, None, ("S", 0)),
            "norm.weight": (("S", 0),),
            "norm.bias": (("S", 0),),
            "head.weight": (None, ("S", 0)),
        }
        self.outer_norms = {"norm": ("S", 0)}
        blocks = zip(backbone.blocks, self.shapes, strict=True)
        self.costs = NetworkCosts(
            blocks=tuple(self.block_costs(block, shape, TOKENS, TOKENS, TOKENS) for block, shape in blocks),
            flops=PerWidth(0, first=TOKENS * 3 * 8 * 8, last=CLASSES),
            params=PerWidth(CLASSES, first=3 * 8 * 8 + 1 + TOKENS + 2, last=CLASSES),
        )

    def stem(self, params: Params, images: Tensor) -> Tensor:
        x = F.conv2d(images, params["patch_embed.weight"], params["patch_embed.bias"], stride=8)
        return x.flatten(2).transpose(1, 2) + params["pos_embed"]

    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        raise AssertionError("one stage")

    def attend(self, block: Any, params: Params, widths: Any, x: Tensor) -> Tensor:
        return attention(block.attn, params, widths, x)

    def attention_half(self, block: Any, shape: BlockShape, params: Params, kept: BlockSlice, z_S: Tensor) -> Tensor:
        return norm(block.norm1, params, "norm1", self.attend(block, params, head_widths(kept, shape), z_S))

    def mlp_half(self, block: Any, shape: BlockShape, params: Params, kept: BlockSlice, z_S: Tensor) -> Tensor:
        def half(h_R: Tensor) -> Tensor:
            own = {name.removeprefix("mlp."): p for name, p in params.items() if name.startswith("mlp.")}
            return norm(block.norm2, params, "norm2", functional_call(block.mlp, own, h_R))

        return on_channels(half, z_S, kept.mlp_stream)

    def pool(self, params: Params, x: Tensor) -> Tensor:
        return norm(self.backbone.norm, params, "norm", x).mean(1)

    def classify(self, params: Params, features: Tensor) -> Tensor:
        return F.linear(features, params["head.weight"], self.backbone.head.bias)

    def resize(self, stage_widths: tuple[int, ...]) -> None:
        (self.backbone.embed_dim,) = stage_widths


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTED, "respost", Adapted((ResPostViT,), ResPostAdapter))


GLUS = {"SwiGLU": SwiGLU, "SwiGLUPacked": SwiGLUPacked, "GluMlp": GluMlp}
over_glus = pytest.mark.parametrize("glu", GLUS)


def make(glu: str, seed: int = 0) -> Supernet:
    """A randomised network of the family as a supernet, in float64: a norm over few channels loses digits."""
    return Supernet(randomise(ResPostViT(GLUS[glu]), seed)).double().eval()


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).double()


@over_glus
def test_identity_is_the_networks_own_forward(glu: str) -> None:
    large, small = make(glu)(images())
    assert torch.equal(large, small)


@pytest.mark.slow
@over_glus
@over_widths
@given(data=st.data(), seed=st.integers(0, 1000))
@few
def test_a_subnet_is_its_compact_network_and_costs_what_is_said(
    glu: str, kind: str, data: st.DataObject, seed: int
) -> None:
    supernet = make(glu, seed)
    shapes = supernet.shapes
    subnet: NetworkSlice = data.draw(general_slices(shapes) if kind == "general" else prefix_slices(shapes, kind))
    compact, x = cut(supernet.backbone, subnet).eval(), images()
    assert relative(supernet.small(x, subnet), compact(x)) < 1e-5
    assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compact.to("meta")(x[:1].to("meta"))
    assert counter.get_total_flops() == 2 * supernet.flops(subnet)
    assert set(compact.state_dict()) <= set(supernet.backbone.state_dict())


def test_a_neuron_of_a_glu_has_three_weights_per_channel() -> None:
    supernet = make("SwiGLU")
    (shape, *_), (costs, *_) = supernet.shapes, supernet.adapter.costs.blocks
    E = shape.embed_dim
    assert unit_flops(shape, costs) == UnitFlops(v_channel=TOKENS * (2 * E + TOKENS), neuron=TOKENS * 3 * E)


@over_glus
def test_magnitude_order_leaves_the_function_unchanged(glu: str) -> None:
    supernet, x = make(glu), images()
    before, orders = supernet.large(x), orders_of(magnitude_scores(supernet))
    assert any(order != sorted(order) for order in orders.values())
    permute(supernet, orders)
    assert relative(before, supernet.large(x)) < 1e-12
    for name, scores in magnitude_scores(supernet).items():
        assert torch.all(scores[:-1] >= scores[1:] - 1e-9), name


@over_glus
def test_heads_are_rotated_and_the_stream_is_only_ordered(glu: str) -> None:
    supernet, x = make(glu), images()
    before, state = supernet.large(x), copy.deepcopy(supernet.backbone.state_dict())
    with pytest.raises(UserError, match="do not read the stream through a norm"):
        rewrite(supernet, Basis(streams={0: torch.eye(24).double()}))
    basis = random_basis(supernet, 0)
    assert basis.qk and basis.v and not basis.streams and "stream.0" in basis.orders
    rewrite(supernet, basis)
    assert relative(before, supernet.large(x)) < 1e-12
    for name, tensor in timm_state(supernet).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-12)


@over_glus
def test_gates_of_ones_and_zeros_are_the_subnet(glu: str) -> None:
    supernet, x = make(glu), images()
    shape, depth = supernet.shapes[0], len(supernet.shapes)
    assert all(costs.norm_after_gate for costs in supernet.adapter.costs.blocks)
    kept = tuple(range(0, shape.embed_dim, 3))
    gate = torch.zeros(shape.embed_dim).double().index_fill(0, torch.tensor(kept), 1.0)
    chosen = BlockSlice(shape.embed_dim, shape.num_heads, shape.hidden, mlp_stream=kept)
    subnet = network_slice(supernet.shapes, [chosen] * depth)
    gated = BlockMixture((Term(identity_slice(shape), channel_gate=gate),))
    assert relative(supernet.small(x, subnet), supernet.small(x, [gated] * depth)) < 1e-12


@over_glus
@pytest.mark.parametrize("width", ["stream", "inner"])
def test_the_weight_of_a_term_multiplies_what_it_adds(glu: str, width: str) -> None:
    supernet = make(glu)
    (shape, *_), adapter = supernet.shapes, supernet.adapter
    block, x = adapter.blocks()[0], torch.randn(2, TOKENS, shape.embed_dim).double()
    params, weights = adapter.block_parameters(block), torch.tensor([0.2, 0.5, 0.3]).double()
    for half, skipped in ((adapter.attention_half, {"mlp": False}), (adapter.mlp_half, {"attn": False})):
        slices = [replace(prefix_slice(shape, alpha, width), **skipped) for alpha in (1, 2, 4)]
        expected = x.clone()
        for kept, g in zip(slices, weights, strict=True):
            sliced = slice_block(params, adapter.block_axes, shape, kept)
            expected[..., : kept.stream] += g * half(block, shape, sliced, kept, x[..., : kept.stream])
        mixture = BlockMixture(tuple(Term(kept, weight=g) for kept, g in zip(slices, weights, strict=True)))
        assert relative(expected, mixed_block(adapter, block, shape, mixture, x)) < 1e-12
