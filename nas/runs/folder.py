"""A run's folder: its options, its log, its results. All files are written atomically."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from nas.machine.distributed import on_main, world_size
from nas.machine.files import write_text
from nas.runs.options import RunOptions
from search_spaces.errors import UserError, reason

LARGE, SUPERNET = "large.safetensors", "supernet.safetensors"  # weights that a retrain and a search leave

WRITTEN = {  # kinds of files that a run or a sweep leaves in its folder
    ".csv", ".html", ".json", ".log", ".md", ".onnx", ".pdf", ".png", ".pt", ".pt2", ".safetensors", ".yaml",
}  # fmt: skip

C = TypeVar("C", bound=RunOptions)
SWEEP_PLACE = ("ray_address", "cpus_per_trial", "gpus_per_trial", "procs_per_trial", "max_concurrent")
# may differ between a run and its resumption
OFTEN = ("checkpoint_every", "log_every", "on_nan")
PLACE = ("output", "resume", "device", "workers", "threads", "processes", "literature", *OFTEN, *SWEEP_PLACE)


def plain(config: RunOptions) -> dict[str, Any]:
    """The options as YAML can hold them."""
    values = asdict(config)
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def open_run(config: C, name: str) -> C:
    """Create the run folder, or check the one to resume. Returns the config with its output folder set.

    Without --output it is results/<name>-<time>, one of its own for every run.

    A run that goes on with another number of processes keeps its global batch: --batch-size becomes each one's share.
    Raises UserError when the folder already holds a run and --resume was not given, or files that a run might write
    over, when there is nothing to resume, when an option differs from the run's own, or when it cannot be written.
    """
    return on_main(lambda: _open_run(config, name))


def _open_run(config: C, name: str) -> C:
    processes = world_size()
    if config.output is None:
        if config.resume:
            raise UserError("--resume needs --output DIR, the folder of the run to go on with")
        config = replace(config, output=_new_folder(f"{name}-{datetime.now():%Y%m%d-%H%M%S}"))
    folder = config.output
    assert folder is not None
    saved = folder / "config.yaml"
    if _holds_run(folder):
        if not config.resume:
            raise UserError(f"{folder} already holds a run; go on with it by --resume or choose another --output")
        # an option that came later than the run is as it was: not given
        before, now = plain(type(config)()) | read_options(saved), plain(config)
        longer = _longer(before.get("epochs"), now.get("epochs"))
        # a run's data may have moved (images.py sees that it is the same); a sweep's trials are not all to run again
        free = PLACE if getattr(config, "sweep", ()) else (*PLACE, "data_dir")
        changed = [k for k in now if k not in free and before.get(k) != now[k] and not (longer and k == "epochs")]
        if changed:
            words = ", ".join(f"{k}: was {before.get(k)!r}, now {now[k]!r}" for k in changed)
            raise UserError(f"{folder}: --resume with other options ({words}); leave them as they were")
        if longer:
            write_text(saved, yaml.safe_dump(before | {"epochs": now["epochs"]}, sort_keys=False))
            print(
                f"--epochs {before['epochs']}, now {now['epochs']}: from here on the schedules (learning rate, lambda,"
                f" tau) are those of a run of {now['epochs']} epochs; a rate that had fallen rises again"
            )
        for half_written in folder.glob(".*.tmp*"):  # what a kill left of files it was writing
            half_written.unlink(missing_ok=True)
        size: int | None = getattr(config, "batch_size", None)
        if size is None:  # a sweep, whose trials have their own
            return config
        images = size * (before.get("processes") or 1)
        if images % processes:
            raise UserError(f"{folder}: its steps take {images} images, which {processes} processes cannot share")
        share: dict[str, Any] = {"batch_size": images // processes}
        return replace(config, **share, processes=processes if processes > 1 else None)
    if config.resume:
        raise UserError(f"{folder} holds no run to resume (no config.yaml)")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    _make_folder(folder)
    foreign = sorted(p.name for p in folder.iterdir() if p.suffix in WRITTEN and p.is_file())
    if foreign:
        raise UserError(
            f"--output {folder} holds {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}, and no run; a run might"
            " write over files like these: choose a folder of its own"
        )
    config = replace(config, processes=processes if processes > 1 else None)
    write_text(saved, yaml.safe_dump(plain(config), sort_keys=False))
    return config


def _longer(before: Any, now: Any) -> bool:
    """Whether a resume asks for more epochs than the run had."""
    return isinstance(before, int) and isinstance(now, int) and now > before


def _holds_run(folder: Path) -> bool:
    try:
        return (folder / "config.yaml").exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise _unusable(folder, error) from None


def _make_folder(folder: Path, new: bool = False) -> None:
    """UserError where it cannot be; FileExistsError where it is to be new and is not."""
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except FileExistsError:
        raise
    except OSError as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: OSError) -> UserError:
    name = str(folder) if len(str(folder)) <= 200 else f"{str(folder)[:200]}..."
    return UserError(f"--output {name}: {error.strerror}; give a folder that can be written")


def _new_folder(name: str) -> Path:
    """results/<name>, made; with a number where another run began in the same second."""
    for number in count(1):
        folder = Path("results") / (name if number == 1 else f"{name}-{number}")
        try:
            _make_folder(folder, new=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count does not end")


def read_options(path: Path) -> dict[str, Any]:
    """The options in a run's config.yaml. UserError when it is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({reason(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options to values")
    return {str(name): value for name, value in values.items()}


def saved_config(kind: type[C], folder: Path) -> C:
    """The options of an earlier run, for --resume."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} holds no run to resume (no config.yaml)")
    return kind(**typed(kind, read_options(path), path))


def typed(kind: type[RunOptions], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """YAML values as the config's types: lists become tuples, paths Paths; other names and types are refused."""
    known = {f.name: f for f in fields(kind)}
    result = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise UserError(f"{path}: unknown option {name!r}")
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and "Path" in str(known[key].type):
            value = Path(value)
        if not fits(value, known[key].type):
            raise UserError(f"{path}: option {name!r} is {value!r}; expected {words_of(known[key].type)}")
        result[key] = value
    return result


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, k) for k in kinds)
    if origin is Annotated:
        return fits(value, kinds[0])
    if origin is Literal:
        return value in kinds
    if origin is tuple and isinstance(value, tuple):
        each = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        return len(value) == len(each) and all(map(fits, value, each))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else origin or kind)


def words_of(kind: Any) -> str:
    """An option's type as an error names it."""
    return str(kind) if get_args(kind) else str(kind.__name__)


def results_path(folder: Path) -> str:
    """A path as the user may type it."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
