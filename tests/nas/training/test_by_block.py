"""Streams of a small network beside the large one's, held against both computed by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nas.training.by_block import cosine_by_block
from search_spaces.slices import NetworkSlice, identity_slice, network_slice, prefix_slice
from supernets.compact import cut
from supernets.streams import stage_is_centred
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet
from tests.strategies import images

CPU = torch.device("cpu")
over_families = pytest.mark.parametrize("family", FAMILIES)


def by_hand(supernet: Supernet, subnet: NetworkSlice, x: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """(blocks, B): of every image, from the elastic forward's streams, which are as wide as the large network's."""
    after = range(len(supernet.shapes))
    with torch.no_grad():
        pairs = [supernet.small_with_streams(x, kept, after)[1] for kept in (supernet.identity(), subnet)]
    if centred:
        pairs = [{i: z - z.mean(-1, keepdim=True) for i, z in streams.items()} for streams in pairs]
    return torch.stack([F.cosine_similarity(pairs[0][i], pairs[1][i], dim=-1).flatten(1).mean(1) for i in after])


@over_families
def test_images_count_alike_and_the_compact_network_parts_as_its_subnet_does(family: str) -> None:
    supernet = small_supernet(family)
    subnet = network_slice(supernet.shapes, [prefix_slice(shape, 2, "inner") for shape in supernet.shapes])
    x = images(supernet.backbone)
    batches = [(x, x), (x[:1], x[:1])]
    found = cosine_by_block(supernet, subnet, cut(supernet.backbone, subnet), batches, CPU, nullcontext)
    each = by_hand(supernet, subnet, x)
    assert found["subnet"] == pytest.approx(torch.cat([each, each[:, :1]], dim=1).mean(1).tolist(), abs=1e-5)
    assert found["compact"] == pytest.approx(found["subnet"], abs=1e-5) and max(found["subnet"]) < 0.999


@over_families
def test_a_basis_changes_nothing_but_that_the_mean_which_nothing_reads_is_left_out(family: str) -> None:
    """The second block is skipped whole, which is the same in every basis."""
    plain, rotated = small_supernet(family), small_supernet(family, basis="rotated")
    slices = [identity_slice(shape) for shape in plain.shapes]
    slices[1] = replace(slices[1], attn=False, mlp=False)
    subnet, x = network_slice(plain.shapes, slices), images(plain.backbone)
    compact = cut(rotated.backbone, subnet)
    found = cosine_by_block(rotated, subnet, compact, [(x, x)], CPU, nullcontext)
    centred = stage_is_centred(rotated.adapter, 0) and rotated.adapter.streams.get(0) is not None
    expected = by_hand(plain, subnet, x, centred).mean(1)
    assert found["subnet"][:2] == pytest.approx(expected[:2].tolist(), abs=1e-4)  # of one stage
    assert found["compact"] == pytest.approx(found["subnet"], abs=1e-5)
    assert found["subnet"][0] == pytest.approx(1, abs=1e-6) and found["subnet"][1] < 0.9999
