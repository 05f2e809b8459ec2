"""What both stages do first: weights loaded, the folder opened, the images batched."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.config import C, Common
from nas.data.augmentation import augmentation_line
from nas.data.datasets import Splits
from nas.data.loaders import Batching, Loaders, data_line, make_loaders
from nas.machine.precision import tolerance
from nas.machine.threads import Work, with_threads
from nas.networks.backbone import Start, TimmModel
from nas.networks.opening import started_supernet
from nas.runs.folder import open_run
from nas.runs.images import recognised
from nas.training.plan import BasisPlan
from nas.training.prepared import Prepared
from search_spaces.errors import UserError
from search_spaces.registry import Space
from supernets.supernet import Supernet


@dataclass(frozen=True)
class Beginning:
    """What a stage knows before any weight is loaded. stage: its word in a folder's name. plan: of the basis.

    classes: that the network is to tell apart. measures: whether candidates are measured in the network as it comes,
    which takes a trained classifier. apart: whether the images that decide between candidates are not trained on.
    """

    stage: str
    space: Space
    model: TimmModel
    splits: Splits
    classes: int
    start: Start
    device: torch.device
    plan: BasisPlan = field(default_factory=BasisPlan)
    measures: bool = False
    apart: bool = False


def prepare(
    config: C, beginning: Beginning, lines: tuple[str, ...] = (), seen_by: str | None = None, held_out: bool = False
) -> tuple[C, Prepared]:
    """The run before it trains, and its options with the folder set.

    lines: what is to be said once the folder is open. seen_by: the weights that may have been trained on the held-out
    images, in words. held_out: whether to draw training batches from those, too.
    """
    b = beginning
    splits = b.splits
    supernet, words, fresh = started_supernet(
        b.model, b.classes, b.start, b.space, splits.class_names, config.drop_path
    )
    if fresh and b.stage == "search" and (b.plan.weighed or b.measures):
        raise UserError(
            f"{b.space.name} asks what a trained network can do without, and its weights have no classifier for these"
            f" {b.classes} classes; train one first: python retrain.py --space {b.space.name} --train plain (or let no"
            " label be read: --no-labels)"
        )
    if not config.resume:
        config = with_threads(config, b.device, step_of(supernet), config.batch_size or 64)
    # Only now: weights that cannot be had leave no folder behind.
    config = open_run(config, f"{b.stage}-{b.space.name}-{config.dataset}")
    assert config.output is not None
    for line in (*recognised(config, splits), *lines, *words, *b.plan.lines):
        print(line)
    supernet = supernet.to(b.device)
    apart = b.plan.deciding if b.apart else 0
    trains, size = bool(config.epochs), config.batch_size or 64
    batching = Batching(size, config.seed, config.smoothing or 0.0, held_out, apart, trains)
    loaders = make_loaders(config, batching, splits, supernet, b.device, seen_by)
    print(data_line(config, splits, loaders, trains))
    if trains:
        print(augmentation_line(config))
    prepared = Prepared(
        b.space,
        b.model,
        splits,
        b.device,
        config.output,
        supernet,
        b.start,
        fresh_classifier=fresh,
        loaders=loaders,
        plan=b.plan,
    )
    return config, prepared


def step_of(supernet: Supernet) -> Work:
    """A training step of the large network on so many images, that leaves nothing behind: to be timed."""

    def step(images: int) -> None:
        blank = torch.zeros(images, *supernet.adapter.input_size)
        supernet.large(blank).sum().backward()
        supernet.zero_grad(set_to_none=True)

    supernet.eval()  # nothing is drawn
    return step


def preparation(config: Common, loaders: Loaders) -> dict[str, Any]:
    """How a run prepares its images, in timm's words, for whoever opens its compact network."""
    mean, std = loaders.test.stats
    return {"mean": mean, "std": std, "interpolation": config.interpolation, "crop_pct": config.crop_pct}


def compared(subnet: Any, compact: Any, loaders: Loaders, device: torch.device) -> dict[str, Any]:
    """How far a compact network, written by now, is from its subnet on a batch of the reported split, and what float
    error would be here: for summary.json. UserError where it is none (invariant 2).
    """
    difference = relative_difference(subnet, compact, next(iter(loaders.test))[0].to(device))
    most = tolerance(device)
    if not difference <= most:
        raise UserError(
            f"they differ by {difference:.1e} of the largest logit, on {device} float error is at most {most:.1e}:"
            " do not use compact.safetensors, and please report it; nothing that was trained is lost"
        )
    return {"compact_minus_subnet": difference}


@torch.no_grad()
def relative_difference(first: Any, second: Any, images: Tensor) -> float:
    """max |a - b| / max |a| over the logits, in float32."""
    a, b = first(images), second(images)
    return float((a - b).abs().max() / a.abs().max())
