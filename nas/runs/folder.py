"""A run's folder: its options, its log, its results. All files are written atomically."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nas.machine.distributed import on_main, world_size
from nas.machine.files import write_text
from nas.runs.options import RunOptions
from search_spaces.errors import UserError

LARGE, SUPERNET = "large.safetensors", "supernet.safetensors"  # weights that a retrain and a search leave

C = TypeVar("C", bound=RunOptions)
SWEEP_PLACE = ("ray_address", "cpus_per_trial", "gpus_per_trial", "procs_per_trial", "max_concurrent")
# may differ between a run and its resumption
PLACE = ("output", "resume", "device", "workers", "threads", "processes", *SWEEP_PLACE)


def plain(config: RunOptions) -> dict[str, Any]:
    """The options as YAML can hold them."""
    values = asdict(config)
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def open_run(config: C, name: str) -> C:
    """Create the run folder, or check the one to resume. Returns the config with its output folder set.

    A run that goes on with another number of processes keeps its global batch: --batch-size becomes each one's share.
    Raises UserError when the folder already holds a run and --resume was not given, when there is nothing to
    resume, or when an option differs from the run's own.
    """
    return on_main(lambda: _open_run(config, name))


def _open_run(config: C, name: str) -> C:
    processes = world_size()
    if config.output is None:
        if config.resume:
            raise UserError("--resume needs --output DIR, the folder of the run to go on with")
        from datetime import datetime

        config = replace(config, output=Path("results") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = config.output
    assert folder is not None
    saved = folder / "config.yaml"
    if saved.exists():
        if not config.resume:
            raise UserError(f"{folder} already holds a run; go on with it by --resume or choose another --output")
        # an option that came later than the run is as it was: not given
        before, now = plain(type(config)()) | yaml.safe_load(saved.read_text()), plain(config)
        # a run's data may have moved (images.py sees that it is the same); a sweep's trials are not all to run again
        free = PLACE if getattr(config, "sweep", ()) else (*PLACE, "data_dir")
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            words = ", ".join(f"{k}: was {before.get(k)!r}, now {now[k]!r}" for k in changed)
            raise UserError(f"{folder}: --resume with other options ({words}); leave them as they were")
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
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, processes=processes if processes > 1 else None)
    write_text(saved, yaml.safe_dump(plain(config), sort_keys=False))
    return config


def saved_config(kind: type[C], folder: Path) -> C:
    """The options of an earlier run, for --resume."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} holds no run to resume (no config.yaml)")
    return kind(**typed(kind, yaml.safe_load(path.read_text()), path))


def typed(kind: type[RunOptions], values: Any, path: Path) -> dict[str, Any]:
    """YAML values as the config's types: lists become tuples, paths Paths; unknown names are refused."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options to values")
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
        result[key] = value
    return result


def results_path(folder: Path) -> str:
    """A path as the user may type it."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
