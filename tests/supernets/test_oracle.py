"""Invariant 0 judges all slicing code; here the oracle itself is judged, by timm and by sums written out."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from timm.layers import SimpleNorm
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from search_spaces.slices import (
    BlockSlice,
    Kept,
    NetworkSlice,
    identity_slice,
    network_slice,
    prefix_slice,
)
from supernets.t2t_vit import T2TViT
from tests import oracle
from tests.oracle import SWIN_MUTANTS, VIT_MUTANTS, Mutant, kept_weights, oracle_logits, randomise
from tests.strategies import (
    BACKBONES,
    SEEDS,
    block_shapes,
    general_slices,
    images,
    prefix_slices,
)

few = settings(max_examples=20, deadline=None)
backbones = st.one_of([make() for make in BACKBONES.values()])


def vit(divisor: int = 1, **options: Any) -> nn.Module:
    """A ViT with 1/divisor of the width, heads and neurons: divisor 2 is itself the AN subnet at alpha 2."""
    cls = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    sizes = {"embed_dim": 32 // divisor, "num_heads": 4 // divisor, "depth": 2, "mlp_ratio": 2}
    backbone: nn.Module = cls(img_size=32, patch_size=8, num_classes=5, **sizes, **options)
    return backbone


def swin(divisor: int = 1, **options: Any) -> nn.Module:
    """A Swin with odd, rectangular maps (9 x 13, 5 x 7, 3 x 4), padded and shifted windows."""
    heads = tuple(h // divisor for h in (4, 4, 8))
    sizes = {"embed_dim": 16 // divisor, "num_heads": heads, "depths": (1, 2, 1), "mlp_ratio": 2}
    backbone: nn.Module = SwinTransformer(img_size=(36, 52), num_classes=5, window_size=4, **sizes, **options)
    return backbone


def t2t(divisor: int = 1, **options: Any) -> nn.Module:
    """A T2T-ViT on odd grids; its factor on q k^T is of the original width whatever the slice."""
    sizes: dict[str, Any] = {
        "embed_dim": 32 // divisor,
        "num_heads": 4 // divisor,
        "depth": 2,
        "mlp_ratio": 2,
    }
    return T2TViT(img_size=(36, 52), num_classes=5, token_dim=8, qk_scale=32**-0.5, **sizes, **options)


def eva(divisor: int = 1, **options: Any) -> nn.Module:
    """An Eva with rotary embeddings and a SwiGLU."""
    sizes = {"embed_dim": 32 // divisor, "num_heads": 4 // divisor, "depth": 2, "mlp_ratio": 2}
    rotary = {"use_rot_pos_emb": True, "swiglu_mlp": True}
    return Eva(img_size=(32, 48), patch_size=8, num_classes=5, **sizes, **rotary | options)


def at_alpha(backbone: nn.Module, alpha: int, width: str = "stream") -> NetworkSlice:
    shapes = block_shapes(backbone)
    return network_slice(shapes, [prefix_slice(shape, alpha, width) for shape in shapes])


def distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|"""
    return ((a - b).abs().max() / b.abs().max()).item()


@given(backbones)
@few
def test_the_identity_slice_is_timms_own_forward(backbone: nn.Module) -> None:
    backbone = backbone.double()
    shapes = block_shapes(backbone)
    everything = network_slice(shapes, [identity_slice(shape) for shape in shapes])
    x = images(backbone)
    assert distance(oracle_logits(backbone, everything, x), backbone(x)) < 1e-12


