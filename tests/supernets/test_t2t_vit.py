"""T2T-ViT: the original's numbers, timm's conventions, and exact costs."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models import load_checkpoint
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.errors import UserError
from supernets.t2t_tokens import (
    ScaledAttention,
    T2TModule,
    TokenPerformer,
    TokenTransformer,
    token_grids,
    token_macs,
)
from supernets.t2t_vit import VARIANTS, T2TViT, checkpoint_filter_fn, sinusoid_table

TYPES = ("performer", "transformer")
NANO = {"embed_dim": 48, "depth": 3, "num_heads": 4, "token_dim": 16, "num_classes": 10}


def read_vectors(tokens_type):
    """The original's small network: constructor arguments, state dict, input, tokens, logits."""
    path = Path(__file__).parent / "vectors" / f"t2t_{tokens_type}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del config["qk_scale"]  # "embed_dim**-0.5", in words: the default
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return config, state, tensors


def nano(**kwargs):
    torch.manual_seed(0)
    return T2TViT(**{"img_size": 32, **NANO, **kwargs}).eval()


def roughen(module, gain=1.0):
    """Weights large enough that attention is far from uniform, and no parameter at its initial 0 or 1."""
    torch.manual_seed(1)
    for name, p in module.named_parameters():
        if p.requires_grad:
            std = gain / math.sqrt(p.shape[-1]) if p.dim() > 1 else 0.3
            p.data = torch.randn_like(p) * std + (1.0 if "norm" in name and "weight" in name else 0.0)
    return module


def count_macs(function, *args):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops() / 2


