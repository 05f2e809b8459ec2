"""How like the large network's output another's is, and k-NN: beside plain formulas."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.training.likeness import likeness
from nas.training.nearest import NEIGHBOURS, TEMPERATURE, Neighbours, knn

CPU = torch.device("cpu")


def batches(x: Tensor, labels: Tensor | None = None, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    labels = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
    return list(zip(x.split(size), labels.split(size), strict=True))


def test_features_are_compared_by_cosine_and_by_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator) + 3
    noise = torch.randn(4, 4, generator=generator)
    networks: dict[str, Any] = {"same": lambda x: x, "other": lambda x: x @ noise, "mean": lambda x: x * 0 + x_mean}
    x_mean = x.mean(0)
    found = likeness(networks, lambda x: x, batches(x), CPU, nullcontext, features=True)
    assert found["same_cosine"] == pytest.approx(1) and found["same_feature_error"] == pytest.approx(0, abs=1e-12)
    assert found["mean_feature_error"] == pytest.approx(1, rel=1e-5)  # whoever knows only the mean
    y, spread = x @ noise, float((x - x_mean).square().sum())
    assert found["other_cosine"] == pytest.approx(float(F.cosine_similarity(x, y).mean()), rel=1e-5)
    assert found["other_feature_error"] == pytest.approx(float((x - y).square().sum()) / spread, rel=1e-4)


def test_predictions_are_compared_by_divergence_and_by_their_first_class() -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    networks: dict[str, Any] = {"same": lambda x: x, "sharp": lambda x: 3 * x, "other": lambda x: -x}
    found = likeness(networks, lambda x: x, batches(x), CPU, nullcontext, features=False)
    assert found["same_kl"] == pytest.approx(0, abs=1e-9) and found["sharp_agreement"] == found["same_agreement"] == 100
    assert found["other_agreement"] < 20
    kl = F.kl_div((3 * x).log_softmax(1), x.log_softmax(1), log_target=True, reduction="batchmean")
    assert found["sharp_kl"] == pytest.approx(float(kl), rel=1e-5)


def test_neighbours_vote_by_their_similarity() -> None:
    """As DINO's own evaluation weighs them; beside scikit-learn's."""
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4, 8, generator=generator)
    labels = torch.arange(120) % 4
    bank = centres[labels] + 1.4 * torch.randn(120, 8, generator=generator)
    asked = centres[labels] + 1.4 * torch.randn(120, 8, generator=generator)
    peer = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    expected = peer.fit(bank.numpy(), labels.numpy()).predict(asked.numpy())
    votes = Neighbours(bank, labels).votes(asked)
    assert votes.argmax(1).tolist() == expected.tolist()
    found = knn({"net": lambda x: x}, batches(bank, labels), batches(asked, labels), CPU, nullcontext)
    assert found == {"net_knn": pytest.approx(100 * float((torch.tensor(expected) == labels).float().mean()))}
    assert 40 < found["net_knn"] < 100


def test_a_bank_of_few_images_is_asked_whole() -> None:
    bank, labels = torch.eye(3), torch.tensor([0, 1, 1])
    assert Neighbours(bank, labels).votes(torch.tensor([[0.0, 1.0, 0.9], [1.0, 0.1, 0.0]])).argmax(1).tolist() == [1, 0]
