"""The options of a run's folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nas.machine.ranges import not_negative


@dataclass(frozen=True)
class RunOptions:
    """What a run is called, and what it leaves."""

    seed: int = 42
    """of initial weights, batches, augmentation and Gumbel noise"""
    output: Path | None = None
    """the run's own folder"""
    processes: Annotated[int | None, tyro.conf.Suppress] = None
    """how many torchrun started, where there are several; written down, not asked for"""
    resume: bool = False
    """go on with the run in --output"""
    keep: int = 0
    """keep the checkpoints of the last so many epochs, besides the last and the best"""
    tensorboard: bool = False
    """write the columns of log.csv for TensorBoard too"""

    def check_run(self) -> None:
        """Refuse values that no run can use, and a package that is missing."""
        not_negative(self, "keep")
        if self.tensorboard:
            from nas.runs.tensorboard import writer_class

            writer_class()