# The original's numbers


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens_type", TYPES)
def test_tokens_and_logits_are_the_originals(tokens_type, fused):
    config, state, expected = read_vectors(tokens_type)
    model = T2TViT(**config).eval()
    assert torch.equal(model.pos_embed, state["pos_embed"])
    model.load_state_dict(state, strict=True)
    for module in model.modules():
        if isinstance(module, ScaledAttention):
            module.fused_attn = fused
    with torch.no_grad():
        torch.testing.assert_close(model.tokens_to_token(expected["input"]), expected["tokens"], atol=1e-6, rtol=0)
        logits = model(expected["input"])
    # 1e-6, not 1e-5: these weights are so small that head_dim ** -0.5 would pass at 1e-5.
    torch.testing.assert_close(logits, expected["logits"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens_type", TYPES)
def test_vectors_tell_the_two_scales_apart(tokens_type):
    config, state, expected = read_vectors(tokens_type)
    head_dim = config["embed_dim"] // config["num_heads"]
    model = T2TViT(**config, qk_scale=head_dim**-0.5).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        assert (model(expected["input"]) - expected["logits"]).abs().max() > 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "parameters", "gmacs"),
    [  # parameters with the fixed tables counted; GMACs at 224 px as published, one decimal
        ("t2t_vit_7", 4_310_222, 1.1),
        ("t2t_vit_10", 5_889_230, 1.5),
        ("t2t_vit_12", 6_941_902, 1.8),
        ("t2t_vit_14", 21_545_550, 4.8),
        ("t2t_vit_19", 39_177_422, 8.5),
        ("t2t_vit_24", 64_105_934, None),  # published 13.8; 13.66 as executed
        ("t2t_vit_t_14", 21_541_070, 6.1),
        ("t2t_vit_t_19", 39_172_942, 9.8),
        ("t2t_vit_t_24", 64_101_454, 15.0),
    ],
)
def test_published_sizes(variant, parameters, gmacs):
    with torch.device("meta"):
        model = timm.create_model(variant).eval()
        macs = count_macs(model, torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert gmacs is None or round(macs / 1e9, 1) == gmacs
    assert model.default_cfg["crop_pct"] == 0.9
    assert model.blocks[0].attn.scale == model.embed_dim**-0.5


def test_fixed_tables_are_parameters_that_do_not_train():
    frozen = {name for name, p in nano().named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    w = TokenPerformer(27, 16).w
    torch.testing.assert_close(w @ w.T, 8 * torch.eye(8), atol=1e-5, rtol=0)


def test_performer_is_kernel_attention_written_out():
    layer = roughen(TokenPerformer(27, 16).double().eval(), gain=0.5)
    x = torch.randn(2, 9, 27, dtype=torch.float64)
    k, q, v = layer.kqv(layer.norm1(x)).split(16, dim=-1)

    def phi(t):
        return torch.stack([(t @ w - (t * t).sum(-1) / 2).exp() for w in layer.w], dim=-1) / math.sqrt(8)

    kernel = phi(q) @ phi(k).transpose(1, 2)  # (B, N, N)
    attended = kernel @ v / (kernel.sum(-1, keepdim=True) + 1e-8)
    y = v + layer.proj(attended)
    y = y + layer.mlp[2](F.gelu(layer.mlp[0](layer.norm2(y))))
    torch.testing.assert_close(layer(x), y, atol=1e-12, rtol=1e-12)


def test_token_transformer_is_softmax_attention_written_out():
    layer = roughen(TokenTransformer(27, 16).double().eval(), gain=4.0)
    x = torch.randn(2, 9, 27, dtype=torch.float64)
    q, k, v = layer.attn.qkv(layer.norm1(x)).split(16, dim=-1)
    y = v + layer.attn.proj((q @ k.transpose(1, 2) / math.sqrt(27)).softmax(-1) @ v)
    y = y + layer.mlp(layer.norm2(y))
    torch.testing.assert_close(layer(x), y, atol=1e-12, rtol=1e-12)


# Attention: the stored scale, and what a cutter changes


def test_fused_attention_uses_the_stored_scale():
    attn = roughen(ScaledAttention(48, num_heads=4).eval(), gain=3.0)
    x = torch.randn(2, 7, 48)
    default = attn(x)
    attn.scale = 0.05
    fused = attn(x)
    attn.fused_attn = False
    torch.testing.assert_close(fused, attn(x), atol=1e-5, rtol=1e-5)
    assert (fused - default).abs().max() > 0.01


@pytest.mark.parametrize("fused", [True, False])
def test_attention_honours_masks(fused):
    attn = roughen(ScaledAttention(48, num_heads=4).eval(), gain=3.0)
    attn.fused_attn = fused
    x = torch.randn(2, 7, 48)
    causal = attn(x, is_causal=True)
    torch.testing.assert_close(causal[:, :3], attn(x[:, :3], is_causal=True), atol=1e-5, rtol=1e-5)
    below = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(attn(x, attn_mask=below), causal, atol=1e-5, rtol=1e-5)


def test_cut_heads_keep_their_function():
    model = roughen(nano(), gain=2.0)
    attn, x = model.blocks[1].attn, torch.randn(2, 5, 48)
    kept, d = [0, 2], 12
    with torch.no_grad():
        silent = attn.proj.weight.view(48, 4, d).clone()
        silent[:, [1, 3]] = 0
        attn.proj.weight.copy_(silent.view(48, 48))
        whole = attn(x)
        attn.qkv.weight = torch.nn.Parameter(attn.qkv.weight.view(3, 4, d, 48)[:, kept].reshape(-1, 48))
        attn.proj.weight = torch.nn.Parameter(silent[:, kept].reshape(48, -1))
        attn.num_heads, attn.attn_dim = 2, 24
        torch.testing.assert_close(attn(x), whole, atol=1e-6, rtol=1e-5)
    assert attn.scale == 48**-0.5


# Costs


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("tokens_type", TYPES)
@pytest.mark.parametrize(
    ("img_size", "in_chans", "token_dim"),
    [(64, 3, 16), ((65, 97), 1, 10), ((33, 47), 3, 7), ((3, 50), 4, 16)],
)
def test_token_macs_are_torchs_count(tokens_type, img_size, in_chans, token_dim, device):
    with torch.device(device):
        module = T2TModule(img_size, in_chans, 24, token_dim, tokens_type).eval()
        x = torch.zeros(1, in_chans, *module.img_size)
        macs = count_macs(module.forward_tokens, x)
    assert macs == token_macs(img_size, in_chans, token_dim, tokens_type)


def test_terms_of_t2t_vit_14_add_up():
    tokens, E, M, N = token_macs(224), 384, 3 * 384, 14 * 14
    project = N * 9 * 64 * E
    block = (N + 1) * (4 * E * E + 2 * E * M) + 2 * (N + 1) ** 2 * E
    head = E * 1000
    assert tokens == 255_621_632
    with torch.device("meta"):
        whole = count_macs(timm.create_model("t2t_vit_14").eval(), torch.empty(1, 3, 224, 224))
    assert whole == tokens + project + 14 * block + head == 4_783_468_544


# timm's conventions


def test_timm_creates_every_variant_with_overrides():
    for variant in VARIANTS:
        model = timm.create_model(variant, img_size=32, **NANO)
        assert model.num_features == model.embed_dim == 48
        assert model.num_classes == 10
        assert len(model.blocks) == len(model.feature_info) == 3
        attention = TokenTransformer if "_t_" in variant else TokenPerformer
        assert isinstance(model.tokens_to_token.attention1, attention)
        assert timm.models.get_pretrained_cfg(variant).url.endswith(f"{VARIANTS[variant][1]}.pth.tar")


def test_classifier_and_head():
    model, x = nano(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, 5, 48)
    assert torch.equal(pooled, features[:, 0])
    assert torch.equal(model(x), model.get_classifier()(pooled))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    with pytest.raises(UserError, match='global_pool "avg"'):
        model.reset_classifier(7, "avg")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_pool": "avg"}, 'global_pool "avg"; .*use token'),
        ({"tokens_type": "convolution"}, 'tokens_type "convolution"; use performer or transformer'),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 48"),
        ({"img_size": (2, 32)}, "2 x 32 px; .*3 px"),
    ],
)
def test_what_is_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        nano(**kwargs)


