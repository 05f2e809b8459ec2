"""What Ray costs a sweep: the same trials two at a time, each with one thread, and one by one without Ray.

    python benchmarks/sweep.py                # eight trials of about a minute
    python benchmarks/sweep.py --trials 8 --epochs 6

Both run search.py's search on the embedded digits, vit-dan-nano, one thread per trial. One by one: all in one process
that has imported torch already. Two at a time: search.py --sweep in a process of its own. Ray's own start is what
passes before the first trial's work begins, given apart; so is the last picture and table. A trial's start is the
time between a worker's two trials in which neither runs: outcome, Ray's round trip, the next trial's first line.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

from nas.config import SearchConfig  # noqa: E402


def one_by_one(trials: int, epochs: int, folder: Path) -> list[float]:
    """Seconds of each search, from its options to its pictures."""
    from nas.stages.search import run_search

    seconds = []
    for seed in range(trials):
        start = time.perf_counter()
        run_search(
            SearchConfig(space="vit-dan-nano", epochs=epochs, seed=seed, threads=1, output=folder / f"alone-{seed}")
        )
        seconds.append(time.perf_counter() - start)
    return seconds


def together(trials: int, epochs: int, at_a_time: int, folder: Path) -> tuple[float, list[dict[str, float]]]:
    """Seconds of the whole command, and per trial: its worker, when it began and ended (seconds since the epoch)."""
    command = [sys.executable, "search.py", "--space", "vit-dan-nano", "--epochs", str(epochs), "--threads", "1"]
    command += ["--sweep", f"seed={','.join(map(str, range(trials)))}", "--max-concurrent", str(at_a_time)]
    start = time.perf_counter()
    subprocess.run([*command, "--output", str(folder / "sweep")], cwd=ROOT, check=True, stdout=sys.stderr)
    whole = time.perf_counter() - start
    outcomes = [json.loads(p.read_text()) for p in sorted((folder / "sweep").glob("*/outcome.json"))]
    assert len(outcomes) == trials and all(o["status"] == "done" for o in outcomes)
    return whole, [{k: o[k] for k in ("process", "began", "ended")} for o in outcomes]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--at-a-time", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.time()
        whole, spans = together(options.trials, options.epochs, options.at_a_time, folder)
        alone = one_by_one(options.trials, options.epochs, folder)
    first, last = min(s["began"] for s in spans), max(s["ended"] for s in spans)
    waits = []
    for worker in {s["process"] for s in spans}:
        own = sorted((s["began"], s["ended"]) for s in spans if s["process"] == worker)
        waits += [later[0] - earlier[1] for earlier, later in itertools.pairwise(own)]
    print(
        f"one by one: {sum(alone):.1f} s, {sum(alone) / len(alone):.1f} s each ({min(alone):.1f} to {max(alone):.1f})"
    )
    print(
        f"{options.at_a_time} at a time: {last - first:.1f} s, {(last - first) / sum(alone):.2f} of their sum;"
        f" each took {sum(s['ended'] - s['began'] for s in spans) / len(spans):.1f} s"
    )
    print(f"the command as a whole: {whole:.1f} s; {first - start:.1f} s of it before the first trial began")
    if waits:
        print(f"start of a further trial in a worker: {sum(waits) / len(waits):.2f} s (at most {max(waits):.2f})")
    print(f"workers: {len({s['process'] for s in spans})}, trials: {len(spans)}")


if __name__ == "__main__":
    main()
