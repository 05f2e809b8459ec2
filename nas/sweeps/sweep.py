"""Many searches as one: Ray Tune runs the trials, this module keeps the sweep's folder and shows how it goes.

The folder is the truth, not Ray's state: a trial is finished when its own folder says so. Whoever dies, driver, worker
or node, what the folders hold is where the sweep goes on.
"""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nas.machine.cluster import connect
from nas.runs.folder import open_run, results_path
from nas.stages.continued import continued
from nas.sweeps.options import SweepConfig
from nas.sweeps.storage import Storage, storage_of
from nas.sweeps.table import TrialTable
from nas.sweeps.trial import STAGES, as_plain, fetch, finished, outcome_of, trainable
from nas.sweeps.trials import Trial
from search_spaces.errors import UserError

OBJECT_STORE = 128 * 2**20  # bytes; rows of a table are all that passes through it
RESTARTS = 5  # deaths of its process or node that a trial survives


def run_sweep(config: SweepConfig, trials: Sequence[Trial]) -> int:
    """Run every trial that is not finished. Returns the exit code: 1 when a trial failed."""
    check_trials(trials)
    config = continued(config)
    config = replace(config, dataset=config.dataset_name())
    config = open_run(config, f"sweep-{config.space}-{config.dataset}")
    sweep = config.output
    assert sweep is not None
    sweep = sweep.absolute()
    storage = storage_of(config.storage, sweep)
    if storage is not None:
        storage.open()
        for trial in trials:
            if config.resume and not finished(outcome_of(sweep / trial.name)):
                fetch(storage, trial.name, sweep / trial.name)
    table = TrialTable(sweep, trials)
    left = [t for t in trials if not finished(outcome_of(sweep / t.name))]
    todo = f", {len(left)} of them to run" if len(left) < len(trials) else ""
    print(f"{len(trials)} trials in {results_path(sweep)}{todo}", flush=True)
    if left:
        with table.shown():
            run_trials(config, trials, left, sweep, storage, table)
    return conclude(sweep, table)


def check_trials(trials: Sequence[Trial]) -> None:
    """Refuse what a run would refuse, before anything starts. Values that need the data are left to the trial."""
    from nas.stages.asked import resolve

    for trial in trials:
        if trial.search.front:
            raise UserError("--front is several architectures, a trial is one; sweep budgets: --sweep budget=0.2,0.5")
        try:
            resolve(trial.search)
        except UserError as error:
            raise UserError(f"trial {trial.name} ({trial.words()}): {error}") from None


def run_trials(
    config: SweepConfig,
    trials: Sequence[Trial],
    left: Sequence[Trial],
    sweep: Path,
    storage: Storage | None,
    table: TrialTable,
) -> None:
    """Hand the trials to Ray Tune and follow them."""
    import ray

    connect(config.ray_address, OBJECT_STORE)
    from ray import tune

    from nas.sweeps.ray_tune import Follower, make_scheduler

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a lost worker is the table's to tell
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    gpus = trial_gpus(config)
    check_fits(config, gpus)
    # a scheduler that compares is told again what finished trials reached
    replayed = [t for t in trials if t not in left] if config.scheduler == "asha" else []
    again, processes = config.scheduler == "asha", config.procs_per_trial
    jobs = [as_plain(t, sweep, storage, again, processes) for t in [*replayed, *left]]
    for stage in (job[name] for job in jobs for name in STAGES if gpus == 0 and job[name] is not None):
        stage["device"] = stage["device"] or "cpu"  # what Ray has not handed out is not taken
    name = f".tune-{time.strftime('%Y%m%d-%H%M%S')}"
    place = str(sweep) if storage is None else storage.uri
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": config.cpus_per_trial * processes, "gpu": gpus * processes}),
        param_space=tune.grid_search(jobs),
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(config, trials),
            max_concurrent_trials=config.max_concurrent,
            reuse_actors=True,
            trial_name_creator=lambda t: t.config["trial"],
            trial_dirname_creator=lambda t: t.config["trial"],
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=place,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            callbacks=[Follower(table, sweep, storage)],
        ),
    )
    try:
        tuner.fit()
    finally:
        ray.shutdown()
        if storage is None:
            shutil.rmtree(sweep / name, ignore_errors=True)


def trial_gpus(config: SweepConfig) -> float:
    """--gpus-per-trial, or one where the cluster has any."""
    import ray

    if config.gpus_per_trial is not None:
        return config.gpus_per_trial
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def check_fits(config: SweepConfig, gpus: float) -> None:
    """A trial that fits no node would wait for ever."""
    import ray

    cpus, gpus = config.cpus_per_trial * config.procs_per_trial, gpus * config.procs_per_trial
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    if not any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus for n in nodes):
        has = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise UserError(
            f"no node has the {cpus:g} CPUs and {gpus:g} GPUs of a trial (nodes: {has});"
            " lower --cpus-per-trial, --gpus-per-trial or --procs-per-trial"
        )


def conclude(sweep: Path, table: TrialTable) -> int:
    """The last table, the pictures, the page, and what failed."""
    table.write()
    table.print_all()
    from nas.sweeps.page import plot_sweep

    written = ", ".join(path.name for path in plot_sweep(sweep))
    failed = [row for row in table.rows if row["status"] == "failed"]
    for row in failed:
        print(f"trial {row['trial']} failed: {row['error']}", file=sys.stderr)
    print(f"results in {results_path(sweep)}: trials.csv, {written}")
    if failed:
        print(f"{len(failed)} of {len(table.rows)} trials failed; try them again by --resume", file=sys.stderr)
    return 1 if failed else 0
