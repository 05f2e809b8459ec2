"""How far something is, and the time left: a bar on a terminal, in a log a line now and then; on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nas.machine.distributed import is_main

SECONDS = 30.0  # between two lines of a log


@contextmanager
def counted(words: str, total: int) -> Iterator[Callable[[], None]]:
    """Of so many parts of known number; what is yielded advances by one. Process 0 alone shows it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(words, total).advance if is_main() else lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_main()) as bar:
        task = bar.add_task(words, total=total)
        yield lambda: bar.advance(task)


def progress(batches: Any, words: str, total: int | None = None) -> Iterator[Any]:
    """The batches, and how far they are while they pass. total: their number, where they do not know it."""
    with counted(words, total or len(batches)) as advance:
        for batch in batches:
            yield batch
            advance()


class Lines:
    """What a log is told: nothing of what is done within the first half minute."""

    def __init__(self, words: str, total: int) -> None:
        self.words, self.total, self.done = words, total, 0
        self.start = self.said = time.monotonic()

    def advance(self) -> None:
        """One part is done."""
        self.done += 1
        now = time.monotonic()
        if now - self.said >= SECONDS and self.done < self.total:
            self.said = now
            left = duration((now - self.start) / self.done * (self.total - self.done))
            print(f"{self.words}: {self.done} of {self.total}, {left} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """In the two units that matter."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{h} h {m} min"
    return f"{m} min {s} s" if minutes else f"{s} s"
