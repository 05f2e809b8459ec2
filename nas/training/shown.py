"""How a run shows that it lives: a bar on a terminal, elsewhere a line now and then, and TensorBoard's points."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from nas.machine import distributed
from nas.machine.every import Clock
from nas.machine.progress import duration
from nas.runs.log_columns import held_out as held_out_columns
from nas.runs.tensorboard import EventFiles
from nas.training.training import Pass, Training


class Shown:
    """Process 0's alone; in the others every method does nothing. words: what is running. first: where it begins."""

    def __init__(self, training: Training, words: str, first: Pass) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.training, self.main, self.words = training, distributed.is_main(), words
        self.per_epoch = training.steps_per_epoch()
        self.total = training.epochs * self.per_epoch
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns, TextColumn("left"), console=console, disable=not (self.main and console.is_terminal)
        )
        done = self.steps_done(first)
        self.task = self.bar.add_task(words, total=self.total, completed=done)
        events = training.tensorboard and self.main
        self.events = EventFiles(training.folder, first.epoch, done) if events else None
        self.since(first)

    def __enter__(self) -> "Shown":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.bar.stop()

    def steps_done(self, passing: Pass) -> int:
        """Of the whole run."""
        return passing.epoch * self.per_epoch + passing.steps

    def since(self, passing: Pass) -> None:
        """From here on the next line counts."""
        self.clock = Clock(self.training.log_every, self.steps_done(passing))
        self.sums, self.counted, self.images = dict(passing.meter.sums), passing.meter.steps, passing.images

    def step(self, passing: Pass) -> None:
        """A step is done."""
        self.bar.advance(self.task)
        if self.main and self.clock.due(self.steps_done(passing)):
            passing.meter.read()
            self.point(passing)
            self.since(passing)

    def point(self, passing: Pass) -> None:
        """Loss and speed since the last line: of this process's images, and of all processes."""
        steps, seconds = self.steps_done(passing) - self.clock.step, self.clock.elapsed()
        counted = max(passing.meter.steps - self.counted, 1)
        terms = {name: (v - self.sums.get(name, 0.0)) / counted for name, v in passing.meter.sums.items()}
        speed = (passing.images - self.images) * distributed.world_size() / seconds
        left = (self.total - self.steps_done(passing)) * seconds / max(steps, 1)
        values = {
            "loss": sum(terms.values()),
            "images_per_s": speed,
            "lr": self.training.optimizer.param_groups[0]["lr"],
        }
        if self.events is not None:
            self.events.add_step(values | {f"loss_{n}": v for n, v in terms.items()}, self.steps_done(passing))
        if not self.bar.console.is_terminal:
            print(
                f"{self.words}: epoch {passing.epoch + 1}/{self.training.epochs}"
                f"  step {passing.steps}/{self.per_epoch}  loss {values['loss']:.3f}  {speed:.0f} images/s"
                f"  {duration(left)} left",
                flush=True,
            )

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done, and on the disk."""
        if self.events is not None:
            self.events.add(row)
        line = summary_line(row, self.training.epochs, self.training.held_out)
        if self.main:
            self.bar.console.print(line, highlight=False, soft_wrap=True)


def summary_line(row: Mapping[str, Any], epochs: int, held_out: str) -> str:
    """One epoch in one line."""
    parts = [f"epoch {row['epoch']}/{epochs}"] + ([f"loss {row['loss']:.3f}"] if "loss" in row else [])
    scores = [f"{name} {row[key]:.2f} %" for name, key in held_out_columns(row, "top1").items()]
    words = {"error": "error", "kl": "KL", "cosine": "cosine"}
    scores += [f"{word} {row[key]:.4f}" for name, word in words.items() if (key := f"held_out_subnet_{name}") in row]
    parts += [f"{', '.join(scores)} on {held_out}"] if scores else []
    if "expected_gflops" in row:
        parts.append(f"expected {row['expected_gflops']:.4g} G, selected {row['selected_gflops']:.4g} G")
    parts += [f"{row['images_per_s']:.0f} images/s"] if "images_per_s" in row else []
    return "  ".join(parts)
