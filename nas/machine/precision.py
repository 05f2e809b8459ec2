"""How exactly a device computes in float32, as it is set here: measured, since settings of several names decide it."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

EXACT = 1e-5  # of the largest logit: what the order of a network's sums makes in float32
ROUNDINGS = 16  # a deep network's error is some five times that of one product (bf16: 0.01 of 0.003)


def tolerance(device: torch.device) -> float:
    """How far two ways to compute the same logits may part, relative to the largest: more in TF32, still more in bf16.

    Under autocast, of its precision.
    """
    return max(EXACT, ROUNDINGS * product_error(device))


@torch.no_grad()
def product_error(device: torch.device) -> float:
    """The largest error of a matrix product and a convolution, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b, images, weights = drawn(64, 512), drawn(512, 64), drawn(4, 16, 16, 16), drawn(32, 16, 4, 4)
    found = a.float().to(device) @ b.float().to(device), conv2d(images.float().to(device), weights.float().to(device))
    with torch.autocast("cpu", enabled=False):
        exact = a.float().double() @ b.float().double(), conv2d(images.float().double(), weights.float().double())
    pairs = zip(found, exact, strict=True)
    return max(float((f.cpu().double() - e).abs().max() / e.abs().max()) for f, e in pairs)
