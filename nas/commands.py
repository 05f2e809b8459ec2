"""search.py and retrain.py of a checkout, vit-nas-search and vit-nas-retrain of an installed package."""

import sys

from nas.cli import main
from nas.config import RetrainConfig
from nas.sweeps.options import SweepConfig


def search() -> None:
    """Stage 1: search a vision transformer for a smaller one that shares its weights. Writes arch.json."""
    main(SweepConfig, start_search)


def retrain() -> None:
    """Stage 2: train an architecture adjoined with its backbone and cut the compact network out of it."""
    main(RetrainConfig, start_retrain)


def start_search(config: SweepConfig) -> None:
    """Import torch only once the command line is known to be good."""
    if config.list_spaces:
        from nas.spaces import list_spaces

        list_spaces(config.verbose)
        return
    from nas.sweeps.trials import make_trials, single_search

    if config.sweep:
        from nas.machine.cluster import settle

        settle(config.ray_address)  # before a range is drawn, by Ray's samplers
        trials = make_trials(config)
        from nas.sweeps.sweep import run_sweep

        sys.exit(run_sweep(config, trials))
    from nas.stages.search import run_search

    run_search(single_search(config))


def start_retrain(config: RetrainConfig) -> None:
    """As start_search."""
    from nas.stages.retrain import run_retrain

    run_retrain(config)
