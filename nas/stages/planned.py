"""The basis that a stage's network is to stand in, from its options, its space and its images."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from nas.config import Common
from nas.data.datasets import Splits
from nas.machine.distributed import on_main
from nas.methods.table import training_of
from nas.networks.backbone import Start
from nas.prices.costs import block_options
from nas.training.basis import PERMUTATION
from nas.training.plan import BasisPlan, Facts, parts_of, plan_basis
from search_spaces.errors import UserError
from search_spaces.registry import Space
from search_spaces.slices import narrows_stream
from search_spaces.space import SearchSpace
from supernets.supernet import Supernet


@dataclass(frozen=True)
class Cuts:
    """stages: those of whose stream some block leaves a channel out. inside: whether some cuts inside its heads.

    fixed: stages that may not be rotated, and why (rounds.py).
    """

    stages: Collection[int]
    inside: bool = False
    fixed: Mapping[int, str] = field(default_factory=dict)


def check_trained(space: Space, start: Start, measures: bool = False) -> None:
    """Refuse weights that were never trained, where a method or a searcher asks what they can do without."""
    if (training_of(space).refits or measures) and not start.given():
        raise UserError(
            f"{space.name} asks what trained weights can do without; give --checkpoint or --pretrained"
            f" (from scratch, first: python retrain.py --space {space.name} --train plain)"
        )


def planned(
    config: Common,
    space: Space,
    backbone: Supernet,
    cuts: Cuts,
    splits: Splits,
    start: Start,
    measures: bool = False,
) -> BasisPlan:
    """What becomes of the network. measures: whether a search is to measure candidates."""
    if config.resume and config.output is not None and on_main((config.output / PERMUTATION).is_file):
        config = replace(config, basis="order")  # as it began, be it before there were rotations
    training = training_of(space)
    facts = Facts(
        start.given(),
        len(splits.train),
        cuts.stages,
        cuts.inside,
        training.rotates,
        training.refits,
        measures,
        cuts.fixed,
    )
    plan = plan_basis(config, backbone, facts)
    return replace(plan, labels=splits.num_classes > 0, refits=training.refits)


def looked_at(space: Space, splits: Splits) -> BasisPlan:
    """The plan of a network whose basis is known: of the training images, which it is refitted on."""
    deciding, images = parts_of(len(splits.train), training_of(space).refits)
    return BasisPlan(deciding=deciding, images=images)


def cuts_of(space: SearchSpace) -> Cuts:
    """What the candidates of a space cut."""
    stages, inside = set(), False
    for shape, choices in zip(space.shapes, space.candidates, strict=True):
        for _, kept in block_options(space, shape, choices):
            if narrows_stream(shape, kept):
                stages.add(shape.stage)
            inside = inside or kept.qk is not None or isinstance(kept.v_channels, int)
    return Cuts(stages, inside)
