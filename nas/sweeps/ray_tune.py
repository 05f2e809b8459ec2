"""Ray Tune's side of a sweep: what it tells about the trials, and which of them it ends early."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from nas.machine.files import write_json
from nas.sweeps.options import SweepConfig
from nas.sweeps.storage import Storage
from nas.sweeps.table import TrialTable
from nas.sweeps.trial import OUTCOME, fetch, outcome_of
from nas.sweeps.trials import Trial

# Networks of different cost are not rivals: accuracy is compared among trials that agree in these.
COSTS = ("space", "dataset", "model", "model_kwargs", "width", "alpha", "price", "budget", "gflops", "mparams", "ms")


class Follower(Callback):  # type: ignore[misc]
    """Keeps the table up to date."""

    def __init__(self, table: TrialTable, sweep: Path, storage: Storage | None) -> None:
        self.table, self.sweep, self.storage = table, sweep, storage

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.table.started(trial.config["trial"])

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.table.epoch(trial.config["trial"], result)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.table.lost(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        reason = " ".join(str(trial.get_error() or "").split())[-300:]
        words = f"its process or node was lost {trial.num_failures} times; the last time: {reason}"
        write_json(self.sweep / name / OUTCOME, {"trial": name, "status": "failed", "error": words})
        self.table.ended(name)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        if self.storage is not None:
            fetch(self.storage, name, self.sweep / name)
        if not outcome_of(self.sweep / name):  # it was not the trial that came to its end
            write_json(self.sweep / name / OUTCOME, {"trial": name, "status": "stopped"})
        self.table.ended(name)


def make_scheduler(config: SweepConfig, trials: Sequence[Trial]) -> Any:
    """FIFO, or ASHA among networks of the same cost."""
    return FIFOScheduler() if config.scheduler == "fifo" else AshaByCost(trials)


class AshaByCost(FIFOScheduler):  # type: ignore[misc]
    """One ASHA (Li et al., 2018) for each group of trials that agree in what their networks may cost.

    Rungs at 1/9, 1/3 of the epochs; a trial that is not among the best third of those that have come to the rung is
    ended. Without the groups the smallest budgets, which are worth as much to a front, would always lose.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.groups = {t.name: str([getattr(t.search, name) for name in COSTS]) for t in trials}
        epochs = {t.name: t.resolved().epochs or 1 for t in trials}
        longest = {g: max(epochs[n] for n, other in self.groups.items() if other == g) for g in self.groups.values()}
        self.ashas = {
            group: ASHAScheduler(
                time_attr="iteration",
                metric="held_out_top1",
                mode="max",
                max_t=most,
                grace_period=max(1, most // 9),
                reduction_factor=3,
                stop_last_trials=False,
            )
            for group, most in longest.items()
        }

    def asha(self, trial: Any) -> Any:
        """The one that a Tune trial belongs to."""
        return self.ashas[self.groups[trial.config["trial"]]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.asha(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action: str = self.asha(trial).on_trial_result(tune_controller, trial, result)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.asha(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.asha(trial).on_trial_remove(tune_controller, trial)
