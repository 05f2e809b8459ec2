"""TensorBoard, where it is asked for and installed. log.csv holds the same numbers and is always written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search_spaces.errors import UserError


def writer_class() -> Any:
    """torch's SummaryWriter. UserError when the package tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs the package tensorboard ({error}); pip install tensorboard, or read log.csv,"
            " which is always written"
        ) from None
    return SummaryWriter


class EventFiles:
    """Event files of a run: in DIR/tensorboard a point per epoch and column of log.csv, in its folder steps one now and
    then by the number of the step.

    epochs, steps: done already. A resumed run hides what a killed one wrote after its last checkpoint.
    """

    def __init__(self, folder: Path, epochs: int, steps: int) -> None:
        place, writer = folder / "tensorboard", writer_class()
        self.writer = writer(str(place), purge_step=epochs + 1)
        self.steps = writer(str(place / "steps"), purge_step=steps + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row of log.csv."""
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def add_step(self, values: Mapping[str, float], step: int) -> None:
        """Write what a step stands for."""
        for name, value in values.items():
            self.steps.add_scalar(name, value, step)
        self.steps.flush()
