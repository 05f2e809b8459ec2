"""What the tests of KCR and joint share: a search over a backbone, with random scores, logits and picks."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nas.objectives.kernel import KernelTerm
from nas.prices.costs import priced
from nas.prices.flops import FLOPS
from nas.searchers.channels import Bernoulli, KernelSearch, TopK
from nas.training.objective import Objective
from nas.training.training import Training
from search_spaces.method import FRACTIONS, Picks, Settings
from search_spaces.registry import METHODS
from search_spaces.slices import NetworkSlice, network_slice
from search_spaces.space import SearchSpace, make_space
from supernets.supernet import Supernet
from tests.nas.small import one_hot
from tests.oracle import randomise


def tiny_vit(depth: int = 2, **options: Any) -> nn.Module:
    """A ViT of four heads and 48 channels whose MLP width, 72, no other layer has."""
    defaults: dict[str, Any] = dict(img_size=32, patch_size=16, num_classes=5, embed_dim=48, num_heads=4, mlp_ratio=1.5)
    return randomise(VisionTransformer(**defaults | options, depth=depth), 3).eval()


def search_of(backbone: nn.Module, method: str, width: str = "stream", **options: Any) -> KernelSearch:
    """A search by top-k scores, or by Bernoulli gates when fractions is None; scores and logits random."""
    supernet = Supernet(backbone)
    fractions = options.pop("fractions", FRACTIONS)
    space = make_space("test", METHODS[method], Settings(width, fractions=fractions), supernet.shapes)
    costs = priced(space, supernet.adapter.costs, FLOPS, options.pop("full_stage_width", False))
    defaults: dict[str, Any] = dict(budget=None, gamma=1e-9, seed=0, total_steps=10)
    kernel = KernelTerm(options.pop("eta_kc", 0.1), options.pop("rho", 0.3))
    kind = Bernoulli if fractions is None else TopK
    objective = kind(supernet, costs, kernel=kernel, **defaults | options)
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    with torch.no_grad():
        for p in objective.architecture_parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return objective


@st.composite
def some_picks(draw: st.DrawFn, space: SearchSpace) -> list[Picks]:
    """One candidate of every choice."""
    return [{name: draw(st.sampled_from(options)) for name, options in choices.items()} for choices in space.candidates]


def subnet_of(objective: KernelSearch, picks: list[Picks], full_stage_width: bool) -> NetworkSlice:
    space = objective.costs.space
    return network_slice(space.shapes, space.block_slices(picks, objective.kept_indices(picks)), full_stage_width)


def mixture_logits(objective: KernelSearch, x: Tensor, picks: list[Picks]) -> Tensor:
    """The mixture at the one-hot draw that takes these picks."""
    draw = [dict(g) for g in one_hot(objective.costs.space, picks)]
    return objective.supernet.small(x, objective.mixtures(draw), objective.costs.stage_gates(draw))


def gradients(backbone: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Of a fixed random projection of the logits, to every parameter; zero where there is none."""
    names, parameters = zip(*((n, p) for n, p in backbone.named_parameters() if p.requires_grad), strict=True)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    grads = torch.autograd.grad((logits * direction).sum(), parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def architectures(space: SearchSpace) -> Iterator[list[Picks]]:
    """Every architecture of a small space."""
    blocks = [
        [dict(zip(choices, taken, strict=True)) for taken in itertools.product(*choices.values())]
        for choices in space.candidates
    ]
    yield from (list(picks) for picks in itertools.product(*blocks))


class Linears(TorchFunctionMode):
    """Counts linear layers by their number of outputs."""

    def __init__(self) -> None:
        self.outputs: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.outputs.append(args[1].shape[0])
        return func(*args, **(kwargs or {}))


class Batches(list[tuple[Tensor, Tensor]]):
    """A loader over fixed batches."""

    start = position = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The same batches in every epoch."""
        self.start = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position = self.start
        for batch in self[self.start :]:
            self.position += 1
            yield batch


def batches(num: int, size: int = 6, classes: int = 5) -> Batches:
    generator = torch.Generator().manual_seed(5)
    return Batches(
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(num)
    )


def training_of(objective: Objective, folder: Path, evaluate: Any) -> Training:
    parameters = objective.architecture_parameters()
    return Training(
        objective=objective,
        optimizer=torch.optim.AdamW(objective.supernet.backbone.parameters(), lr=1e-3),
        scheduler=None,
        train_loader=batches(2),
        epochs=3,
        folder=folder,
        seed=0,
        device=torch.device("cpu"),
        evaluate=evaluate,
        held_out="held-out training images",
        arch_optimizer=torch.optim.Adam(parameters, lr=0.1) if parameters else None,
    )
