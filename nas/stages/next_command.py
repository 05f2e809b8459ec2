"""What to type after a search."""

import shlex
from pathlib import Path

from nas.config import SearchConfig
from nas.runs.folder import results_path


def next_command(config: SearchConfig, folder: Path, arch: str = "arch.json") -> str:
    """What to type for stage 2, quoted for the shell."""
    words = ["python", "retrain.py", "--arch", f"{results_path(folder)}/{arch}"]
    words += ["--recipe", config.recipe] if config.recipe != "toolkit" else []
    return shlex.join(words + data_words(config))


def data_words(config: SearchConfig) -> list[str]:
    """The data set, as it is typed."""
    words = ["--dataset", str(config.dataset)] if config.dataset != "digits" else []
    words += ["--data-dir", str(config.data_dir)] if config.data_dir else []
    return words if config.labels else [*words, "--no-labels"]
