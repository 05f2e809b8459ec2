"""The README's search alone and beside busy processes, by how its threads are set: images a second, in turn.

    python benchmarks/threads.py --busy 0 1 2 --epochs 2

`chosen`: as a run does it, by a timing at its start. `all`: torch's own number, as it was before. `one`: one thread.
`passive`: all, which sleep where they would spin (OMP_WAIT_POLICY). A busy process counts in Python on one core.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nas.runs.folder import read_options

ROOT = Path(__file__).resolve().parent.parent
ALL = str(torch.get_num_threads())
SETTINGS: dict[str, tuple[list[str], dict[str, str]]] = {
    "chosen": ([], {}),
    "all": (["--threads", ALL], {}),
    "one": (["--threads", "1"], {}),
    "passive": (["--threads", ALL], {"OMP_WAIT_POLICY": "passive"}),
}


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that take a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def speed(setting: str, options: argparse.Namespace) -> tuple[float, int]:
    """Images a second in the last epoch of a search, and its threads."""
    words, environment = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "search.py", "--space", options.space, "--epochs", str(options.epochs), *words]
        own = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        subprocess.run(
            [*command, "--output", str(run)], cwd=ROOT, env=own | environment, check=True, stdout=subprocess.DEVNULL
        )
        with (run / "log.csv").open() as log:
            rows = list(csv.DictReader(log))
        threads = read_options(run / "config.yaml")["threads"]
    return float(rows[-1]["images_per_s"]), threads or 1  # where there is one core, nothing is chosen


def main() -> None:
    """Every setting in turn, beside as many busy processes as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="swin-dan-nano", help="a -nano space: the digits are built in")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    print(f"{'busy':>4}  {'setting':>8}  {'threads':>7}  images/s")
    for number in options.busy:
        for setting in options.settings:
            with busy(number):
                images, threads = speed(setting, options)
            print(f"{number:>4}  {setting:>8}  {threads:>7}  {images:.0f}", flush=True)


if __name__ == "__main__":
    main()
