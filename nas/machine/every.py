"""How often something happens: after so much time, or after so many steps."""

import re
import time
from dataclasses import dataclass

from search_spaces.errors import UserError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """One of the two is given."""

    seconds: float | None = None
    steps: int | None = None


def every(text: str, option: str) -> Every:
    """30s, 30m, 2h or 500steps. UserError for anything else, and for none at all."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])|(\d+)\s*steps?", text.strip())
    if found is None or not float(found[1] or found[3]):
        raise UserError(f"{option} {text}; expected a time or a number of steps: 90s, 30m, 2h, 500steps")
    if found[3]:
        return Every(steps=int(found[3]))
    return Every(seconds=float(found[1]) * UNITS[found[2]])


class Clock:
    """Says when it is time again. step: where the count begins."""

    def __init__(self, interval: Every, step: int) -> None:
        self.interval = interval
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from now on."""
        self.since, self.step = time.monotonic(), step

    def elapsed(self) -> float:
        """Seconds since the count began."""
        return time.monotonic() - self.since

    def due(self, step: int) -> bool:
        """Whether the interval is over after so many steps."""
        if self.interval.steps is not None:
            return step - self.step >= self.interval.steps
        assert self.interval.seconds is not None
        return self.elapsed() >= self.interval.seconds
