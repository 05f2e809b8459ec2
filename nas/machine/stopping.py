"""Signals by which a scheduler takes a machine away: SIGTERM and SIGUSR1.

A training run ends at its next step, with a checkpoint; anything else ends at once, since all that it has found out is
in files. Either way the exit code says that --resume goes on.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: try again later
LOOK = 2.0  # seconds after which a loading process looks whether its master still lives


class Preempted(SystemExit):
    """The run was asked to stop, and has."""

    def __init__(self, words: str) -> None:
        super().__init__(RESUME_ME)
        self.words = words


class Asked:
    """signal: the name of the one that came, once one has."""

    signal: str | None = None


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, a signal ends the program where it stands; but only the main thread hears signals."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Preempted(signal.Signals(number).name)

    with _handled(end):
        yield


@contextmanager
def at_next_step() -> Iterator[Asked]:
    """Inside, a signal is only noted, and so is a second one: nothing cuts a checkpoint short."""
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal = signal.Signals(number).name

    with _handled(note):
        yield asked


@contextmanager
def _handled(handler: "signal._HANDLER") -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def deaf(worker: int) -> None:
    """Let a data loading process leave signals to the one it works for, which needs it to get to the step's end.

    From that one itself SIGTERM ends it, as ever; and so does that one's own end, be it killed.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_master, daemon=True).start()


def _end_with_master() -> None:
    master = parent_process()  # who asked for it, which a server of forks may have started in its place
    assert master is not None
    while master.is_alive():
        heard = signal.sigtimedwait({signal.SIGTERM}, LOOK)
        if heard is not None and heard.si_pid == master.pid:
            break
    os._exit(0)
