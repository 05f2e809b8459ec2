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
    """Event files of a run in DIR/tensorboard, one point per epoch and column of log.csv.

    first: epochs already done. A resumed run hides what a killed one wrote after its last checkpoint.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.writer = writer_class()(str(folder / "tensorboard"), purge_step=first + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row of log.csv."""
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()
