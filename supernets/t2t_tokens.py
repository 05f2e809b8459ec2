"""T2T-ViT's token module: three soft splits (overlapping unfolds) with a thin attention layer after two of them.

Names and outputs are those of the authors' implementation (Yuan et al., Tokens-to-Token ViT, ICCV 2021, section 3.1).

Shape letters: B images, H and W of an image or grid, N tokens, C channels of an unfolded token,
D token width, M random features, E embedding width.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, maybe_add_mask, resolve_self_attn_mask, to_2tuple
from torch import Tensor, nn

from search_spaces.errors import UserError

# (kernel, stride, padding) of the three soft splits.
SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
REDUCTION = 16  # pixels per token and side, the product of the strides


def token_grids(img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """The (H, W) grids of tokens after each of the three soft splits of an image of img_size pixels.

    Any size of at least 3 pixels a side works, odd ones included. Raises UserError for a smaller one.
    """
    size: tuple[int, int] = to_2tuple(img_size)
    if min(size) < 3:
        raise UserError(f"T2T-ViT: images of {size[0]} x {size[1]} px; the first split needs 3 px a side or more")
    grids = []
    for kernel, stride, padding in SOFT_SPLITS:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
        size = (height, width)
        grids.append(size)
    return grids


def token_macs(
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    token_dim: int = 64,
    tokens_type: str = "performer",
) -> int:
    """Multiply-accumulates of T2TModule.forward_tokens on one image, as executed; `project` is not included.

    Linear layers and matrix products; unfolding, norms, exponentials and softmax count nothing, as in torch's
    FLOP counter, whose count (2 per MAC) this equals exactly. Raises UserError for an unknown tokens_type.
    """
    first, second, _ = (height * width for height, width in token_grids(img_size))
    macs = 0
    for tokens, chans in ((first, in_chans * 7 * 7), (second, token_dim * 3 * 3)):
        macs += tokens * chans * 3 * token_dim  # k, q and v
        macs += tokens * 3 * token_dim**2  # output projection, and an MLP of ratio 1
        if _known(tokens_type) == "performer":
            features = token_dim // 2
            macs += tokens * 2 * token_dim * features  # W k and W q
            macs += tokens * 2 * token_dim * features  # phi(k)^T v and phi(q) (phi(k)^T v)
            macs += tokens * features  # the denominator
        else:
            macs += 2 * tokens**2 * token_dim  # q k^T and its product with v
    return macs


def _known(tokens_type: str) -> str:
    if tokens_type not in ("performer", "transformer"):
        raise UserError(f'T2T-ViT: tokens_type "{tokens_type}"; use performer or transformer')
    return tokens_type


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # the meta device has none


class ScaledAttention(Attention):  # type: ignore[misc]
    """timm's Attention with the scale it stores; timm's own fused path ignores it for head_dim ** -0.5.

    `scale` is a fact of the network, not of the heads that are left: cutting some leaves it as it is.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        return self.attend(*self.split_heads(x), attn_mask=attn_mask, is_causal=is_causal)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, E) -> q, k, v, each (B, heads, N, head_dim)."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """softmax(scale q k^T) v, projected: (B, heads, N, head_dim) each -> (B, N, proj.out_features)."""
        B, _, N, _ = q.shape
        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=self.scale
            )
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = maybe_add_mask(scores, resolve_self_attn_mask(N, scores, attn_mask, is_causal))
            x = self.attn_drop(scores.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        return self.proj_drop(self.proj(self.norm(x)))  # type: ignore[no-any-return]


class TokenAttention(ScaledAttention):
    """One head whose width differs from its input's; v, not the input, skips to the output."""

    def __init__(self, dim: int, token_dim: int) -> None:
        super().__init__(dim, num_heads=1, attn_head_dim=token_dim, dim_out=token_dim)
        self.scale = dim**-0.5  # of the input's width, as the original has it

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        q, k, v = self.split_heads(x)
        return v.squeeze(1) + self.attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)


