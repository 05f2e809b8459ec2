"""The oracle of invariant 0: what a subnet must compute, said by timm and not by our slicing code.

The subnet's logits are timm's own forward on a copy of the backbone whose unkept weights are zero and whose
norms see the kept channels only. Which weights are kept follows from timm's reshapes: a fused qkv weight is
(3, H, d, E), a patch merging reads (4, C), a relative position table has one column per head. Nothing here
may import from supernets/; that independence is the whole worth of it.

The mutants at the end are wrong slices that have been written before, by us and by others. Each returns the
logits that such code would give, so that a test can show the oracle tells them apart.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.func import functional_call

from search_spaces.slices import BlockSlice, Kept, NetworkSlice, count

LAYER_NORMS = (nn.LayerNorm, timm.layers.LayerNorm)
RMS_NORMS = (timm.layers.RmsNorm,)
# Blocks whose norms stand after the halves, but for Swin V2's.
LATE = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock", "CompactLateBlock")


class KeptNorm(nn.Module):
    """LayerNorm or RmsNorm over the kept channels of (..., C) alone; the other channels come out as 0."""

    kept: Tensor  # (C,) bool

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        if type(norm) not in LAYER_NORMS + RMS_NORMS:
            raise TypeError(f"the oracle knows LayerNorm and RmsNorm, not {type(norm).__name__}")
        self.centred = type(norm) in LAYER_NORMS
        self.eps: float = norm.eps
        self.weight: nn.Parameter | None = norm.weight
        self.bias: nn.Parameter | None = getattr(norm, "bias", None)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        size = int(self.kept.sum())
        if size == 0:
            return torch.zeros_like(x)
        x = self.normalised(torch.where(self.kept, x, 0), size)
        x = x if self.weight is None else x * self.weight
        x = x if self.bias is None else x + self.bias
        return torch.where(self.kept, x, 0)

    def normalised(self, x: Tensor, size: int) -> Tensor:
        """x, 0 where nothing is kept, before the affine. size: channels that are kept."""
        if self.centred:
            x = torch.where(self.kept, x - x.sum(-1, keepdim=True) / size, 0)
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / size + self.eps)


class RotatedNorm(KeptNorm):
    """A norm of a rotated stream (section 2.7) over its kept channels alone; the other channels come out as 0.

    Of E channels w are kept: y = x * sqrt(E / w) / sqrt(sum(x^2) / w + eps), and a LayerNorm takes the mean over
    tokens, which are one or the four of a merging, from channel 0, and so leaves none of it where there is one.
    """

    def __init__(self, norm: Any, kept: Tensor, tokens: int) -> None:
        super().__init__(norm, kept)
        self.tokens = tokens

    def normalised(self, x: Tensor, size: int) -> Tensor:
        if self.centred:
            x = x.unflatten(-1, (self.tokens, -1)).clone()
            x[..., 0] -= x[..., 0].mean(-1, keepdim=True)
            x = x.flatten(-2)
        rms = torch.sqrt(x.square().sum(-1, keepdim=True) / size + self.eps)
        return x * (len(self.kept) / size) ** 0.5 / rms


class Rotated(nn.Module):
    """x -> Q x, (..., E), of which the kept channels are there; the others come out as 0."""

    rows: Tensor  # (E, E)

    def __init__(self, rotation: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", torch.where(kept[:, None], rotation, 0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rows.T


def among(kept: Kept, size: int) -> Tensor:
    """(size,) bool, True where kept. IndexError when something outside is kept."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(range(kept)) if isinstance(kept, int) else list(kept)] = True
    return mask


def blocks_of(backbone: Any) -> list[tuple[int, str, Any]]:
    """(stage, module name, block) of every transformer block, in the order of the forward pass."""
    if hasattr(backbone, "layers"):  # Swin
        return [
            (stage, f"layers.{stage}.blocks.{i}", block)
            for stage, layer in enumerate(backbone.layers)
            for i, block in enumerate(layer.blocks)
        ]
    return [(0, f"blocks.{i}", block) for i, block in enumerate(backbone.blocks)]


def there(module: Any, *names: str) -> list[str]:
    """Those of a module's layers that it has."""
    return [name for name in names if getattr(module, name, None) is not None]


def embed_dim_of(block: Any) -> int:
    """E, the width of the stream that a block writes."""
    return block.attn.proj.out_features  # type: ignore[no-any-return]


