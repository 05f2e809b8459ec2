"""The adjoined loss: cross-entropy of the large network plus KL(p || q), equations (3.4) and (3.7)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """-y log p, mean over the batch. target: labels (B,), or soft targets (B, classes) under mixup."""
    if target.dim() == 2:
        return -(target * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def projected(features: Tensor, directions: Tensor) -> Tensor:
    """<f, e>, mean over the batch: the loss of a network without classifier that has no labels (section 2.10)."""
    return (features.float() * directions).sum(dim=-1).mean()


def kl_divergence(p_logits: Tensor, q_logits: Tensor, detach_teacher: bool = False) -> Tensor:
    """KL(p || q) = sum_i p_i log(p_i / q_i), mean over the batch, float32.

    p: large network, q: small. The gradient flows into both unless detach_teacher.
    """
    if detach_teacher:
        p_logits = p_logits.detach()
    log_p = F.log_softmax(p_logits.float(), dim=-1)
    log_q = F.log_softmax(q_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def accuracy(logits: Tensor, target: Tensor, topk: tuple[int, ...] = (1, 5)) -> Tensor:
    """Correct predictions within the top k, counted per k: (len(topk),). Labels of -100 count as no image."""
    largest = max(min(k, logits.shape[1]) for k in topk)
    hits = logits.topk(largest, dim=1).indices == target[:, None]  # (B, largest)
    return torch.stack([hits[:, : min(k, largest)].any(dim=1).sum() for k in topk])


def adjoined_weight(t: float) -> float:
    """lambda(t) = min(4 t^2, 1), equation (3.4)."""
    return min(4.0 * t * t, 1.0)