def test_intermediates():
    model, x = roughen(nano(img_size=(32, 50))), torch.randn(2, 3, 32, 50)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 48, 2, 3)] * 3
    ((tokens, cls),) = model.forward_intermediates(
        x, [-1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(torch.cat([cls, tokens], 1), final)
    torch.testing.assert_close(maps[2][0, :, 1, 2], model.blocks(model._pos_embed(model.tokens_to_token(x)))[0, 6])

    calls = []
    model.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    found = model.forward_intermediates(
        x, [0, 1], stop_early=True, intermediates_only=True, output_dict=True, return_prefix_tokens=True
    )
    assert calls == []
    assert set(found) == {"image_intermediates", "image_intermediates_prefix"}
    torch.testing.assert_close(found["image_intermediates"][1], maps[1])
    with pytest.raises(UserError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_features_only():
    backbone = timm.create_model("t2t_vit_7", img_size=32, features_only=True, out_indices=[0, 2], **NANO)
    assert backbone.feature_info.channels() == [48, 48]
    assert backbone.feature_info.reduction() == [16, 16]
    assert [tuple(m.shape) for m in backbone(torch.randn(1, 3, 32, 32))] == [(1, 48, 2, 2)] * 2


def test_gradient_checkpointing_changes_no_gradient():
    model, x = nano(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert model.grad_checkpointing
    torch.testing.assert_close(*grads)
    assert all(g.abs().sum() > 0 for g in grads[0].values())


def test_parameter_groups():
    model = nano()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scales["head.weight"] == (1.0, 0.05)
    assert scales["blocks.2.mlp.fc1.weight"][0] == 2 * scales["blocks.1.mlp.fc1.weight"][0]
    assert scales["tokens_to_token.project.weight"][0] == scales["blocks.0.attn.qkv.weight"][0] / 2
    assert scales["cls_token"][1] == 0.0
    assert "pos_embed" not in scales


def test_token_dropout_is_the_performers():
    x = torch.randn(2, 3, 32, 32)
    for kwargs, drops in (
        ({}, [0.1] * 4),  # the original's, after each projection and each MLP
        ({"token_drop_rate": 0.0}, [0.0] * 4),
        ({"tokens_type": "transformer", "token_drop_rate": 0.5}, [0.0] * 8),
    ):
        module = nano(**kwargs).tokens_to_token
        assert [m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)] == drops
        assert torch.equal(module.train()(x), module.eval()(x)) is not any(drops)


@pytest.mark.parametrize("tokens_type", TYPES)
def test_the_projection_can_be_sliced_outside(tokens_type):
    model, x = roughen(nano(tokens_type=tokens_type)), torch.randn(2, 3, 32, 32)
    t2t = model.tokens_to_token
    tokens = t2t.forward_tokens(x)
    assert tokens.shape == (2, 4, 9 * 16)
    sliced = F.linear(tokens, t2t.project.weight[:12], t2t.project.bias[:12])
    torch.testing.assert_close(sliced, t2t(x)[..., :12])


# Input sizes


@pytest.mark.parametrize("tokens_type", TYPES)
def test_any_input_size(tokens_type):
    model = nano(tokens_type=tokens_type)
    x = torch.randn(1, 3, 65, 97)
    with pytest.raises(UserError, match=r"65 x 97 px, but img_size is \(32, 32\)"):
        model(x)
    model.set_input_size((65, 97))
    assert model.tokens_to_token.grid_size == (4, 6)
    made = nano(tokens_type=tokens_type, img_size=[65, 97])
    made.load_state_dict(model.state_dict())
    assert torch.equal(made.pos_embed, sinusoid_table(25, 48))
    assert not model.pos_embed.requires_grad
    assert torch.equal(model(x), made(x))


def test_grids_are_those_of_the_soft_splits():
    for size in [(3, 3), (4, 19), (33, 64), (65, 97), (224, 384)]:
        x = torch.zeros(1, 1, *size)
        for (kernel, stride, padding), grid in zip([(7, 4, 2), (3, 2, 1), (3, 2, 1)], token_grids(size), strict=True):
            x = F.max_pool2d(x, kernel, stride, padding)
            assert tuple(x.shape[2:]) == grid


@pytest.mark.parametrize("tokens_type", TYPES)
def test_tokens_lie_on_the_grid_row_by_row(tokens_type):
    module = roughen(nano(tokens_type=tokens_type, img_size=(33, 64)).tokens_to_token)
    x = torch.randn(2, 3, 33, 64)
    tokens = module.attention1(F.unfold(x, 7, stride=4, padding=2).mT)
    tokens = tokens.view(2, 8, 16, 16).movedim(3, 1)  # (B, H, W, D) -> (B, D, H, W)
    tokens = module.attention2(F.unfold(tokens, 3, stride=2, padding=1).mT)
    tokens = tokens.view(2, 4, 8, 16).movedim(3, 1)
    tokens = F.unfold(tokens, 3, stride=2, padding=1).mT
    torch.testing.assert_close(module.forward_tokens(x), tokens, atol=1e-5, rtol=1e-5)


def test_timm_hears_of_a_new_input_size():
    tracked = pytest.importorskip("timm.models._input", reason="this timm does not track a model's input size")
    model = timm.create_model("t2t_vit_7", **NANO)
    model.set_input_size(96)
    assert tracked.get_model_input_config(model)["input_size"] == (3, 96, 96)


# Checkpoints


@pytest.fixture
def published(tmp_path):
    """A file laid out as the authors publish theirs: EMA weights under DDP's names, beside others."""
    model = roughen(nano(num_classes=1000))
    ema = {f"module.{name}": t for name, t in model.state_dict().items()}
    path = tmp_path / "81.5_T2T_ViT.pth.tar"
    raw = {name: torch.zeros_like(t) for name, t in ema.items()}
    torch.save({"epoch": 309, "arch": "t2t", "state_dict": raw, "state_dict_ema": ema}, path)
    return path, model


def test_published_checkpoints_load_by_path(published):
    path, source = published
    args = {**NANO, "img_size": 32, "num_classes": 1000}
    x = torch.randn(2, 3, 32, 32)
    overlay = {"file": str(path)}
    models = [
        timm.create_model("t2t_vit_14", pretrained=True, pretrained_cfg_overlay=overlay, **args),
        timm.create_model("t2t_vit_14", checkpoint_path=str(path), **args),
        nano(num_classes=1000),
    ]
    raw = torch.load(path)  # what a download hands to the filter: nothing unwrapped yet
    models[2].load_state_dict(checkpoint_filter_fn(raw, models[2]))
    for model in models:
        assert torch.equal(model.eval()(x), source(x))

    fewer = timm.create_model(
        "t2t_vit_14", pretrained=True, pretrained_cfg_overlay=overlay, **{**args, "num_classes": 10}
    ).eval()
    assert fewer(x).shape == (2, 10)
    assert torch.equal(fewer.forward_features(x), source.forward_features(x))


def test_a_checkpoint_of_another_size_is_interpolated(published):
    path, source = published
    model = nano(img_size=(48, 80), num_classes=1000)
    load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn)
    grid = source.pos_embed[:, 1:].transpose(1, 2).reshape(1, 48, 2, 2)
    grid = F.interpolate(grid, size=(3, 5), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed, torch.cat([source.pos_embed[:, :1], grid], 1))
    assert not model.pos_embed.requires_grad

    with pytest.raises(UserError, match="15 positions are no square"):
        checkpoint_filter_fn(model.state_dict(), source)


def test_foreign_checkpoints_are_refused(published):
    path, source = published
    with pytest.raises(UserError, match="3 input channels, the model 1"):
        load_checkpoint(nano(in_chans=1), str(path), filter_fn=checkpoint_filter_fn)
    with pytest.raises(UserError, match="no tokens_to_token"):
        checkpoint_filter_fn({"patch_embed.proj.weight": torch.zeros(1)}, source)


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_performer_survives_large_activations_under_autocast(dtype):
    torch.manual_seed(0)
    layer = roughen(TokenPerformer(147, 64).eval())
    with torch.no_grad():
        # Keys and queries along a row of W: exponents near M / 2 = 16, and e^16 is no float16.
        layer.kqv.weight.data[:128] *= 0.2
        layer.kqv.bias.data[:128] = layer.w[0].repeat(2) * 0.9
        x = 100 * torch.randn(2, 200, 147)
        exact = layer.attention(layer.norm1(x))
        k, _, _ = layer.kqv(layer.norm1(x)).split(64, dim=-1)
        assert layer.features(k).max() > torch.finfo(torch.float16).max
        with torch.autocast("cpu", dtype):
            mixed = layer.attention(layer.norm1(x))
            assert layer(x).isfinite().all()
    assert mixed.isfinite().all()
    error = (mixed.float() - exact).abs().max() / exact.abs().max()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.01)


def test_performers_kernel_is_float32_under_autocast():
    """Given k, q and v as bfloat16 leaves them, what enters the projection is off by its rounding only."""
    layer = roughen(TokenPerformer(147, 64).eval(), gain=0.7)
    x = torch.randn(64, 3, 147)
    attended = []
    layer.proj.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0].double()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        k, q, v = layer.kqv(layer.norm1(x)).double().chunk(3, dim=-1)
        layer(x)
    kernel = layer.features(q) @ layer.features(k).transpose(1, 2)
    expected = kernel @ v / (kernel.sum(-1, keepdim=True) + 1e-8)
    error = (attended[0] - expected).abs().max() / expected.abs().max()
    assert expected.abs().max() > 0.5
    assert error < 2**-8  # the kernel in bfloat16: 0.027


@pytest.mark.parametrize("tokens_type", TYPES)
def test_whole_network_under_autocast(tokens_type):
    model, x = nano(tokens_type=tokens_type), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
    torch.testing.assert_close(mixed.float(), exact, atol=0.02, rtol=0.02)
