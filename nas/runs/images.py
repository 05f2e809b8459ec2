"""Which images a run was on: written down at its beginning, and held against what a resume finds."""

import json
from pathlib import Path
from typing import Any

import yaml

from nas.data.datasets import Splits
from nas.data.images import Images
from nas.machine.distributed import on_main
from nas.machine.files import write_text
from nas.runs.folder import plain, read_options
from nas.runs.options import RunOptions
from search_spaces.errors import UserError, reason

RECORD = "data.json"
PARTS = ("train", "val", "test")


def recognised(config: RunOptions, splits: Splits) -> tuple[str, ...]:
    """Write a run's classes and counts into its folder, or compare those of a resume with them; lines to be said.

    Data that has moved (another --data-dir) is taken where they agree, and config.yaml then names its new place.
    Raises UserError where they do not.
    """
    return on_main(lambda: _recognised(config, splits))


def _recognised(config: RunOptions, splits: Splits) -> tuple[str, ...]:
    assert config.output is not None
    record, options = config.output / RECORD, config.output / "config.yaml"
    saved, now = read_options(options), plain(config)
    moved = saved.get("data_dir") != now["data_dir"]
    where = f"--data-dir was {saved.get('data_dir')}, is now {now['data_dir']}"
    found = images_of(splits)
    if record.is_file():
        difference = _difference(_read(record), found)
        if difference:
            raise UserError(
                f"{config.output}: --resume on other images ({where if moved else now['data_dir']}): {difference};"
                " give the images that the run began with"
            )
    elif moved:
        raise UserError(f"{config.output}: {where}, and the run has no {RECORD} by which its images could be known")
    else:
        write_text(record, json.dumps(found) + "\n")
    if not moved:
        return ()
    write_text(options, yaml.safe_dump(saved | {"data_dir": now["data_dir"]}, sort_keys=False))
    return (f"{where}: the same classes and numbers of images",)


def images_of(splits: Splits) -> dict[str, Any]:
    """The classes, and how many images each has in each part; of a stream the classes alone."""
    parts = {part: getattr(splits, part) for part in PARTS}
    counts = {
        part: None if not isinstance(images, Images) else images.counts(max(splits.num_classes, 1))
        for part, images in parts.items()
    }
    names = splits.class_names
    return {"classes": splits.num_classes if names is None else list(names), "images": counts}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing that two records do not agree on."""
    if before["classes"] != now["classes"]:
        return "its classes are others"
    for part in PARTS:
        then, here = before["images"][part], now["images"][part]
        if then != here:
            return f"{sum(then or ())} images in {part} then, {sum(here or ())} now, or in other classes"
    return None


def _read(record: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(record.read_text())
        _ = value["classes"], [sum(value["images"][part] or ()) for part in PARTS]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{record} is not what a run writes ({reason(error)}); the run cannot go on") from None
    return value
