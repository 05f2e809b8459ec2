"""A subnet refitted on a run's own images (section 2.11): for the cut, for the start of stage 2.

What a search refits it leaves in refit.safetensors: the same refit is not done again by its resumption or by stage 2.
"""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nas.data.loaders import CALIBRATION_BATCH
from nas.data.options import PREPARATION, TRAINED_ON
from nas.machine.distributed import is_main, on_main
from nas.machine.progress import counted
from nas.networks.weights import save_weights
from nas.runs.folder import SUPERNET
from nas.training.calibration import calibration_images
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from search_spaces.slices import NetworkSlice
from supernets.refit import Values, bytes_held, refit
from supernets.streams import readings, scalings
from supernets.supernet import Supernet

REFIT = "refit.safetensors"
MARK, SCALE = "of", "scale of "
OPTIONS = (*TRAINED_ON, *PREPARATION, "seed", "refit_images", "refit_memory")  # on which a refit rests


def kept_refit(options: LoopOptions, prepared: Prepared, subnet: NetworkSlice) -> Values:
    """As `refitted`; written into the run's folder, and read from there where it is the same one's."""
    values = known_refit(options, prepared, subnet, prepared.folder)
    if values is None:
        values = refitted(options, prepared, subnet)
        if values and is_main():
            scales = {f"{SCALE}{name}": scale for name, scale in scales_of(prepared.supernet).items()}
            save_weights(
                dict(values) | scales, prepared.folder / REFIT, {MARK: mark(options, prepared, subnet, prepared.folder)}
            )
    return values


def known_refit(options: LoopOptions, prepared: Prepared, subnet: NetworkSlice, folder: Path) -> Values | None:
    """What a search left there, where it is of the same subnet of its supernet, on the same images by their options.

    None where a refit is due.
    """

    def values() -> Values | None:
        try:
            with safe_open(folder / REFIT, "pt") as file:
                if (file.metadata() or {}).get(MARK) != mark(options, prepared, subnet, folder):
                    return None
                found = {str(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError):  # there is none, or half of one
            return None
        for name, scale in scales_of(prepared.supernet).items():
            was = found.pop(f"{SCALE}{name}")
            if name in found and was != scale:
                found[name] = found[name] * (was / scale).to(found[name])
        return found

    return on_main(values)


def scales_of(supernet: Supernet) -> dict[str, Tensor]:
    """What norms and LayerScales of rotated streams multiply, by the names of the readers and writers beside them.

    One number each, and another one after every time that a network is put into its basis: the matrices then differ by
    it, and the function does not.
    """
    params = {name: p.detach() for name, p in supernet.backbone.named_parameters()}
    streams = supernet.adapter.streams
    found: dict[str, Tensor] = {}
    for reading in readings(supernet.adapter):
        if reading.stage in streams:
            found |= {name: params[f"{reading.norm}.weight"][0].cpu().clone() for name in reading.matrices}
    for scaling in scalings(supernet.adapter):
        if scaling.stage in streams:
            found |= {name: params[scaling.gamma][0].cpu().clone() for name in scaling.writers}
    return found


def mark(options: LoopOptions, prepared: Prepared, subnet: NetworkSlice, folder: Path) -> str:
    """SHA-256 of what a refit rests on. folder: of the search, whose supernet.safetensors has the weights."""
    supernet = prepared.supernet
    with (folder / SUPERNET).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    basis = supernet.sorted if supernet.basis is None else supernet.basis.digest()
    said = [f"{name}={getattr(options, name)}" for name in OPTIONS]
    return hashlib.sha256(repr((weights, subnet, basis, prepared.plan.images, said)).encode()).hexdigest()


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
