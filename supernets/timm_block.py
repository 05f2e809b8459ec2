"""timm's transformer block, pre-norm with attention and an MLP or a GLU: its axes, its halves, cut attention."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from timm.layers import GluMlp, RmsNorm
from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.slices import BlockShape, BlockSlice
from supernets.adapter import Adapter, refuse
from supernets.axes import BlockAxes, HalfAxes, HeadWidths, Params, head_widths
from supernets.compact_block import CompactBlock, SkippedBlock, not_scriptable
from supernets.layers import by_width, late_norm, layer_scale, mlp, norm, on_channels
from supernets.rotated import StemLayer, StemNorm, StreamNorm

ATTENTION = HalfAxes(
    axes={
        "norm1.weight": ("S",),
        "norm1.bias": ("S",),
        "attn.qkv.weight": ("3HD", "S"),
        "attn.qkv.bias": ("3HD",),
        "attn.q_norm.weight": ("D",),
        "attn.q_norm.bias": ("D",),
        "attn.k_norm.weight": ("D",),
        "attn.k_norm.bias": ("D",),
        "attn.relative_position_bias_table": (".", "H"),
        "attn.norm.weight": ("HV",),
        "attn.norm.bias": ("HV",),
        "attn.proj.weight": ("S", "HV"),
        "attn.proj.bias": ("S",),
        "ls1.gamma": ("S",),
    },
    outputs=("ls1", "attn.proj"),
    late_norms=("attn.norm",),
    norm="norm1",
)
MLP = HalfAxes(
    axes={
        "norm2.weight": ("S",),
        "norm2.bias": ("S",),
        "mlp.fc1.weight": ("M", "R"),
        "mlp.fc1.bias": ("M",),
        "mlp.fc1_g.weight": ("M", "R"),  # of a SwiGLU
        "mlp.fc1_g.bias": ("M",),
        "mlp.fc1_x.weight": ("M", "R"),
        "mlp.fc1_x.bias": ("M",),
        "mlp.norm.weight": ("M",),
        "mlp.norm.bias": ("M",),
        "mlp.fc2.weight": ("R", "M"),
        "mlp.fc2.bias": ("R",),
        "ls2.gamma": ("R",),
    },
    outputs=("ls2", "mlp.fc2"),
    late_norms=("mlp.norm",),
    norm="norm2",
)
PACKED = {"mlp.fc1.weight": ("2M", "R"), "mlp.fc1.bias": ("2M",)}  # of a GluMlp: what is gated and its gate


def with_packed_gates(axes: HalfAxes, blocks: Iterable[Any]) -> HalfAxes:
    """The axes of an MLP half for blocks that all have, or all have not, both sides of a GLU in one layer."""
    packed = [isinstance(block.mlp, GluMlp) for block in blocks if has_mlp(block)]
    if len(set(packed)) > 1:
        raise UserError("some MLPs are timm's GluMlp and some are not; blocks of one kind are expected")
    return replace(axes, axes=dict(axes.axes) | PACKED) if packed and all(packed) else axes


def with_norms_late(axes: BlockAxes) -> BlockAxes:
    """The axes of blocks whose norms end the halves and are over what these write: x + norm(half(x))."""
    attn, mlp = axes.attn, axes.mlp
    written = {"norm2.weight": ("R",), "norm2.bias": ("R",)}
    return BlockAxes(
        replace(attn, outputs=("norm1", "attn.proj"), late_norms=(*attn.late_norms, "norm1"), norm=None),
        replace(
            mlp,
            axes=dict(mlp.axes) | written,
            outputs=("norm2", "mlp.fc2"),
            late_norms=(*mlp.late_norms, "norm2"),
            norm=None,
        ),
    )


def has_attn(block: nn.Module) -> bool:
    """Whether a block has attention: one of a compact network may lack it."""
    return not isinstance(block, SkippedBlock) and (not isinstance(block, CompactBlock) or block.has_attn)


def has_mlp(block: nn.Module) -> bool:
    """Whether a block has an MLP."""
    return not isinstance(block, SkippedBlock) and (not isinstance(block, CompactBlock) or block.has_mlp)


def heads_of(attn: Any) -> HeadWidths:
    """How many heads attention has and how wide they are, timm's own or that of a compact network.

    Heads whose v are of several widths are refused (`check_compact`).
    """
    found = getattr(attn, "heads", None)
    if not isinstance(found, HeadWidths):
        head_dim = attn.proj.in_features // attn.num_heads
        return HeadWidths(attn.num_heads, head_dim, head_dim)
    return found if isinstance(found.v, int) else replace(found, v=found.v[0])


def shape_of(stage: int, embed_dim: int, block: Any, unit: int = 1) -> BlockShape:
    """The facts of a block from its modules; a missing half has one unit of each kind.

    unit: channels of q and k that go together.
    """
    attn, mlp = has_attn(block), has_mlp(block)
    heads = heads_of(block.attn) if attn else HeadWidths(1, unit, 1)
    assert isinstance(heads.v, int)
    hidden = block.mlp.fc2.in_features if mlp else 1
    return BlockShape(stage, embed_dim, heads.number, heads.qk, hidden, qk_unit=unit, v_dim=heads.v, attn=attn, mlp=mlp)


def check_compact(backbone: nn.Module, block: nn.Module, name: str, stage_width: int) -> None:
    """Refuse a block of a compact network that free widths cannot describe."""
    if isinstance(block, CompactBlock) and (block.stream != stage_width or block.mlp_index is not None):
        raise refuse(
            backbone, f"block {name} on {block.stream} of the stream's {stage_width} channels", "use equal widths"
        )
    if isinstance(block, CompactBlock) and block.has_mlp and block.mlp_stream != block.stream:
        raise refuse(backbone, f"an MLP on {block.mlp_stream} of {block.stream} channels ({name})", "use all of them")
    if has_attn(block):
        v: Any = getattr(getattr(block.attn, "heads", None), "v", 1)
        if not isinstance(v, int) and len(set(v)) > 1:
            raise refuse(backbone, f"heads with several widths of v ({name})", "use equal widths")


class TimmBlockAdapter(Adapter):
    """A family of such blocks; what it says of itself is its attention. Norms stand before the halves or end them."""

    block_axes = BlockAxes(ATTENTION, MLP)
    layer_scales = ("ls1.gamma", "ls2.gamma")  # of both halves, where there are any

    @abstractmethod
    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        """The block's attention on what it reads of its slice, before LayerScale or norm and the residual."""

    def attention_half(self, block: Any, shape: BlockShape, params: Params, kept: BlockSlice, z_S: Tensor) -> Tensor:
        heads, late = head_widths(kept, shape), self.block_axes.attn.norm is None
        y_S = self.attend(block, params, heads, z_S if late else norm(block.norm1, params, "norm1", z_S))
        if late:
            return late_norm(block.norm1, params, "norm1", y_S)
        return layer_scale(params, self.layer_scales[0], y_S)

    def mlp_half(self, block: Any, shape: BlockShape, params: Params, kept: BlockSlice, z_S: Tensor) -> Tensor:
        late = self.block_axes.mlp.norm is None

        def half(h_R: Tensor) -> Tensor:
            y_R = mlp(block.mlp, params, h_R)
            if late:
                return late_norm(block.norm2, params, "norm2", y_R)
            return layer_scale(params, self.layer_scales[1], y_R)

        h_S = z_S if late else norm(block.norm2, params, "norm2", z_S)
        return on_channels(half, h_S, kept.mlp_stream, writes="mlp.fc2.weight" in params)

    def head_parts(self, block: Any) -> dict[str, str]:
        taken: dict[str, str] = {}
        if not isinstance(block.attn.q_norm if hasattr(block.attn, "q_norm") else nn.Identity(), nn.Identity):
            taken["qk"] = "q and k are normalised inside the head (qk_norm)"
        if not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
            taken["v"] = "a norm follows the heads (scale_attn_norm)"
        return taken

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        attn = block.attn
        attn.num_heads, attn.attn_dim, attn.dim = heads.number, heads.v_total, attn.qkv.in_features
        same = heads.qk == heads.v == attn.head_dim and not isinstance(attn, NarrowAttention)
        return attn if same else NarrowAttention(attn, heads)


