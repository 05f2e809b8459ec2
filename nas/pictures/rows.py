"""An architecture as rows: what each of its blocks keeps and costs, beside its backbone. Reads no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.pictures.architecture import Row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from search_spaces.architecture import Architecture
    from search_spaces.slices import BlockShape, BlockSlice


def rows_of(arch: Architecture) -> list[Row]:
    """The rows of an architecture; their FLOPs add up to the network's. UserError when it does not fit its backbone."""
    from nas.networks.architecture import slices_of
    from nas.networks.backbone import TimmModel
    from nas.networks.basis_file import streams_of
    from nas.networks.opening import meta_supernet
    from search_spaces.registry import METHODS, get_space
    from search_spaces.slices import identity_slice
    from supernets.basis import install_stages
    from supernets.flops import block_flops, whole_stages

    supernet = meta_supernet(TimmModel(arch.model, arch.model_kwargs), arch.num_classes, get_space(arch.space))
    install_stages(supernet, streams_of(arch.basis))
    subnet, costs = slices_of(arch, supernet.shapes), supernet.adapter.costs
    names = METHODS[arch.method].choice_names
    rows = []
    for i, (shape, cost, kept) in enumerate(zip(supernet.shapes, costs.blocks, subnet.blocks, strict=True)):
        choices = {name: arch.blocks[i][name] for name in names}
        flops = block_flops(shape, cost, kept), block_flops(shape, cost, identity_slice(shape))
        rows.append(_block_row(i, shape, kept, choices, flops))
    full = supernet.identity().stage_widths
    per, widths = costs.flops, (subnet.stage_widths, full)

    def part(name: str, at: Any) -> None:
        rows.append(Row(name, (at(widths[0]), at(widths[1]))))

    part("stem", lambda w: per.constant + per.first * w[0])
    if 0 in costs.streams.keys() - whole_stages(supernet.shapes, subnet):  # a layer follows it (section 2.7)
        whole, layer = rows[-1].flops[1], costs.streams[0].flops
        rows[-1] = Row("stem", (rows[-1].flops[0] + layer[0] + layer[1] * subnet.stage_widths[0], whole))
    for s, (pair, single) in enumerate(zip(per.merge_pair, per.merge_in, strict=True)):
        part(f"merging {s + 1}", lambda w, s=s, pair=pair, single=single: w[s] * (pair * w[s + 1] + single))
    part("classifier" if arch.num_classes else "features", lambda w: per.last * w[-1])
    rows[-1] = Row(rows[-1].name, (rows[-1].flops[0], rows[-1].flops[1] - costs.spared[0]))
    return rows


def _block_row(
    i: int, shape: BlockShape, kept: BlockSlice, choices: Mapping[str, float], flops: tuple[int, int]
) -> Row:
    from search_spaces.slices import count
    from supernets.axes import head_widths

    heads, d = head_widths(kept, shape), shape.head_dim
    return Row(
        name=f"block {i}",
        flops=flops,
        block=i,
        choices=choices,
        stream=(kept.stream if kept.attn or kept.mlp else 0, shape.embed_dim),
        heads=(heads.number if kept.attn else 0, shape.num_heads),
        qk=(heads.qk if kept.attn else 0, d),
        v=(heads.v_total // heads.number if kept.attn else 0, d),
        value_channels=(heads.v_total if kept.attn else 0, shape.num_heads * d),
        mlp_channels=(kept.num_mlp_stream() if kept.mlp else 0, shape.embed_dim),
        neurons=(count(kept.hidden) if kept.mlp else 0, shape.hidden),
    )
