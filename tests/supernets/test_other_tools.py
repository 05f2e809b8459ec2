"""What other tools do to a network works on compact ones: they reach every layer, because every layer is called."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models._features import FeatureGetterNet
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from benchmarks.pruners import merging_pruner
from search_spaces.errors import UserError
from search_spaces.slices import BlockSlice, NetworkSlice, identity_slice, network_slice, prefix_slice
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet
from tests.strategies import images

over_families = pytest.mark.parametrize("family", FAMILIES)


def an(supernet: Supernet) -> list[BlockSlice]:
    return [prefix_slice(shape, 2, "stream") for shape in supernet.shapes]


def mixed(supernet: Supernet) -> list[BlockSlice]:
    return [prefix_slice(shape, 1 + i % 2, "stream") for i, shape in enumerate(supernet.shapes)]


def channels(supernet: Supernet) -> list[BlockSlice]:
    return [replace(identity_slice(s), mlp_stream=tuple(range(0, s.embed_dim, 2))) for s in supernet.shapes]


def widths(supernet: Supernet) -> list[BlockSlice]:
    return [replace(identity_slice(shape), qk=2, v_channels=3) for shape in supernet.shapes]


def uneven(supernet: Supernet) -> list[BlockSlice]:
    own = [tuple(tuple(range(1 + h % 3)) for h in range(shape.num_heads)) for shape in supernet.shapes]
    return [replace(identity_slice(s), v_channels=v) for s, v in zip(supernet.shapes, own, strict=True)]


def skipped(supernet: Supernet) -> list[BlockSlice]:
    halves = ((True, True), (False, False), (False, True))
    pairs = zip(supernet.shapes, halves, strict=True)
    return [replace(identity_slice(shape), attn=attn, mlp=mlp) for shape, (attn, mlp) in pairs]


CUTS = {kind.__name__: kind for kind in (an, mixed, channels, widths, uneven, skipped)}
over_cuts = pytest.mark.parametrize("kind", CUTS)


def compact_of(family: str, kind: str, **options: Any) -> tuple[Any, Tensor]:
    """A compact network in float32, and images that it takes."""
    supernet = small_supernet(family, **options)
    subnet: NetworkSlice = network_slice(supernet.shapes, CUTS[kind](supernet))
    x = images(supernet.backbone)
    return cut(supernet.backbone, subnet).float().eval(), x.float()


@contextmanager
def counting(network: nn.Module) -> Iterator[Counter[str]]:
    """How often each module is called."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in network.named_modules()
    ]
    yield calls
    for handle in handles:
        handle.remove()


def owners(network: nn.Module) -> set[str]:
    """The modules that hold parameters of their own."""
    return {name for name, module in network.named_modules() if [*module.parameters(recurse=False)]}


@over_cuts
@over_families
def test_every_module_with_parameters_is_called_once(family: str, kind: str) -> None:
    network, x = compact_of(family, kind)
    with counting(network) as calls:
        network(x)
    assert {name: calls[name] for name in owners(network)} == dict.fromkeys(owners(network), 1)
    if kind != "skipped":
        assert sum(name.endswith(("attn.qkv", "attn.q_proj")) for name in owners(network)) >= 3


@over_cuts
def test_fused_layers_with_biases_of_their_own_are_called(kind: str) -> None:
    """An Eva's, which timm's attention multiplies by without calling them."""
    network, x = compact_of("eva", kind, qkv_fused=True)
    with counting(network) as calls:
        network(x)
    fused = [name for name, _ in network.named_modules() if name.endswith("attn.qkv")]
    assert fused and [calls[name] for name in fused] == [1] * len(fused)


@over_cuts
@over_families
def test_lora(family: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    network, x = compact_of(family, kind)
    before = network(x).detach()
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=linear))
    torch.testing.assert_close(adapted(x), before)  # B begins at zero
    adapters = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(adapters) == len(linear)
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.1)
    assert not torch.allclose(adapted(x), before)
    adapted(x).square().sum().backward()
    assert not [name for name, p in adapters.items() if p.grad is None or not p.grad.abs().sum() > 0]
    merged = adapted.eval()(x).detach()
    torch.testing.assert_close(adapted.merge_and_unload()(x), merged, rtol=1e-4, atol=1e-4)


@over_cuts
@over_families
@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore::DeprecationWarning")
def test_dynamic_quantisation(family: str, kind: str) -> None:
    network, x = compact_of(family, kind)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear}, dtype=torch.qint8)
    replaced = {n for n, m in small.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)}
    assert replaced == linear
    with torch.no_grad(), counting(small) as calls:
        expected, found = network(x), small(x)
    assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()
    assert all(calls[name] == 1 for name in replaced)


@over_cuts
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_attention_masks_on_a_vit(kind: str, pooling: str) -> None:
    network, x = compact_of("vit", kind, global_pool=pooling, class_token=pooling == "token")
    N = network.patch_embed.num_patches + network.num_prefix_tokens
    seen = torch.ones(N, N, dtype=torch.bool)
    torch.testing.assert_close(network(x, attn_mask=seen), network(x))
    seen[:, -1] = False
    masked = network(x, attn_mask=seen)
    assert not torch.allclose(masked, network(x))
    added = torch.zeros(N, N).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(network(x, attn_mask=added), masked)
    torch.testing.assert_close(network(x, attn_mask=seen.expand(len(x), 1, N, N)), masked)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    torch.testing.assert_close(network(x, is_causal=True), network(x, attn_mask=causal))
    if pooling == "token":  # what the class token does not see does not matter to it
        alone = torch.eye(N, dtype=torch.bool)
        torch.testing.assert_close(network(x, attn_mask=alone), network(x.flip(0), attn_mask=alone).flip(0) * 1.0)
        torch.testing.assert_close(network(torch.randn_like(x), attn_mask=alone), network(x, attn_mask=alone))


