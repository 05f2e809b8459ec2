"""Stage 2: train an architecture adjoined with its backbone and cut the compact network out of it."""

from nas.cli import main
from nas.config import RetrainConfig


def run(config: RetrainConfig) -> None:
    """Import torch only once the command line is known to be good."""
    from nas.stages.retrain import run_retrain

    run_retrain(config)


if __name__ == "__main__":
    main(RetrainConfig, run, "retrain.py")
