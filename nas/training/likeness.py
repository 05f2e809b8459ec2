"""How like the large network's output another one's is, where no label says what is right."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.machine.distributed import sum_
from nas.machine.timing import Network
from nas.training.losses import kl_divergence

Sums = Tensor  # (columns,) or so, float64, of a batch; added up over batches and processes
FEATURES, PREDICTIONS = ("cosine", "feature_error"), ("kl", "agreement")  # columns of a table


@torch.no_grad()
def likeness(
    networks: Mapping[str, Network],
    reference: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Any,
    features: bool,
) -> dict[str, float]:
    """{"<name>_<column>": value} over the batches of all processes.

    features: whether outputs are features (B, E): the mean cosine similarity, and the squared error as a share of the
    variance of the reference's. Of logits (B, classes) KL(reference || network) in nats per image, and in how many per
    cent of the images both have the same first class.
    """
    compare: Callable[[Tensor, Tensor], Sums] = _features if features else _predictions
    totals = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in networks}
    spread: Tensor | None = None  # of the reference's features: sums, and the sum of squares
    seen = torch.zeros((), dtype=torch.float64, device=device)
    for images, _ in batches:
        images = images.to(device)
        seen += len(images)
        with autocast():
            expected = reference(images)
        if features:
            f = expected.double()
            moments = torch.cat([f.sum(0), f.square().sum()[None]])
            spread = moments if spread is None else spread + moments
        for name, network in networks.items():
            with autocast():
                output = network(images)
            totals[name] += compare(expected, output)
    assert not features or spread is not None, "no images"
    sum_(seen, *totals.values(), *([] if spread is None else [spread]))
    number = max(float(seen), 1.0)
    if spread is None:
        means = {name: (float(kl) / number, 100 * float(same) / number) for name, (kl, same) in totals.items()}
        return _named(means, PREDICTIONS)
    variance = float(spread[-1] - (spread[:-1] / number).square().sum() * number)
    found = {name: (float(c) / number, float(e) / max(variance, 1e-30)) for name, (c, e) in totals.items()}
    return _named(found, FEATURES)


def _named(values: Mapping[str, tuple[float, float]], columns: tuple[str, str]) -> dict[str, float]:
    return {f"{name}_{c}": v for name, pair in values.items() for c, v in zip(columns, pair, strict=True)}


def _features(expected: Tensor, found: Tensor) -> Sums:
    a, b = expected.double(), found.double()
    return torch.stack([F.cosine_similarity(a, b, dim=1).sum(), (a - b).square().sum()])


def _predictions(expected: Tensor, found: Tensor) -> Sums:
    same = (expected.argmax(1) == found.argmax(1)).sum().double()
    return torch.stack([kl_divergence(expected, found).double() * len(found), same])