class TokenTransformer(nn.Module):
    """Pre-norm transformer layer from C to D channels: full attention of one head, then an MLP of ratio 1."""

    def __init__(self, dim: int, token_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TokenPerformer(nn.Module):
    """The same layer with softmax attention replaced by positive random features (Choromanski et al., 2021).

    phi(x) = exp(W x - |x|^2 / 2) / sqrt(M), W (M, D) fixed and orthogonal, M = D / 2. Cost is linear in N.
    drop: dropout after the output projection and after the MLP.
    """

    def __init__(self, dim: int, token_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        num_features = token_dim // 2
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.dp = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim), nn.Dropout(drop)
        )
        # A parameter that is never trained: checkpoints carry it and published parameter counts include it.
        self.w = nn.Parameter(torch.empty(num_features, token_dim), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=math.sqrt(num_features))

    def features(self, x: Tensor) -> Tensor:
        """phi(x): (B, N, D) -> (B, N, M)."""
        half_norm = x.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(F.linear(x, self.w.to(x.dtype)) - half_norm) / math.sqrt(self.w.shape[0])

    def attention(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D); v skips to the output."""
        k, q, v = self.kqv(x).chunk(3, dim=-1)
        # exp(W x) reaches e^(M / 2): it overflows float16, and bfloat16 loses the exponent's first decimals.
        dtype = torch.promote_types(v.dtype, torch.float32)
        with _no_autocast(x.device.type):
            phi_k_BNM, phi_q_BNM = self.features(k.to(dtype)), self.features(q.to(dtype))
            kv_BMD = torch.bmm(phi_k_BNM.transpose(1, 2), v.to(dtype))
            total_BN1 = torch.bmm(phi_q_BNM, phi_k_BNM.sum(dim=1).unsqueeze(-1))
            y_BND = torch.bmm(phi_q_BNM, kv_BMD) / (total_BN1 + 1e-8)
        return v + self.dp(self.proj(y_BND.to(v.dtype)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class T2TModule(nn.Module):
    """Image -> tokens: soft split, attention, soft split, attention, soft split, projection (Yuan et al., section 3.1).

    img_size: pixels, int or (H, W). tokens_type: "performer" or "transformer". drop: dropout inside the Token
    Performer; the Token Transformer has none. grid_size: (H, W) of the tokens; num_patches: their number.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: int = 384,
        token_dim: int = 64,
        tokens_type: str = "performer",
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.set_input_size(img_size)
        self.soft_split0, self.soft_split1, self.soft_split2 = (
            nn.Unfold(kernel, stride=stride, padding=padding) for kernel, stride, padding in SOFT_SPLITS
        )
        self.attention1: nn.Module
        self.attention2: nn.Module
        if _known(tokens_type) == "performer":
            self.attention1 = TokenPerformer(in_chans * 7 * 7, token_dim, drop)
            self.attention2 = TokenPerformer(token_dim * 3 * 3, token_dim, drop)
        else:
            self.attention1 = TokenTransformer(in_chans * 7 * 7, token_dim)
            self.attention2 = TokenTransformer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of another size, in pixels. No parameter depends on it."""
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.grid_size = token_grids(img_size)[-1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Everything before `project`: (B, in_chans, H, W) -> (B, num_patches, 9 D).

        Raises UserError for images of another size than img_size.
        """
        height, width = x.shape[-2:]
        if (height, width) != self.img_size:
            raise UserError(
                f"T2T-ViT: images of {height} x {width} px, but img_size is {self.img_size}; "
                "pass that size to the constructor or to set_input_size"
            )
        first, second, _ = token_grids(self.img_size)
        x = self.attention1(self.soft_split0(x).transpose(1, 2))  # (B, N1, D)
        x = x.transpose(1, 2).reshape(x.shape[0], -1, *first)  # (B, D, H1, W1)
        x = self.attention2(self.soft_split1(x).transpose(1, 2))  # (B, N2, D)
        x = x.transpose(1, 2).reshape(x.shape[0], -1, *second)  # (B, D, H2, W2)
        tokens: Tensor = self.soft_split2(x)
        return tokens.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_patches, E)."""
        return self.project(self.forward_tokens(x))  # type: ignore[no-any-return]
