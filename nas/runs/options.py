"""The options of a run's folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nas.machine.every import every
from nas.machine.ranges import not_negative
from search_spaces.errors import UserError

SEEDS = 2**32  # numpy's


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
    """go on with the run in --output; --resume auto: begin it where there is none yet"""
    checkpoint_every: str = "30m"
    """how often to write a checkpoint inside an epoch: a time or a number of steps (90s, 30m, 2h, 500steps)"""
    literature: Path | None = None
    """CSV file of networks to be drawn behind one's own in every Pareto picture, where they are of the same data set
    (docs/numbers.md); results/literature.csv where it is there"""
    keep: int = 0
    """keep the checkpoints of the last so many epochs, besides the last two and the best"""
    log_every: str = "1m"
    """how often to print a line where standard output is no terminal, and to write a point for TensorBoard, inside an
    epoch: a time or a number of steps"""
    on_nan: tuple[str, ...] = ("stop",)
    """at a step whose loss is not finite: stop; or skip N: leave it out, N times in a run, waiting for the device at
    every step"""
    tensorboard: bool = False
    """write the columns of log.csv for TensorBoard too, and inside an epoch loss and speed by step"""

    def may_skip(self) -> int:
        """How many steps may be left out for a loss that is not finite."""
        what, *number = self.on_nan
        if self.on_nan == ("stop",):
            return 0
        if what == "skip" and len(number) == 1 and number[0].isdecimal() and int(number[0]) > 0:
            return int(number[0])
        raise UserError(f"--on-nan {' '.join(self.on_nan)}; expected stop, or skip and a number of steps: skip 10")

    def check_run(self) -> None:
        """Refuse values that no run can use, and a package that is missing."""
        not_negative(self, "keep")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"--seed {self.seed}; expected a whole number from 0 to {SEEDS - 1}")
        every(self.checkpoint_every, "--checkpoint-every")
        every(self.log_every, "--log-every")
        self.may_skip()
        if self.tensorboard:
            from nas.runs.tensorboard import writer_class

            writer_class()
