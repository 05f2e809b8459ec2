"""Which networks are worth having: the non-dominated set over any metrics, its hypervolume, merged runs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search_spaces.errors import UserError

Sense = Literal["max", "min"]  # is more of this metric better, or less?
Senses = Mapping[str, Sense]  # e.g. {"gflops": "min", "top1": "max"}
RUN = "run"  # the column with a run's folder, by which a run is known


def pareto_front(frame: pd.DataFrame, senses: Senses) -> pd.DataFrame:
    """The rows no other row dominates, ordered by the first metric, columns and index kept.

    A row dominates another when it is at least as good in every metric and better in one; rows equal in every
    metric therefore stay together. A row that lacks a metric is not compared: it is never in the front.
    Raises UserError for a metric the frame has no column for.
    """
    losses = _losses(frame, senses)
    compared = np.flatnonzero(~np.isnan(losses).any(axis=1))
    kept = compared[_non_dominated(losses[compared])]
    first = losses[kept, 0]
    return frame.iloc[kept[np.argsort(first, kind="stable")]]


def hypervolume(frame: pd.DataFrame, senses: Senses, reference: Mapping[str, float]) -> float:
    """The volume of metric space that the rows dominate, bounded by a reference point; exact.

    reference: per metric a value worse than any worth having; what is not better than it in every metric adds
    nothing, nor does a row that lacks a metric. Unit: the product of the metrics' units. Sorting and slicing
    along one metric after another takes O(n^(metrics - 1)) steps, meant for the tens of members of a front.
    Raises UserError for a metric without column or reference value.
    """
    absent = [metric for metric in senses if metric not in reference]
    if absent:
        raise UserError(f"hypervolume: no reference value for {', '.join(absent)}; give one for every metric")
    losses = _losses(frame, senses)
    signs = np.array([-1.0 if sense == "max" else 1.0 for sense in senses.values()])
    gains = signs * np.array([reference[metric] for metric in senses]) - losses  # how much better, per metric
    gains = gains[(gains > 0).all(axis=1)]  # a missing metric (NaN) is not
    return _dominated_volume(gains[_non_dominated(-gains)])


def merge(tables: Iterable[pd.DataFrame | Sequence[Mapping[str, object]]]) -> pd.DataFrame:
    """One frame out of sweeps and single runs, each a frame or a list of records with a `run` column.

    A run seen twice (its folder, however the path is spelt) is kept once: the last seen, as it stands now.
    Raises UserError for a table without `run`.
    """
    frames = [pd.DataFrame(table) for table in tables]
    for frame in frames:
        if len(frame) and RUN not in frame.columns:
            found = ", ".join(map(str, frame.columns))
            raise UserError(f"a table of runs has no column `{RUN}` but {found}; expected each run's folder")
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return pd.DataFrame(columns=[RUN])
    merged = pd.concat(frames, ignore_index=True)
    folders = merged[RUN].map(os.path.abspath)
    return merged[~folders.duplicated(keep="last")].reset_index(drop=True)


def _losses(frame: pd.DataFrame, senses: Senses) -> NDArray[np.float64]:
    """(rows, metrics), every metric turned so that less is better."""
    if not senses:
        raise UserError("no metric to compare by; name at least one")
    absent = [metric for metric in senses if metric not in frame.columns]
    if absent:
        found = ", ".join(map(str, frame.columns))
        raise UserError(f"no column {', '.join(absent)} to compare by; the table has {found}")
    signs = np.array([-1.0 if sense == "max" else 1.0 for sense in senses.values()])
    values: NDArray[np.float64] = frame[list(senses)].to_numpy(dtype=np.float64)
    return np.asarray(signs * values)


def _non_dominated(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) whether no other of the (n, metrics) rows is as small everywhere and smaller somewhere."""
    kept = np.ones(len(losses), dtype=bool)
    for i, row in enumerate(losses):
        kept[i] = not ((losses <= row).all(axis=1) & (losses < row).any(axis=1)).any()
    return kept


def _dominated_volume(gains: NDArray[np.float64]) -> float:
    """The volume of the union of boxes from 0 to each of the (n, metrics) rows."""
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    ordered = gains[np.argsort(-gains[:, -1], kind="stable")]
    heights = ordered[:, -1] - np.append(ordered[1:, -1], 0.0)  # of the slab that the first i + 1 boxes reach
    slabs = (h * _dominated_volume(ordered[: i + 1, :-1]) for i, h in enumerate(heights) if h)
    return float(sum(slabs))
