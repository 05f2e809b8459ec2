"""A subnet refitted on a run's own images (section 2.11): for decisions, for the cut, for the start of stage 2."""

from nas.data.loaders import CALIBRATION_BATCH
from nas.machine.distributed import on_main
from nas.machine.progress import counted
from nas.training.calibration import calibration_images
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from search_spaces.slices import NetworkSlice
from supernets.refit import Values, bytes_held, refit


def refitted(options: LoopOptions, prepared: Prepared, subnet: NetworkSlice) -> Values:
    """A subnet's parameters refitted on --refit-images training images, prepared as in evaluation; nothing is written.

    Empty where none are asked for.
    """
    assert options.refit_images is not None
    count = min(options.refit_images, prepared.plan.images)
    if count == 0:
        return {}
    fit = images_that_fit(options, prepared, subnet)
    if fit < count:
        print(f"refitted on {fit} of {count} images, which is what {options.refit_memory:g} GiB hold (--refit-memory)")
        count = fit

    def values() -> Values:
        images = (batch for batch, _ in calibration_images(options, prepared, count))
        with counted("refitting", 2 * len(subnet.blocks)) as advance:
            found = refit(prepared.supernet, subnet, images, advance=advance)
        return {name: value.cpu() for name, value in found.items()}

    return on_main(values)


def images_that_fit(options: LoopOptions, prepared: Prepared, subnet: NetworkSlice) -> int:
    """How many images the streams of a refit may be of, by --refit-memory; a batch at least."""
    return max(CALIBRATION_BATCH, int(options.refit_memory * 2**30 / bytes_held(prepared.supernet, subnet)))
