"""What benchmarks of whole runs share: runs that go on where they stopped, a trained start, means over seeds."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.config import RetrainConfig
from nas.stages.retrain import run_retrain


def resumed(folder: Path) -> dict[str, Any]:
    """Options of a stage that runs there; it goes on if it has begun."""
    return {"output": folder, "resume": (folder / "config.yaml").is_file()}


def trained_start(folder: Path, options: Mapping[str, Any], epochs: int) -> Path:
    """Weights of the large network alone, trained from scratch with flips and crops unless they are there."""
    if not (folder / "summary.json").exists():
        recipe = {"train": "plain", "epochs": epochs, "hflip": 0.5, "scale": (0.5, 1.0)}
        run_retrain(RetrainConfig(**dict(options) | recipe | resumed(folder)))
    return folder / "large.safetensors"


def mean_words(values: list[float], form: str = ".2f", none: str = "–") -> str:
    """Mean and, of several, the standard deviation."""
    if not values:
        return none
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"