@pytest.mark.parametrize("kind", ["widths", "uneven"])
def test_a_mask_of_every_head_goes_to_its_head(kind: str) -> None:
    """Against the network whose heads run one by one: the mask of one head set aside changes what its channels give."""
    network, _ = compact_of("vit", kind)
    attn = network.blocks[0].attn
    z = torch.randn(2, 5, 24)
    given: list[Tensor] = []
    attn.proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    mask = torch.zeros(2, attn.num_heads, 5, 5)
    attn(z, attn_mask=mask)
    mask[:, 4, :, 2] = float("-inf")
    attn(z, attn_mask=mask)
    moved = (given[0] - given[1]).abs().amax((0, 1)) > 0
    widths = attn.heads.v if isinstance(attn.heads.v, tuple) else (attn.heads.v,) * attn.num_heads
    first = sum(widths[:4])
    assert moved[first : first + widths[4]].all() and moved.sum() == widths[4]


@over_cuts
@over_families
def test_timms_feature_extraction(family: str, kind: str) -> None:
    network, x = compact_of(family, kind)
    final, maps = network.forward_intermediates(x)
    torch.testing.assert_close(final, network.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in network.feature_info]
    torch.testing.assert_close(network.forward_head(final), network(x))
    features = FeatureGetterNet(copy.deepcopy(network), out_indices=(0,))
    torch.testing.assert_close(features(x)[0], maps[0])
    if hasattr(network, "prune_intermediate_layers"):
        network.prune_intermediate_layers([0])
        torch.testing.assert_close(network.forward_intermediates(x, [0], intermediates_only=True)[0], maps[0])


@over_families
def test_torchscript_is_refused_in_words(family: str) -> None:
    network, _ = compact_of(family, "mixed")
    with pytest.raises(UserError, match=r"no TorchScript.*nas\.export"):
        torch.jit.script(network)


def pruned(network: Any, x: Tensor, inside: bool, stream: bool) -> None:
    """Torch-Pruning halves the hidden neurons; inside: the channels of every head, too; stream: the stream, too."""
    tp = pytest.importorskip("torch_pruning")
    attentions = [m for name, m in network.named_modules() if name.endswith("attn") and "blocks." in name]
    kept = [network.get_classifier(), *(m for name, m in network.named_modules() if name.startswith("tokens_to_token"))]
    kept += [p for name, p in network.named_parameters() if name.endswith("relative_position_bias_table")]
    if not inside:
        kept += [attn.qkv for attn in attentions]
    if not stream:
        kept += [m for name, m in network.named_modules() if name.endswith(("patch_embed.proj", "attn.proj", "fc2"))]
        kept += [m for m in network.modules() if isinstance(m, PatchMerging)]
    pruner = tp.pruner.BasePruner(
        network,
        x[:1],
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        num_heads={attn.qkv: attn.num_heads for attn in attentions},
        prune_head_dims=inside,
        ignored_layers=kept,
        customized_pruners={PatchMerging: merging_pruner(tp)},
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    for attn in attentions if inside else []:  # as for timm's own attention
        attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
        attn.attn_dim = attn.proj.in_features


# What Torch-Pruning 1.6 can follow: no stream of which blocks read a part, no heads whose v is not as wide as q and k.
BY_TORCH_PRUNING = [
    *((kind, False, False) for kind in CUTS),
    *((kind, True, False) for kind in ("an", "mixed", "channels", "skipped")),
    *((kind, False, True) for kind in ("an", "widths", "uneven", "skipped")),
    *((kind, True, True) for kind in ("an", "skipped")),
]


def followed(family: str, kind: str, inside: bool, stream: bool) -> bool:
    """Not rotary embeddings; of a Swin V2, Beit and RelPos not heads (nor of timm's: biases apart), nor a V2's stream.

    Where a Swin V2's heads differ from block to block, or a RelPos's v is not as wide as its q and k and the stream
    goes, its search for a group does not come to an end. Of a CaiT only neurons: what mixes heads it does not see.
    """
    if family == "cait":
        return not (inside or stream)
    if family == "relpos" and stream and kind in ("widths", "uneven"):
        return False
    if family in ("beit", "relpos"):
        return not inside
    return family != "eva" and not (family == "swinv2" and (inside or stream or kind == "uneven"))


@pytest.mark.parametrize(
    ("family", "kind", "inside", "stream"),
    [(family, *case) for family in FAMILIES for case in BY_TORCH_PRUNING if followed(family, *case)],
)
@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_torch_pruning_cuts_once_more(family: str, kind: str, inside: bool, stream: bool) -> None:
    network, x = compact_of(family, kind)

    def rows(layer: str) -> list[int]:
        return [m.out_features for name, m in network.named_modules() if name.endswith(layer) and "blocks." in name]

    hidden, qkv, before = rows("fc1"), rows("qkv"), sum(p.numel() for p in network.parameters())
    pruned(network, x, inside, stream)
    assert rows("fc1") == [h // 2 for h in hidden]
    assert rows("qkv") == ([n // 2 for n in qkv] if inside else qkv)
    if stream and family != "t2t":  # whose token module stays whole
        assert network.patch_embed.proj.out_channels == network.feature_info[0]["num_chs"] // 2
    assert sum(p.numel() for p in network.parameters()) < before
    logits = network(x)
    assert logits.shape == (len(x), 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
