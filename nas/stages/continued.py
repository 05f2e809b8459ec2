"""A search that goes on from a finished run (--arch): what it takes over where nothing is said."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from nas.config import SearchConfig
from nas.data.options import PREPARATION, TRAINED_ON
from nas.machine.ranges import as_given, flag
from nas.runs.folder import read_options, results_path, typed
from search_spaces.errors import UserError
from search_spaces.registry import space_of

S = TypeVar("S", bound=SearchConfig)

IMAGES = (*TRAINED_ON, "val_split")  # all of a run, or none
OF_THE_RUN = ("model", "model_kwargs", "checkpoint", "pretrained")  # which its network has decided
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(SearchConfig)}


def continued(config: S) -> S:
    """The options with the space of --arch, and its images where no others are named.

    UserError where they name another network than the run's.
    """
    config = replace(config, space=space_of(config.space, config.arch))
    if config.arch is None:
        return config
    given = next((name for name in OF_THE_RUN if getattr(config, name)), None)
    if given is not None:
        raise UserError(
            f"{flag(given)} names a network, and so does --arch {config.arch}, whose compact network is"
            " compressed; drop one of them"
        )
    own = config.dataset is not None or config.data_dir is not None
    found = images_of_run(folder_of(config.arch)).items()
    taken: dict[str, Any] = {
        name: value for name, value in found if getattr(config, name) == DEFAULTS[name] and not (own and name in IMAGES)
    }
    return replace(config, pretrained=False, **taken)


def folder_of(arch: Path) -> Path:
    """The folder of a run that is named by it or by its arch.json."""
    return arch if arch.is_dir() else arch.parent


def images_of_run(folder: Path) -> dict[str, Any]:
    """Which images a run was on and how they were prepared, but for what was as when nothing is given."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    values = {k: v for k, v in read_options(path).items() if k in (*IMAGES, *PREPARATION)}
    return {name: value for name, value in typed(SearchConfig, values, path).items() if value != DEFAULTS[name]}


def continued_words(config: SearchConfig) -> tuple[str, ...]:
    """Which options a search shares with the run that it goes on from, in one line."""
    if config.arch is None:
        return ()
    folder = folder_of(config.arch)
    shared = {name: v for name, v in images_of_run(folder).items() if getattr(config, name) == v}
    words = ", ".join(as_given(name, value) for name, value in shared.items())
    return (f"as in {results_path(folder)}: {words}",) if words else ()