class NarrowAttention(nn.Module):
    """timm's Attention whose heads are narrower than they were, Q and K, V, or V head by head (2.5, 2.9).

    Norms that the one it is made of has no place for are left out.
    """

    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    proj: Any
    proj_drop: Any
    fused_attn = True

    __prepare_scriptable__ = not_scriptable

    def __init__(self, attn: Any, heads: HeadWidths) -> None:
        """attn: already cut, timm's or one of these, whose parameters and scale are taken over."""
        super().__init__()
        for name, child in attn.named_children():
            setattr(self, name, child)
        for name in ("q_norm", "k_norm", "norm"):
            if not hasattr(self, name):
                setattr(self, name, nn.Identity())
        self.num_heads, self.head_dim, self.scale = heads.number, heads.qk, attn.scale
        self.v_widths = None if isinstance(heads.v, int) else heads.v

    @property
    def heads(self) -> HeadWidths:
        """As the layers are now: a pruner that cuts them sets num_heads and head_dim, as in timm's attention."""
        return HeadWidths(self.num_heads, self.head_dim, self.v_widths or self.proj.in_features // self.num_heads)

    def projected(self, x: Tensor) -> Tensor:
        """(B, N, S) -> q, k and v of all heads (B, N, 2hD + hV)."""
        return self.qkv(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, S) -> (B, N, S). attn_mask, is_causal: as torch's scaled_dot_product_attention takes them."""

        def attend(q: Tensor, k: Tensor, v: Tensor, index: Any) -> Tensor:
            mask = attn_mask
            if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:  # one for every head
                mask = mask[..., index, :, :]
            dropout_p = self.attn_drop.p if self.training else 0.0
            return nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout_p, is_causal=is_causal, scale=self.scale
            )

        def norm_qk(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return self.q_norm(q), self.k_norm(k)

        x = self.norm(by_width(self.projected(x), self.heads, attend, norm_qk))
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


def num_params(module: nn.Module | None, per: int) -> int:
    """Parameters of a module divided by the size of the axis they all share."""
    return 0 if module is None else sum(p.numel() for p in module.parameters()) // per


def check_norm(backbone: nn.Module, module: nn.Module, where: str) -> None:
    """Refuse norms that cannot be taken over a slice of channels."""
    if isinstance(module, StemLayer):
        module = module.get_submodule("norm")
    if not isinstance(module, nn.LayerNorm | RmsNorm | StreamNorm | StemNorm | nn.Identity):
        raise refuse(backbone, f"{where} of type {type(module).__name__}", "use LayerNorm or RmsNorm")
