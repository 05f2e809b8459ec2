"""The options of a sweep: those of a search, and what varies, where it runs and how."""

from dataclasses import dataclass
from typing import Literal

from nas.config import SearchConfig


@dataclass(frozen=True)
class SweepConfig(SearchConfig):
    """Search a backbone for a smaller network that shares its weights, and write arch.json; many by --sweep."""

    sweep: tuple[str, ...] = ()
    """OPTION=VALUES, once per option to vary: a grid (budget=0.2,0.35) or a range (gamma=loguniform(1e-13,1e-11));
    retrain.OPTION=VALUES for the second stage (docs/sweeps.md)"""
    trials: int | None = None
    """of a range: how many draws, for every point of the grid"""
    retrain_trials: bool = False
    """retrain what each trial found"""
    cpus_per_trial: float = 1.0
    """processor cores of a trial; --threads follows unless given"""
    gpus_per_trial: float | None = None
    """GPUs of a trial, or the share of one; by default 1 where the cluster has any"""
    procs_per_trial: int = 1
    """processes of a trial, all on one node, each with --cpus-per-trial and --gpus-per-trial (docs/distributed.md)"""
    max_concurrent: int | None = None
    """trials at a time; as many as fit by default"""
    storage: str | None = None
    """a place that every node of the cluster can write (a folder, or a URI such as s3://bucket/path), through which
    checkpoints and results travel; not needed where --output lies on such a place"""
    scheduler: Literal["fifo", "asha"] = "fifo"
    """run every trial to its end, or stop early those that fall behind (asynchronous successive halving)"""