def norms_late(block: Any) -> bool:
    """Whether norms stand after the halves, as in Swin V2: x + norm1(attn(x))."""
    return hasattr(getattr(block, "attn", None), "cpb_mlp") or type(block).__name__ in LATE


def turning_pairs(backbone: Any) -> str:
    """How the two channels of q and k that a rotary embedding turns together stand: "half" a head apart, or "next"."""
    if getattr(backbone, "rope", None) is None:
        return ""
    return "half" if backbone.blocks[0].attn.rotate_half else "next"


def among_pairs(width: int, head_dim: int, how: str) -> Tensor:
    """(head_dim,) bool: the channels of q and k that a head of `width` keeps.

    timm turns pair p of a head by one of its angles: all angles of one axis of the image, from the fastest, then those
    of the other. Kept are pairs that lie apart: first those of even number, of them first the even ones, and so on.
    """
    if not how:
        return among(width, head_dim)

    def apart(pairs: list[int]) -> list[int]:
        return pairs if len(pairs) < 2 else apart(pairs[::2]) + apart(pairs[1::2])

    kept = among(tuple(sorted(apart(list(range(head_dim // 2)))[: width // 2])), head_dim // 2)
    return kept.repeat(2) if how == "half" else kept.repeat_interleave(2)


def readers_of(backbone: Any) -> Iterator[tuple[int, str, list[str], bool]]:
    """(stage, norm, the linear layers after it, whether tokens of zeros come in between) of all that reads a stream."""
    swin = hasattr(backbone, "layers")
    for stage, name, block in blocks_of(backbone):
        sizes = zip(block.input_resolution, block.window_size, strict=True) if swin else ()
        attn = [f"{name}.attn.{key}" for key in there(block.attn, "qkv", "q_proj", "k_proj", "v_proj")]
        yield stage, f"{name}.norm1", attn, any(size % window for size, window in sizes)
        yield stage, f"{name}.norm2", [f"{name}.mlp.{key}" for key in there(block.mlp, "fc1", "fc1_g", "fc1_x")], False
    if swin:
        for stage in range(1, len(backbone.layers)):
            merging = f"layers.{stage}.downsample"
            yield stage - 1, f"{merging}.norm", [f"{merging}.reduction"], False
        yield len(backbone.layers) - 1, "norm", ["head.fc"], False
    else:
        last = "norm" if not isinstance(backbone.norm, nn.Identity) else "fc_norm"
        heads = [name for name in ("head", "head_dist") if isinstance(getattr(backbone, name, None), nn.Linear)]
        heads = heads if getattr(backbone, "attn_pool", None) is None else ["attn_pool.kv"]
        for i, _ in enumerate(getattr(backbone, "blocks_token_only", ())):  # CaiT's class attention
            name = f"blocks_token_only.{i}"
            yield 0, f"{name}.norm1", [f"{name}.attn.{key}" for key in ("q", "k", "v")], False
            yield 0, f"{name}.norm2", [f"{name}.mlp.fc1"], False
        yield 0, last, heads, False


@dataclass
class KeptWeights:
    """Which weights a subnet keeps: a bool mask per parameter name, and per norm's name its kept channels."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str, linear: Any, outputs: Tensor, inputs: Tensor) -> None:
        """A linear layer (out, in) or a patch convolution (out, in, k, k)."""
        if isinstance(linear, nn.Identity) or linear is None:
            return
        mask = outputs[:, None] & inputs
        extra = linear.weight.ndim - mask.ndim
        self.tensors[f"{name}.weight"] = mask.reshape(*mask.shape, *[1] * extra).expand_as(linear.weight)
        if linear.bias is not None:
            self.tensors[f"{name}.bias"] = outputs

    def norm(self, name: str, norm: Any, kept: Tensor) -> None:
        """A norm whose statistics are taken over the kept channels."""
        if isinstance(norm, nn.Identity) or norm is None:
            return
        self.norms[name] = kept
        self.scale(name, norm, kept)

    def scale(self, name: str, module: Any, kept: Tensor) -> None:
        """A module whose parameters have one entry per channel: LayerScale, a norm's weight and bias."""
        if module is not None:
            self.tensors.update({f"{name}.{key}": kept for key, _ in module.named_parameters()})

    def last_axis(self, name: str, tensor: Tensor | None, kept: Tensor) -> None:
        """A bare parameter, masked along its last axis: tokens, position embedding, relative table."""
        if tensor is not None:
            self.tensors[name] = kept.expand_as(tensor)

    def block(self, name: str, block: Any, kept: BlockSlice, turning: str = "") -> None:
        """norm1, attention, norm2 and MLP of one block; a skipped half keeps nothing. turning: of its q and k."""
        attn, mlp = block.attn, block.mlp
        embed_dim, num_heads = embed_dim_of(block), attn.num_heads
        head_dim = attn.proj.in_features // num_heads

        stream = among(kept.stream if kept.attn else 0, embed_dim)
        heads = among(kept.heads if kept.attn else 0, num_heads)
        qk_D = among_pairs((head_dim if kept.qk is None else kept.qk) if kept.attn else 0, head_dim, turning)
        qk_HD = heads[:, None] & qk_D
        v_HD = heads[:, None].repeat(1, head_dim)
        if kept.attn and isinstance(kept.v_channels, int):
            v_HD &= among(kept.v_channels, head_dim)
        elif kept.attn and kept.v_channels is not None:
            for head, channels in zip(heads.nonzero().flatten(), kept.v_channels, strict=True):
                v_HD[head] = among(channels, head_dim)
        v = v_HD.flatten()  # timm: x.transpose(1, 2).reshape(B, N, H * d)
        qkv = torch.stack([qk_HD, qk_HD, v_HD]).flatten()  # timm: qkv(x).reshape(B, N, 3, H, d)

        self.norm(f"{name}.norm1", block.norm1, stream)
        self.linear(f"{name}.attn.qkv", attn.qkv, qkv, stream)
        for key, rows in (("q", qk_HD.flatten()), ("k", qk_HD.flatten()), ("v", v)):  # Eva's
            self.linear(f"{name}.attn.{key}_proj", getattr(attn, f"{key}_proj", None), rows, stream)
            if isinstance(getattr(attn, f"{key}_bias", None), nn.Parameter):
                self.tensors[f"{name}.attn.{key}_bias"] = rows
        for key in ("q_norm", "k_norm"):  # over one head's d channels
            self.norm(f"{name}.attn.{key}", getattr(attn, key, None), qk_D)
        table = getattr(attn, "relative_position_bias_table", None)  # (number of offsets, H)
        self.last_axis(f"{name}.attn.relative_position_bias_table", table, heads)
        self.positions(f"{name}.attn", attn, heads)
        for key in there(attn, "proj_l", "proj_w"):  # CaiT's, which mix heads
            self.linear(f"{name}.attn.{key}", getattr(attn, key), heads, heads)
        self.norm(f"{name}.attn.norm", getattr(attn, "norm", None), v)
        self.linear(f"{name}.attn.proj", attn.proj, stream, v)
        self.scale(f"{name}.ls1", getattr(block, "ls1", None), stream)
        self.last_axis(f"{name}.gamma_1", getattr(block, "gamma_1", None), stream)

        stream = among(kept.stream if kept.mlp else 0, embed_dim)
        selected = stream if kept.mlp_stream is None else stream & among(kept.mlp_stream, embed_dim)
        hidden = among(kept.hidden if kept.mlp else 0, mlp.fc2.in_features)
        self.norm(f"{name}.norm2", block.norm2, selected if norms_late(block) else stream)
        for key in there(mlp, "fc1", "fc1_g", "fc1_x"):
            layer = getattr(mlp, key)
            sides = layer.out_features // mlp.fc2.in_features  # timm's GluMlp: fc1(x).chunk(2, dim=-1)
            self.linear(f"{name}.mlp.{key}", layer, hidden.repeat(sides), selected)
        self.norm(f"{name}.mlp.norm", getattr(mlp, "norm", None), hidden)
        self.linear(f"{name}.mlp.fc2", mlp.fc2, selected, hidden)
        self.scale(f"{name}.ls2", getattr(block, "ls2", None), selected)
        self.last_axis(f"{name}.gamma_2", getattr(block, "gamma_2", None), selected)

    def positions(self, name: str, attn: Any, heads: Tensor) -> None:
        """Swin V2's: a factor of each head's cosines, and the network whose outputs are each head's biases.

        And those of a VisionTransformerRelPos: such a network, or a table (number of offsets, H).
        """
        rel_pos: Any = getattr(attn, "rel_pos", None)
        for key, tensor in [] if rel_pos is None else rel_pos.named_parameters():
            by_head = heads[:, None] if key == "mlp.fc2.weight" else heads  # timm: mlp(offsets, 2) -> (offsets, H)
            kept = torch.ones_like(tensor, dtype=torch.bool) if key.startswith("mlp.fc1.") else by_head
            self.tensors[f"{name}.rel_pos.{key}"] = kept.expand_as(tensor)
        if not hasattr(attn, "cpb_mlp"):
            return
        for key, tensor in attn.cpb_mlp.named_parameters():
            self.tensors[f"{name}.cpb_mlp.{key}"] = torch.ones_like(tensor, dtype=torch.bool)
        self.tensors[f"{name}.cpb_mlp.2.weight"] = heads[:, None].expand_as(attn.cpb_mlp[2].weight)
        self.tensors[f"{name}.logit_scale"] = heads[:, None, None]

    def frequencies(self, backbone: Any, subnet: NetworkSlice) -> None:
        """A mixed rotary embedding's, (2, blocks, heads, pairs): of the pairs and heads that each block keeps."""
        _, _, num_heads, pairs = backbone.rope.freqs.shape
        kept = torch.zeros(backbone.rope.freqs.shape, dtype=torch.bool)
        for i, block in enumerate(subnet.blocks):
            if block.attn:
                turned = among_pairs(2 * pairs if block.qk is None else block.qk, 2 * pairs, "next")[::2]
                kept[:, i] = among(block.heads, num_heads)[:, None] & turned
        self.tensors["rope.freqs"] = kept

    def stem(self, backbone: Any, width: Tensor) -> None:
        """Patch embedding (or T2T's last projection), tokens, position embedding, the norm before block 0."""
        if hasattr(backbone, "tokens_to_token"):  # T2T: what comes before the projection is not sliced
            t2t = backbone.tokens_to_token
            for key, tensor in t2t.named_parameters():
                self.tensors[f"tokens_to_token.{key}"] = torch.ones_like(tensor, dtype=torch.bool)
            every = among(t2t.project.in_features, t2t.project.in_features)
            self.linear("tokens_to_token.project", t2t.project, width, every)
        else:
            proj = backbone.patch_embed.proj
            self.linear("patch_embed.proj", proj, width, among(proj.in_channels, proj.in_channels))
            self.norm("patch_embed.norm", backbone.patch_embed.norm, width)
        for key in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            self.last_axis(key, getattr(backbone, key, None), width)
        self.norm("norm_pre", getattr(backbone, "norm_pre", None), width)
        for key, tensor in backbone.named_parameters():  # a bias that all blocks read is cut by none
            if key.startswith(("rel_pos_bias.", "shared_rel_pos.")):
                self.tensors[key] = torch.ones_like(tensor, dtype=torch.bool)

    def merging(self, name: str, merging: Any, before: Tensor, after: Tensor) -> None:
        """timm: x.reshape(B, H/2, 2, W/2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3), so (quadrant 4, C)."""
        quadrants = before.expand(4, -1).flatten()
        self.norm(f"{name}.norm", merging.norm, after if len(after) == len(merging.norm.weight) else quadrants)
        self.linear(f"{name}.reduction", merging.reduction, after, quadrants)

    def class_attention(self, backbone: Any, width: Tensor) -> None:
        """CaiT's blocks of the class token: they read and write the stream, all inside is whole."""
        for i, block in enumerate(getattr(backbone, "blocks_token_only", ())):
            name, attn, mlp = f"blocks_token_only.{i}", block.attn, block.mlp
            every, hidden = (among(n, n) for n in (attn.proj.in_features, mlp.fc2.in_features))
            for key in ("norm1", "norm2"):
                self.norm(f"{name}.{key}", getattr(block, key), width)
                self.last_axis(f"{name}.gamma_{key[-1]}", getattr(block, f"gamma_{key[-1]}"), width)
            for key in ("q", "k", "v"):
                self.linear(f"{name}.attn.{key}", getattr(attn, key), every, width)
            self.linear(f"{name}.attn.proj", attn.proj, width, every)
            self.linear(f"{name}.mlp.fc1", mlp.fc1, hidden, width)
            self.linear(f"{name}.mlp.fc2", mlp.fc2, width, hidden)

    def classifier(self, backbone: Any, width: Tensor) -> None:
        """Final norm and every classifier head."""
        self.norm("norm", backbone.norm, width)
        self.class_attention(backbone, width)
        if getattr(backbone, "attn_pool", None) is not None:  # its keys and values read the stream, all else is whole
            kv = backbone.attn_pool.kv
            self.linear("attn_pool.kv", kv, among(kv.out_features, kv.out_features), width)
            for key, tensor in backbone.named_parameters():
                if key.startswith(("attn_pool.", "fc_norm.", "head.")):
                    self.tensors.setdefault(key, torch.ones_like(tensor, dtype=torch.bool))
            return
        self.norm("fc_norm", getattr(backbone, "fc_norm", None), width)
        swin = hasattr(backbone, "layers")
        for name in ("head.fc",) if swin else ("head", "head_dist"):
            head = backbone.head.fc if swin else getattr(backbone, name, None)
            if isinstance(head, nn.Linear):
                self.linear(name, head, among(head.out_features, head.out_features), width)


def kept_weights(backbone: nn.Module, subnet: NetworkSlice) -> KeptWeights:
    """The masks of a subnet over a timm ViT, distilled DeiT, Swin, Eva or CaiT, or a T2T-ViT.

    Where an MLP reads only some channels (mlp_stream), norm2 still keeps a weight for every channel that it
    normalises over. Raises ValueError when the subnet is not one of this backbone, and TypeError when the
    backbone has a parameter the oracle knows nothing about: it never passes one through unsliced.
    """
    blocks = blocks_of(backbone)
    if len(blocks) != len(subnet.blocks) or len(subnet.stage_widths) != blocks[-1][0] + 1:
        raise ValueError(f"{len(subnet.blocks)} slices for {len(blocks)} blocks")
    embed_dims = {stage: embed_dim_of(block) for stage, _, block in blocks}
    widths = [among(width, embed_dims[stage]) for stage, width in enumerate(subnet.stage_widths)]

    weights = KeptWeights()
    weights.stem(backbone, widths[0])
    for (stage, name, block), kept in zip(blocks, subnet.blocks, strict=True):
        if kept.stream > subnet.stage_widths[stage]:
            raise ValueError(f"{name} uses {kept.stream} channels, its stage has {subnet.stage_widths[stage]}")
        weights.block(name, block, kept, turning_pairs(backbone))
    for stage in range(1, len(widths)):
        name = f"layers.{stage}.downsample"
        weights.merging(name, backbone.get_submodule(name), widths[stage - 1], widths[stage])
    weights.classifier(backbone, widths[-1])
    if getattr(backbone, "rope_mixed", False):
        weights.frequencies(backbone, subnet)

    unknown = {name for name, _ in backbone.named_parameters()} - weights.tensors.keys()
    if unknown:
        raise TypeError(f"the oracle does not know {', '.join(sorted(unknown))}")
    return weights


def oracle_logits(
    backbone: nn.Module, subnet: NetworkSlice, x: Tensor, rotations: Mapping[int, Tensor] | None = None
) -> Tensor:
    """The subnet's logits (B, classes) on images (B, C, H, W), in eval mode.

    Gradients flow into the backbone's own parameters, and are zero wherever nothing is kept.
    rotations: stage -> (E, E), of streams in a rotated basis (section 2.7); the backbone is timm's own, with the
    rewritten network's parameters under their names.
    """
    weights = kept_weights(backbone, subnet)
    sliced: Any = deepcopy(backbone).eval()
    whole = dict(chain(backbone.named_parameters(), backbone.named_buffers()))
    tensors = {
        name: torch.where(kept.to(whole[name].device), whole[name], 0)
        for name, kept in weights.tensors.items()
        if name in whole
    }
    if rotations:
        _rotated_norms(sliced, weights, rotations)
    if rotations and 0 in rotations:
        _rotated_stem(sliced, weights, tensors, whole, rotations[0])
    for name, kept in weights.norms.items():
        sliced.set_submodule(name, KeptNorm(sliced.get_submodule(name), kept.to(x.device)))
    logits: Tensor = functional_call(sliced, tensors, (x,))
    return logits


def _rotated_norms(sliced: Any, weights: KeptWeights, rotations: Mapping[int, Tensor]) -> None:
    """The norms of rotated streams."""
    for stage, name, _, _ in readers_of(sliced):
        if stage in rotations:
            kept = weights.norms.pop(name)
            norm = RotatedNorm(sliced.get_submodule(name), kept, len(kept) // len(rotations[stage]))
            sliced.set_submodule(name, norm)


def _rotated_stem(
    sliced: Any, weights: KeptWeights, tensors: dict[str, Tensor], whole: dict[str, Tensor], rotation: Tensor
) -> None:
    """Where a norm's output is the stream, nothing before it is cut, and the rotation follows it."""
    stem = next((name for name in ("norm_pre", "patch_embed.norm") if name in weights.norms), None)
    if stem is None:
        return
    kept, norm = weights.norms[stem], sliced.get_submodule(stem)
    tokens = ("cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.") if stem == "norm_pre" else ()
    for name in tensors:
        if name.startswith(("patch_embed.", *tokens)):
            tensors[name] = whole[name]
            weights.norms.pop(name.rpartition(".")[0], None)
    sliced.set_submodule(stem, nn.Sequential(norm, Rotated(rotation, kept)))
    tensors |= {f"{stem}.0.{key}": tensors.pop(f"{stem}.{key}") for key, _ in norm.named_parameters()}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter normal noise, in place, so that no slice of anything is trivially 0 or 1.

    Matrices are scaled by 1/sqrt(inputs), scales lie around 1, so that activations stay of order one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if p.ndim == 1:
                p.copy_(0.5 * noise if name.endswith("bias") else 1 + 0.5 * noise)
            elif name.endswith("weight"):
                p.copy_(noise / p[0].numel() ** 0.5)
            else:  # tokens, position embedding, relative position table
                p.copy_(noise)
    return model


def qkv_first_rows(backbone: nn.Module, subnet: NetworkSlice, x: Tensor) -> Tensor:
    """Mutant: the first 3*h*d rows of the fused qkv, where h heads of each of q, k and v are meant."""
    wrong = deepcopy(backbone)
    with torch.no_grad():
        for (_, _, block), kept in zip(blocks_of(wrong), subnet.blocks, strict=True):
            num_heads, heads = block.attn.num_heads, among(kept.heads, block.attn.num_heads)
            for p in block.attn.qkv.parameters():  # (3 * H * d, E) and (3 * H * d,)
                by_head = p.view(3, num_heads, len(p) // (3 * num_heads), -1)
                by_head[:, heads] = by_head.flatten(0, 1)[: 3 * count(kept.heads)].unflatten(0, (3, -1)).clone()
    return oracle_logits(wrong, subnet, x)


def merging_first_columns(backbone: nn.Module, subnet: NetworkSlice, x: Tensor) -> Tensor:
    """Mutant: the first 4*c columns of a patch merging's reduction, where c of each quadrant are meant."""
    return _merging_first(backbone, subnet, x, "reduction")


def merging_first_scales(backbone: nn.Module, subnet: NetworkSlice, x: Tensor) -> Tensor:
    """Mutant: the same mistake in the merging's norm, its weight and its bias."""
    return _merging_first(backbone, subnet, x, "norm")


def _merging_first(backbone: nn.Module, subnet: NetworkSlice, x: Tensor, part: str) -> Tensor:
    wrong = deepcopy(backbone)
    with torch.no_grad():
        for stage, width in enumerate(subnet.stage_widths[:-1], start=1):
            for p in wrong.get_submodule(f"layers.{stage}.downsample.{part}").parameters():
                quadrants = p.view(-1, 4, p.shape[-1] // 4)
                quadrants[..., :width] = quadrants.flatten(1)[:, : 4 * width].clone().view(-1, 4, width)
    return oracle_logits(wrong, subnet, x)


def relative_table_last_heads(backbone: nn.Module, subnet: NetworkSlice, x: Tensor) -> Tensor:
    """Mutant: the relative position table's last h columns, where those of the kept heads are meant."""
    wrong = deepcopy(backbone)
    with torch.no_grad():
        for (_, _, block), kept in zip(blocks_of(wrong), subnet.blocks, strict=True):
            table = block.attn.relative_position_bias_table  # (number of offsets, H)
            table[:, among(kept.heads, table.shape[1])] = table[:, -count(kept.heads) :].clone()
    return oracle_logits(wrong, subnet, x)


Mutant = Callable[[nn.Module, NetworkSlice, Tensor], Tensor]
VIT_MUTANTS: tuple[Mutant, ...] = (qkv_first_rows,)
SWIN_MUTANTS: tuple[Mutant, ...] = (
    qkv_first_rows,
    merging_first_columns,
    merging_first_scales,
    relative_table_last_heads,
)
