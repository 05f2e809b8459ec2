"""The basis that a stage's network is to stand in, from its options, its space and its images."""

from collections.abc import Collection
from dataclasses import replace

from nas.config import Common
from nas.data.datasets import Splits
from nas.machine.distributed import on_main
from nas.methods.table import training_of
from nas.networks.backbone import Start
from nas.prices.costs import block_options
from nas.training.basis import PERMUTATION
from nas.training.plan import BasisPlan, Facts, plan_basis
from search_spaces.registry import Space
from search_spaces.slices import narrows_stream
from search_spaces.space import SearchSpace
from supernets.supernet import Supernet


def planned(
    config: Common, space: Space, backbone: Supernet, narrowed: Collection[int], splits: Splits, start: Start
) -> BasisPlan:
    """What becomes of the network. narrowed: stages of whose stream some block leaves a channel out."""
    if config.resume and config.output is not None and on_main((config.output / PERMUTATION).is_file):
        config = replace(config, basis="order")  # as it began, be it before there were rotations
    facts = Facts(start.given(), len(splits.train), narrowed, training_of(space).rotates)
    return plan_basis(config, backbone, facts)


def narrowed_stages(space: SearchSpace) -> set[int]:
    """Stages of whose stream some candidate leaves a channel out."""
    return {
        shape.stage
        for shape, choices in zip(space.shapes, space.candidates, strict=True)
        if any(narrows_stream(shape, kept) for _, kept in block_options(space, shape, choices))
    }
