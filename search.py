"""Stage 1: search a vision transformer for a smaller one that shares its weights. Writes arch.json."""

import sys

from nas.cli import main
from nas.config import SweepConfig


def run(config: SweepConfig) -> None:
    """Import torch only once the command line is known to be good."""
    if config.list_spaces:
        from nas.spaces import list_spaces

        list_spaces()
        return
    from nas.sweeps.trials import make_trials, single_search

    if config.sweep:
        trials = make_trials(config)
        from nas.sweeps.sweep import run_sweep

        sys.exit(run_sweep(config, trials))
    from nas.stages.search import run_search

    run_search(single_search(config))


if __name__ == "__main__":
    main(SweepConfig, run, "search.py")
