"""ViT, DeiT and Swin of Hugging Face Transformers under timm's names: renamed, and q, k and v made one qkv."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Of its files and, where they differ, of its modules from version 5 on; first what stands before, then layer by layer.
RENAMED = (
    (r"^(\w+\.)+?(?=(embeddings|encoder|layers|layernorm|pooler|(cls_|distillation_)?classifier)\.)", ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^(encoder\.layer|layers)\.(\d+)\.(?!blocks|downsample)", r"blocks.\2."),
    (r"\.attention\.(attention|self)\.(query|key|value)\.", r".attn.\2."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(self|relative_position_bias)\.(relative_position_\w+)$", r".attn.\2"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
PARTS = ("query", "key", "value")


def of_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has these names."""
    return any(re.search(r"attention\.(attention\.query|self\.query|q_proj)\.weight$", name) for name in state)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as timm names it, but for a Swin's merging, at the end of its stage: timm's filter moves it."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("pooler.") and name != "mask_token":  # of its pretraining; no classifier reads them
            renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in PARTS]
        if all(part in renamed for part in parts):
            renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed
