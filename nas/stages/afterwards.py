"""What follows once a network is written: none of it can lose the network, or another part of it (invariant 12)."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nas.machine.distributed import world_size
from nas.runs.folder import results_path
from search_spaces.errors import UserError, reason


class Afterwards:
    """Notes what has gone wrong, lets the rest go on, and says it at the end. folder: where the network is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.troubles: list[str] = []

    @contextmanager
    def part(self, words: str, together: bool = False) -> Iterator[None]:
        """What fails inside is noted. together: a work of all processes, who cannot go on without one of them."""
        try:
            yield
        except Exception as error:
            if together and world_size() > 1:
                raise
            if not isinstance(error, UserError):
                traceback.print_exception(error, file=sys.stderr)
            self.note(f"{words}: {reason(error)}")

    def note(self, words: str) -> None:
        """Something is not as it should be."""
        self.troubles.append(words)

    def facts(self) -> dict[str, list[str]]:
        """For summary.json."""
        return {"troubles": self.troubles} if self.troubles else {}

    def end(self) -> None:
        """UserError with everything that has been noted."""
        if self.troubles:
            raise UserError(f"{'; '.join(self.troubles)} (what was trained is in {results_path(self.folder)})")
