"""timm's attention pooling (SigLIP, Perception Encoder), which reads a narrowed stream and stays whole inside.

Only its keys and values read the stream, through the norm before it: of their layer the columns of the kept channels
are left. What it gives is as wide as the network was, whatever the slice, and so are the classifier and the features.
"""

from typing import Any

import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.func import functional_call

from search_spaces.errors import UserError
from supernets.adapter import refuse
from supernets.axes import Params
from supernets.flops import PerWidth


class LatentPool(AttentionPoolLatent):  # type: ignore[misc]
    """timm's, whose heads need not be as wide together as the tokens that it reads; the query is made once a batch.

    Names are timm's, and so are numbers, to float rounding.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, S) -> (B, E). attn_mask: as torch's scaled_dot_product_attention takes it."""
        B, N, H, D = *x.shape[:2], self.num_heads, self.head_dim
        q = self.q(self.latent).expand(B, -1, -1).unflatten(-1, (H, D)).transpose(1, 2)  # (B, H, latents, D)
        k, v = self.kv(x).reshape(B, N, 2, H, D).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x.mean(1) if self.pool == "avg" else x[:, 0]


def adopt(backbone: Any, name: str) -> LatentPool | None:
    """A network's attention pooling as one that can read less, in place; None where it has none.

    UserError for a kind that is not supported.
    """
    pool = getattr(backbone, name, None)
    if pool is None:
        return None
    if type(pool) is AttentionPoolLatent:
        pool.__class__ = LatentPool
    if type(pool) is not LatentPool:
        raise _refused(backbone, f"attention pooling ({type(pool).__name__})")
    if pool.pos_embed is not None:
        raise _refused(backbone, "attention pooling with positions of its own (pos_embed)")
    if pool.pool not in ("token", "avg"):
        raise _refused(backbone, "attention pooling that leaves several tokens (pool_type)")
    return pool


def _refused(backbone: nn.Module, feature: str) -> UserError:
    return refuse(backbone, feature, "use global_pool=map, avg or token")


def pooled(pool: LatentPool, params: Params, name: str, x_BNS: Tensor) -> Tensor:
    """Attention pooling on the parameters `name.*` of a slice: (B, N, S) -> (B, E)."""
    own = {leaf: params[f"{name}.{leaf}"] for leaf, _ in pool.named_parameters()}
    return functional_call(pool, own, (x_BNS,))  # type: ignore[no-any-return]


def pool_flops(pool: LatentPool, tokens: int) -> PerWidth:
    """MACs over so many tokens of an image, by the width of the stream that it reads."""
    inner = pool.num_heads * pool.head_dim
    layers = [pool.q, pool.proj, *([] if pool.mlp is None else [pool.mlp.fc1, pool.mlp.fc2])]
    of_latent = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    return PerWidth(pool.latent_len * (of_latent + 2 * tokens * inner), first=0, last=tokens * 2 * inner)


def pool_params(pool: LatentPool) -> PerWidth:
    """Parameters, by the width of the stream that it reads."""
    whole = sum(p.numel() for p in pool.parameters()) - pool.kv.weight.numel()
    return PerWidth(whole, first=0, last=pool.kv.out_features)
