"""The options of both stages: one dataclass each, composed of the rooms' own, the only list there is.

Flags follow timm's train.py where it has one. None means: the space's own default (search_spaces/registry.py). A room
is handed the whole and reads the record that it declares, data/options.py and so on; mypy holds it to that.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from nas.data.augmentation import check_augmentation, held, squared
from nas.data.options import DataOptions
from nas.machine.ranges import at_least_one, finite, not_negative
from nas.methods.options import RecipeOptions
from nas.networks.options import NetworkOptions
from nas.objectives.options import LossOptions, StageTwoOptions
from nas.pictures.literature import read_literature
from nas.searchers.options import SearchOptions
from nas.training.options import LoopOptions
from search_spaces.errors import UserError
from search_spaces.registry import Space

C = TypeVar("C", bound="Common")


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True)
class Common(RecipeOptions, LossOptions, LoopOptions, NetworkOptions, DataOptions):
    """Options of both stages."""

    def check(self) -> None:
        """Refuse option values that no run can use."""
        finite(self)
        self.check_training()
        self.check_data()
        check_augmentation(self)
        self.check_network()
        self.check_objective()
        self.check_teacher()
        self.check_kernel()
        self.check_run()
        if self.literature is not None:
            read_literature(self.literature)
        if self.mixes() and (self.batch_size or 64) % 2:
            raise UserError(f"--batch-size {self.batch_size}: mixup pairs the images of a batch; give an even number")


@dataclass(frozen=True)
class SearchConfig(SearchOptions, Common):
    """Search a backbone for a smaller network that shares its weights, and write arch.json."""

    def check(self) -> None:
        super().check()
        self.check_price()
        not_negative(self, "arch_lr")
        self.check_listing()
        self.check_mixture()
        self.check_minimax()
        self.check_front()
        if self.arch_data == "val" and self.val_fraction == 0:
            raise UserError("--arch-data val needs a held-out part; set --val-fraction above 0")


@dataclass(frozen=True)
class RetrainConfig(StageTwoOptions, Common):
    """Train an architecture adjoined with its backbone, and cut the compact network out."""

    arch: Path | None = None
    """arch.json of a search, or the folder that holds it; of a search with --front: all of its networks at once, over
    shared weights (docs/searchers.md)"""
    space: str | None = None
    """instead of --arch: a space that needs no search (with --train plain any space); auto-<method>: of the family of
    --model"""
    alpha: int | None = None
    """one compression factor for every block, of such a space"""
    width: Literal["stream", "inner"] = "stream"
    """what that factor narrows"""
    init: Literal["base", "supernet"] | None = None
    """start from the original weights or from where the search arrived; by default the latter if the number of
    classes is the same"""
    train: str | None = None
    """adjoined: both networks (equation 3.4); plain: the large one alone; distill: the small one under a frozen
    teacher; features: the small one after the original one's tokens and output, without labels; by default adjoined, of
    free widths distill, and features where there are no labels or no classifier"""
    result: Literal["last", "best"] | None = None
    """which epoch's weights are measured and cut: the last, or the best on the held-out part, the start among them; by
    default the last, of free widths the best"""

    def trained(self) -> str:
        """What is trained, once defaults are filled in."""
        assert self.train is not None
        return self.train

    def check(self) -> None:
        super().check()
        at_least_one(self, "epochs")
        self.check_adjoined()
        self.check_members()
        self.check_tokens()
        if self.result == "best" and self.val_fraction == 0:
            raise UserError("--result best needs a held-out part to choose by; set --val-fraction above 0")


def with_defaults(config: C, space: Space, stage: Literal["search", "retrain"], trained: bool = False) -> C:
    """Fill every option that was left None from the space's defaults for the stage, or from --augment.

    trained: whether the weights are of a network of the user's even though the options name none.
    """
    own = dict(space.training) | dict(space.search if stage == "search" else space.retrain)
    own |= held(config, own, trained or config.brings_weights())
    config = replace(config, **squared(config))
    names = {f.name for f in fields(config)}
    chosen = {k: v for k, v in own.items() if k in names and getattr(config, k) is None}
    return replace(config, **chosen)
