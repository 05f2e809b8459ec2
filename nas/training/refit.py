"""A subnet refitted on a run's own images (section 2.11): for decisions, for the cut, for the start of stage 2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nas.machine.distributed import is_main, on_main
from nas.training.calibration import calibration_images
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from search_spaces.slices import NetworkSlice
from supernets.refit import Values, refit


def refitted(options: LoopOptions, prepared: Prepared, subnet: NetworkSlice) -> Values:
    """A subnet's parameters refitted on --refit-images training images, prepared as in evaluation; nothing is written.

    Empty where none are asked for.
    """
    count = min(options.refit_images, prepared.plan.images)
    if count == 0:
        return {}

    def values() -> Values:
        images = (batch for batch, _ in calibration_images(options, prepared, count))
        with counted("refitting", 2 * len(subnet.blocks)) as advance:
            found = refit(prepared.supernet, subnet, images, advance=advance)
        return {name: value.cpu() for name, value in found.items()}

    return on_main(values)


@contextmanager
def counted(words: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar with the time left; what is yielded advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_main()) as bar:
        task = bar.add_task(words, total=total)
        yield lambda: bar.advance(task)
