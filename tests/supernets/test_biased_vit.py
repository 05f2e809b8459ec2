"""Beit and VisionTransformerRelPos as compact networks: timm's function, a bias made once, heads of a shared bias."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice, identity_slice, network_slice
from supernets.biased_vit import CompactBiasedAttention
from supernets.calibration import Wanted, calibrate
from supernets.compact import cut
from supernets.importance import magnitude_scores, orders_of, permute
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet
from tests.oracle import oracle_logits, randomise
from tests.strategies import images
from tests.supernets.test_other_tools import counting

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit", {}),
    "beit, one table": ("beit", dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    "beit, both": ("beit", dict(use_shared_rel_pos_bias=True, qkv_bias=False)),
    "relpos": ("relpos", {}),
    "relpos, tables": ("relpos", dict(rel_pos_type="bias", class_token=True)),
    "relpos, one network": ("relpos", dict(shared_rel_pos=True)),
}
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_own = pytest.mark.parametrize("kind", ["beit", "beit, both", "relpos", "relpos, tables"])
over_shared = pytest.mark.parametrize("kind", ["beit, one table", "beit, both", "relpos, one network"])


def supernet(kind: str, **more: Any) -> Supernet:
    family, options = KINDS[kind]
    return small_supernet(family, **options, **more)


def attentions(compact: nn.Module) -> list[CompactBiasedAttention]:
    return [m for m in compact.modules() if isinstance(m, CompactBiasedAttention)]


@over_kinds
def test_it_is_timms_attention_with_its_gradients(kind: str) -> None:
    net = supernet(kind)
    compact = cut(net.backbone, net.identity()).eval()
    assert len(attentions(compact)) == 3
    x, grads = images(net.backbone), []
    for network in (net.backbone, compact):
        logits = network(x)
        logits.square().sum().backward()
        found = [p.grad for _, p in sorted(network.named_parameters())]
        grads.append([logits.detach(), *(p.new_zeros(()) if p is None else p for p in found)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@over_own
def test_a_bias_of_its_own_is_made_once_and_follows_what_it_is_made_of(kind: str) -> None:
    net = supernet(kind)
    compact: Any = cut(net.backbone, net.identity()).eval()
    x = images(net.backbone)

    def check() -> None:
        expected = compact(x).detach()  # with gradients on, nothing is kept
        with torch.inference_mode():
            torch.testing.assert_close(compact(x), expected, rtol=0, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(compact(x), expected, rtol=0, atol=1e-12)

    check()
    with torch.no_grad(), counting(compact) as calls:
        compact(x)
    assert not any("rel_pos" in name and number for name, number in calls.items() if name.startswith("blocks."))
    compact.load_state_dict({k: v + 0.1 for k, v in compact.state_dict().items()})
    check()
    for p in compact.parameters():
        p.data = p.data * 0.9
    check()
    compact = copy.deepcopy(compact)
    assert all(attn._bias is None for attn in attentions(compact))
    with torch.no_grad():
        for p in compact.parameters():
            p.add_(0.05)
    check()


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore::DeprecationWarning")
def test_a_bias_is_made_anew_by_layers_that_were_quantised_in_place() -> None:
    net = small_supernet("relpos").float()
    compact: Any = cut(net.backbone, net.identity()).eval()
    x = images(net.backbone)
    with torch.no_grad():
        before = compact(x)
        torch.ao.quantization.quantize_dynamic(compact, {nn.Linear}, dtype=torch.qint8, inplace=True)
        fresh = copy.deepcopy(compact)
        assert torch.equal(compact(x), fresh(x)) and not torch.equal(compact(x), before)


def test_a_training_draws_the_dropout_of_positions_each_time() -> None:
    net = small_supernet("relpos")
    compact: Any = cut(net.backbone, net.identity()).eval()
    x = images(net.backbone)
    with torch.no_grad():
        expected = compact(x)
        compact.train()
        assert not torch.equal(compact(x), compact(x))
        assert torch.equal(compact.eval()(x), expected)


@over_kinds
@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
@pytest.mark.parametrize("skipped", [False, True])
def test_it_takes_another_input_size_as_timm_does(kind: str, size: tuple[int, int], skipped: bool) -> None:
    """Cut and then resized it is the resized network cut."""
    family, options = KINDS[kind]
    large = randomise(FAMILIES[family](**options), 0).double().eval()
    shapes = Supernet(large).shapes
    blocks = [replace(identity_slice(s), heads=4, hidden=s.hidden // 2) for s in shapes]
    if skipped:
        blocks[:2] = [replace(blocks[0], attn=False, mlp=False), replace(blocks[1], attn=False)]
    subnet = network_slice(shapes, blocks)
    compact: Any = cut(large, subnet).eval()
    resized: Any = copy.deepcopy(large)
    resized.set_input_size(img_size=size)
    compact.set_input_size(img_size=size)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compact(x), cut(resized, subnet).eval()(x), rtol=1e-9, atol=1e-11)


def heads(net: Supernet, *kept: tuple[int, ...]) -> NetworkSlice:
    blocks = [replace(identity_slice(s), heads=own) for s, own in zip(net.shapes, kept, strict=True)]
    return network_slice(net.shapes, blocks)


@over_kinds
def test_every_head_keeps_its_own_bias_in_a_second_cut_too(kind: str) -> None:
    net = supernet(kind)
    x = images(net.backbone)
    first = heads(net, (1, 2, 4, 5), (0, 3, 5), (0, 1, 2, 3, 4))
    both = heads(net, (1, 4), (5,), (0, 1))
    compact = cut(net.backbone, first)
    again = Supernet(compact).eval()
    inner = heads(again, (0, 2), (2,), (0, 1))
    family, options = KINDS[kind]
    backbone = FAMILIES[family](**options).double()
    backbone.load_state_dict(net.backbone.state_dict())
    expected = oracle_logits(backbone, both, x)
    torch.testing.assert_close(again.small(x, inner), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(cut(compact, inner).eval()(x), expected, rtol=1e-9, atol=1e-11)


@over_shared
def test_heads_of_a_bias_that_all_blocks_read_stay(kind: str) -> None:
    net = supernet(kind)
    x, orders = images(net.backbone), orders_of(magnitude_scores(net), net)
    assert orders.keys() == {"stream.0", *(f"blocks.{i}.hidden" for i in range(3))}
    before = net.large(x)
    permute(net, orders)
    torch.testing.assert_close(net.large(x), before, rtol=1e-9, atol=1e-11)
    with pytest.raises(UserError, match=r"blocks\.1\.heads.*read one bias"):
        permute(net, {"blocks.1.heads": [1, 0, 2, 3, 4, 5]})


@over_shared
def test_what_is_lost_of_heads_that_stay_is_of_the_first(kind: str) -> None:
    net = supernet(kind)
    batches: list[Tensor] = list(images(net.backbone, 24).split(12))
    basis = calibrate(net, batches, Wanted(frozenset({0}), inside=True, error_order=True, gradient_images=12))
    assert not any(name.endswith(".heads") for name in basis.orders)
    for i in range(3):
        lost = basis.lost[f"blocks.{i}.heads"]
        assert lost.shape == (7,) and lost[-1] == 0 and (lost.diff() <= 0).all()


@pytest.mark.slow
@over_kinds
def test_large_and_compact_network_can_be_exported_for_any_batch(kind: str) -> None:
    net = supernet(kind).float()
    x = images(net.backbone, 3)
    for network in (net.backbone, cut(net.backbone, heads(net, (1, 2), (0,), (0, 1, 2))).eval()):
        with torch.no_grad():
            program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},))
            program = program.run_decompositions()
            for batch in (x[:1], x, torch.cat([x, x])):
                torch.testing.assert_close(program.module()(batch), network(batch), rtol=1e-4, atol=1e-5)