FAMILIES = [
    (vit, {}),
    (vit, {"global_pool": "avg", "init_values": 1.0, "reg_tokens": 2, "pre_norm": True, "qkv_bias": False}),
    (vit, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "no_embed_class": True}),
    (vit, {"class_token": False, "global_pool": "avg", "norm_layer": "rmsnorm", "qk_norm": True}),
    (vit, {"distilled": True}),
    (swin, {}),
    (swin, {"qkv_bias": False}),
    (t2t, {"qkv_bias": True}),
    (t2t, {"tokens_type": "transformer"}),
    (eva, {"init_values": 1.0, "num_reg_tokens": 2}),
    (eva, {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"}),
    (eva, {"attn_type": "rope", "use_pre_transformer_norm": True, "qk_norm": True, "rope_rotate_half": True}),
    (eva, {"use_rot_pos_emb": False, "swiglu_mlp": False}),
]


@pytest.mark.parametrize("alpha", [2, 4])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_an_in_stream_width_is_a_narrower_timm_network(
    family: Callable[..., nn.Module], options: dict[str, Any], alpha: int
) -> None:
    """At one alpha in all blocks, what is kept of the parameters fills a network of 1/alpha the width."""
    backbone, narrow = randomise(family(**options), seed=1).double().eval(), family(alpha, **options).double()
    subnet = at_alpha(backbone, alpha)
    masks = kept_weights(backbone, subnet).tensors
    with torch.no_grad():
        for (name, p), small in zip(backbone.named_parameters(), narrow.parameters(), strict=True):
            small.copy_(p[masks[name]].view_as(small))
    x = images(backbone)
    assert distance(oracle_logits(backbone, subnet, x), narrow.eval()(x)) < 1e-12


def indices(kept: Kept) -> list[int]:
    return list(range(kept)) if isinstance(kept, int) else list(kept)


def written_out(block: Any, kept: BlockSlice, x: Tensor) -> Tensor:
    """A ViT block on one image x (N, E), head by head and index by index."""
    x, s, d = x.clone(), kept.stream, block.attn.head_dim
    qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
    ls1, ls2 = (getattr(ls, "gamma", torch.ones_like(x[0])) for ls in (block.ls1, block.ls2))
    if kept.attn:
        y = layer_norm(x[:, :s], (s,), block.norm1.weight[:s], block.norm1.bias[:s], block.norm1.eps)
        out = proj.bias[:s].expand(len(x), s)
        for j, head in enumerate(indices(kept.heads)):
            starts = [part * x.shape[1] + head * d for part in range(3)]
            q, k, v = (linear(y, qkv.weight[i : i + d, :s], qkv.bias[i : i + d]) for i in starts)
            q, k = q[:, : kept.qk], k[:, : kept.qk]
            own = d if kept.v_channels is None else kept.v_channels
            channels = range(own) if isinstance(own, int) else own[j]
            mixed = torch.softmax(q @ k.T / math.sqrt(d), -1) @ v[:, list(channels)]
            out = out + mixed @ proj.weight[:s, [head * d + c for c in channels]].T
        x[:, :s] += ls1[:s] * out
    if kept.mlp:
        y = layer_norm(x[:, :s], (s,), block.norm2.weight[:s], block.norm2.bias[:s], block.norm2.eps)
        selected = indices(s if kept.mlp_stream is None else kept.mlp_stream)
        out = fc2.bias[selected].expand(len(x), -1)
        for neuron in indices(kept.hidden):
            activation = block.mlp.act(y[:, selected] @ fc1.weight[neuron, selected] + fc1.bias[neuron])
            out = out + activation[:, None] * fc2.weight[selected, neuron]
        x[:, selected] += ls2[selected] * out
    return x


@pytest.mark.parametrize("init_values", [None, 1.0])  # without LayerScale, and with it
@given(st.data(), SEEDS)
@few
def test_every_block_of_a_general_slice_is_the_sum_written_out(
    init_values: float | None, data: st.DataObject, seed: int
) -> None:
    backbone: Any = randomise(vit(init_values=init_values), seed).double()
    subnet = data.draw(general_slices(block_shapes(backbone)))
    seen: list[tuple[Tensor, Tensor]] = []  # hooks are copied with the module that carries them
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    oracle_logits(backbone, subnet, images(backbone, batch=1))
    assert len(seen) == len(subnet.blocks)
    for block, kept, (before, after) in zip(backbone.blocks, subnet.blocks, seen, strict=True):
        torch.testing.assert_close(after[0], written_out(block, kept, before[0]), rtol=0, atol=1e-11)
        assert not before[..., subnet.stage_widths[0] :].any()


def has_no_effect(backbone: nn.Module, name: str) -> Tensor | bool:
    """Entries that may not move the logits though kept.

    Softmax ignores what all keys have in common (their bias, that of a mixing of heads before it), and a ReLU sleeps of
    whose inputs none is above zero. Of a ViT's last block only the tokens that are pooled count, and of a bias that all
    blocks read only their kept heads. A CaiT that pools patches reads no class token.
    """
    if isinstance(backbone, Cait) and backbone.global_pool == "avg" and name.startswith(("cls_", "blocks_token_only.")):
        return True
    if name.endswith((".k.bias", ".k_norm.bias", ".k_proj.bias", ".proj_l.bias")):
        return True
    if "cpb_mlp." in name or "rel_pos" in name:
        return True
    if name.startswith("blocks.") and name.endswith("relative_position_bias_table"):
        return True
    if name.endswith("attn_pool.kv.bias"):
        both = backbone.get_parameter(name)
        return torch.arange(len(both)) < len(both) // 2
    if name.endswith("qkv.bias"):
        attn: Any = backbone.get_submodule(name.removesuffix(".qkv.bias"))
        keys = torch.zeros(3, attn.qkv.out_features // 3, dtype=torch.bool)
        keys[1] = isinstance(getattr(attn, "k_norm", nn.Identity()), nn.Identity)
        return keys.flatten()
    return False


@given(st.data(), backbones, st.sampled_from(["stream", "inner"]))
@few
def test_exactly_the_kept_weights_move_the_logits(data: st.DataObject, backbone: nn.Module, width: str) -> None:
    backbone = backbone.double().requires_grad_()  # T2T's position embedding too
    shapes = block_shapes(backbone)
    # Where a stage is wider than its blocks, patch tokens hold channels that no class token ever sees.
    subnet = network_slice(shapes, data.draw(prefix_slices(shapes, width)).blocks)
    logits = oracle_logits(backbone, subnet, images(backbone))
    weights = torch.arange(1, logits.numel() + 1).view_as(logits).sin()
    parameters = dict(backbone.named_parameters())
    gradients = torch.autograd.grad((logits * weights).sum(), list(parameters.values()))
    masks = kept_weights(backbone, subnet).tensors
    for name, gradient in zip(parameters, gradients, strict=True):
        moved, kept = gradient != 0, masks[name]
        assert not (moved & ~kept).any(), f"{name}: a weight that is not kept moves the logits"
        assert (moved | ~kept | has_no_effect(backbone, name)).all(), f"{name}: a kept weight does nothing"


@given(st.data(), backbones)
@few
def test_unkept_weights_are_never_read(data: st.DataObject, backbone: nn.Module) -> None:
    subnet = data.draw(general_slices(block_shapes(backbone)))
    x = images(backbone)
    clean = oracle_logits(backbone, subnet, x)
    with torch.no_grad():
        for name, kept in kept_weights(backbone, subnet).tensors.items():
            backbone.get_parameter(name)[~kept] = torch.nan
    assert torch.equal(oracle_logits(backbone, subnet, x), clean)


def all_channels(norm: nn.Module, kept: Tensor) -> nn.Module:
    return norm


@pytest.mark.parametrize("family", [vit, swin, t2t, eva])
def test_norms_over_all_channels_are_another_network(
    family: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = randomise(family(), seed=3).eval()
    x, subnet = images(backbone), at_alpha(backbone, 2)
    right = oracle_logits(backbone, subnet, x)
    monkeypatch.setattr(oracle, "KeptNorm", all_channels)
    assert distance(oracle_logits(backbone, subnet, x), right) > 1e-3


CAUGHT = [(family, mutant) for family in (vit, t2t) for mutant in VIT_MUTANTS]
CAUGHT += [(swin, mutant) for mutant in SWIN_MUTANTS]


@pytest.mark.parametrize("width", ["stream", "inner"])
@pytest.mark.parametrize(("family", "mutant"), CAUGHT)
def test_every_mutant_is_caught(family: Callable[..., nn.Module], mutant: Mutant, width: str) -> None:
    """By 100 times what invariant 2 allows; a mutant that drops nothing is the right slice."""
    for seed in range(4):
        backbone = randomise(family(), seed).eval()
        x, subnet = images(backbone), at_alpha(backbone, 2, width)
        off = distance(mutant(backbone, subnet, x), oracle_logits(backbone, subnet, x))
        if width == "inner" and mutant.__name__.startswith("merging"):
            assert off == 0  # all channels are kept
        else:
            assert off > 1e-3
        everything = at_alpha(backbone, 1)
        assert torch.equal(mutant(backbone, everything, x), oracle_logits(backbone, everything, x))


def test_what_the_oracle_does_not_know_is_refused() -> None:
    strange: Any = vit()
    strange.blocks[0].mlp.register_parameter("own", nn.Parameter(torch.ones(1)))
    with pytest.raises(TypeError, match=r"does not know blocks\.0\.mlp\.own"):
        kept_weights(strange, at_alpha(strange, 2))
    simple = vit(norm_layer=SimpleNorm)
    with pytest.raises(TypeError, match="not SimpleNorm"):
        oracle_logits(simple, at_alpha(simple, 2), images(simple))
    with pytest.raises(ValueError, match="2 slices for 4 blocks"):
        kept_weights(swin(), at_alpha(vit(), 1))
    narrow = NetworkSlice(at_alpha(vit(), 1).blocks, (16,))
    with pytest.raises(ValueError, match="uses 32 channels, its stage has 16"):
        kept_weights(vit(), narrow)
