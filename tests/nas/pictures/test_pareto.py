"""The front holds what is worth having, the hypervolume is the volume, and the published table is whole."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.pictures.pareto import Sense, hypervolume, merge, pareto_front
from search_spaces.errors import UserError

METRICS = ("gflops", "top1", "params_m", "latency")
SENSES: dict[str, Sense] = {"gflops": "min", "top1": "max", "params_m": "min", "latency": "min"}
PUBLISHED = Path(__file__).parents[3] / "results" / "published.csv"


@st.composite
def tables(draw: st.DrawFn, max_rows: int = 12) -> tuple[pd.DataFrame, dict[str, Sense]]:
    """Few distinct values, so that ties and equal rows are common; one to four metrics, some missing."""
    metrics = METRICS[: draw(st.integers(1, 4))]
    value = st.integers(0, 5).map(float) | st.just(math.nan) if draw(st.booleans()) else st.integers(0, 5)
    rows = draw(st.lists(st.tuples(*[value] * len(metrics)), max_size=max_rows))
    return pd.DataFrame(rows, columns=list(metrics), dtype=float), {m: SENSES[m] for m in metrics}


def dominates(a: pd.Series, b: pd.Series, senses: dict[str, Sense]) -> bool:
    better = [a[m] > b[m] if sense == "max" else a[m] < b[m] for m, sense in senses.items()]
    equal = [a[m] == b[m] for m in senses]
    return any(better) and all(x or y for x, y in zip(better, equal, strict=True))


@settings(max_examples=100, deadline=None)
@given(tables())
def test_members_do_not_dominate_each_other_and_every_other_row_is_dominated(
    drawn: tuple[pd.DataFrame, dict[str, Sense]],
) -> None:
    frame, senses = drawn
    front = pareto_front(frame, senses)
    members = [row for _, row in front.iterrows()]
    assert not any(dominates(a, b, senses) for a, b in itertools.permutations(members, 2))
    for index, row in frame.iterrows():
        if row.isna().any():
            assert index not in front.index
        elif index not in front.index:
            assert any(dominates(member, row, senses) for member in members)
    first = front["gflops"].tolist()
    assert first == sorted(first)


def volume_by_cells(frame: pd.DataFrame, senses: dict[str, Sense], reference: dict[str, float]) -> int:
    """On integer points: how many unit cells some row dominates."""
    rows = [[abs(reference[m] - row[m]) for m in senses] for _, row in frame.dropna().iterrows()]
    cells = itertools.product(range(7), repeat=len(senses))
    return sum(any(all(c < g for c, g in zip(cell, row, strict=True)) for row in rows) for cell in cells)


def worst(senses: dict[str, Sense]) -> dict[str, float]:
    return {metric: -1.0 if sense == "max" else 6.0 for metric, sense in senses.items()}


@settings(max_examples=60, deadline=None)
@given(tables(max_rows=8))
def test_hypervolume_counts_the_dominated_cells(drawn: tuple[pd.DataFrame, dict[str, Sense]]) -> None:
    frame, senses = drawn
    assert hypervolume(frame, senses, worst(senses)) == volume_by_cells(frame, senses, worst(senses))


@settings(max_examples=60, deadline=None)
@given(tables(), st.data())
def test_hypervolume_grows_with_points_and_ignores_dominated_ones(
    drawn: tuple[pd.DataFrame, dict[str, Sense]], data: st.DataObject
) -> None:
    frame, senses = drawn
    whole = hypervolume(frame, senses, worst(senses))
    assert hypervolume(pareto_front(frame, senses), senses, worst(senses)) == whole
    some = frame.iloc[: data.draw(st.integers(0, len(frame)))]
    assert hypervolume(some, senses, worst(senses)) <= whole
    if len(frame.dropna()):  # a point better than the best everywhere covers new ground
        ideal = {m: frame[m].max() + 0.5 if s == "max" else frame[m].min() - 0.5 for m, s in senses.items()}
        grown = pd.concat([frame, pd.DataFrame([ideal])], ignore_index=True)
        assert hypervolume(grown, senses, worst(senses)) > whole


@pytest.mark.parametrize("count", [2, 3, 4])
def test_hypervolume_agrees_with_monte_carlo(count: int) -> None:
    rng = np.random.default_rng(count)
    senses = {metric: SENSES[metric] for metric in METRICS[:count]}
    points = rng.uniform(size=(15, count))
    frame = pd.DataFrame(points, columns=list(senses))
    reference = {metric: 0.0 if sense == "max" else 1.0 for metric, sense in senses.items()}
    signs = np.array([-1.0 if sense == "max" else 1.0 for sense in senses.values()])
    samples = rng.uniform(size=(200_000, count))
    covered = (signs * points[:, None] <= signs * samples).all(axis=2).any(axis=0).mean()
    assert hypervolume(frame, senses, reference) == pytest.approx(covered, abs=0.005)


def test_a_point_beyond_the_reference_adds_nothing() -> None:
    """Swin-B at 85.2 % and 15.4 G spans (20 - 15.4) x (85.2 - 80) above (20 G, 80 %)."""
    senses: dict[str, Sense] = {"gflops": "min", "top1": "max"}
    frame = pd.DataFrame({"gflops": [15.4, 25.0, 3.0], "top1": [85.2, 90.0, 79.0]})
    assert hypervolume(frame, senses, {"gflops": 20, "top1": 80}) == pytest.approx(4.6 * 5.2)
    assert hypervolume(frame.iloc[:0], senses, {"gflops": 20, "top1": 80}) == 0


def test_a_metric_that_is_not_there_is_named() -> None:
    frame = pd.DataFrame({"gflops": [1.0]})
    with pytest.raises(UserError, match=r"no column latency .* the table has gflops"):
        pareto_front(frame, {"gflops": "min", "latency": "min"})
    with pytest.raises(UserError, match="no reference value for gflops"):
        hypervolume(frame, {"gflops": "min"}, {"top1": 0})
    with pytest.raises(UserError, match="no metric"):
        pareto_front(frame, {})


def test_merge_keeps_each_run_once_and_as_last_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = pd.DataFrame({"run": ["results/a", "results/b"], "top1": [70.0, 71.0], "gflops": [1.0, 2.0]})
    single = [{"run": "./results/b/", "top1": 72.0}, {"run": str(tmp_path / "results/c"), "top1": 60.0}]
    merged = merge([sweep, single, pd.DataFrame(), [{"run": Path("results/c"), "top1": 61.0}]])
    assert merged["top1"].tolist() == [70.0, 72.0, 61.0]
    assert merged.index.tolist() == [0, 1, 2]
    assert math.isnan(merged["gflops"][1])
    assert len(merge([])) == 0
    with pytest.raises(UserError, match=r"no column `run` but folder"):
        merge([sweep, [{"folder": "results/d"}]])


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED)


@pytest.mark.parametrize(
    ("network", "params_m", "gflops", "top1"),
    [
        ("Swin-B", 88, 15.4, 85.2),
        ("Swin-B-AN-Small-4", 21.32, 2.76, 85.05),
        ("Swin-B-DAN", 38.66, 6.96, 85.27),
        ("T2T-ViT-14", 21.5, 4.8, 81.5),
        ("T2T-ViT-AN-Small-2", 10.2, 2.16, 80.4),
        ("T2T-ViT-DAN", 16.5, 3.36, 81.3),
        ("LeViT-384", 39.1, 2.353, 82.6),
        ("VTP (40 % pruned)", 48.0, 10.0, 80.7),
        ("S²ViTE-Base", 56.8, 11.74, 82.22),
        ("DeiT-4.2G-Isomorphic", 20.69, 4.16, 82.41),
        ("DeiT-2.6G-Isomorphic", 13.07, 2.61, 81.13),
        ("DeiT-1.2G-Isomorphic", 5.74, 1.21, 77.50),
        ("DeiT-0.6G-Isomorphic", 3.08, 0.62, 72.60),
    ],
)
def test_published_rows(published: pd.DataFrame, network: str, params_m: float, gflops: float, top1: float) -> None:
    (row,) = published[published["network"] == network].to_dict("records")
    assert (row["params_m"], row["gflops"], row["top1"]) == (params_m, gflops, top1)


def test_published_table_is_whole(published: pd.DataFrame) -> None:
    assert len(published) == 32
    assert not published[["network", "gflops", "top1", "source", "dataset"]].isna().any(axis=None)
    assert (published["dataset"] == "imagenet").all()
    assert published["gflops"].between(0.6, 20).all()
    assert published["top1"].between(72, 90).all()
    without = published.loc[published["params_m"].isna(), "network"]
    compared = ["HVT", "Patch Slimming", "PoWER", "SCOP"]
    assert sorted(set(without)) == ["DeiT-Small", "DeiT-Small-UVC", *compared[:3], "SCOP", "T2T-UVC"]
    table = published.set_index("network").loc[compared, ["gflops", "top1", "start"]].to_numpy().tolist()
    small = "DeiT-Small"
    assert table == [[2.4, 78.0, small], [2.6, 79.4, small], [2.7, 78.3, small], [2.6, 77.5, small]]
    starts = published.set_index("network")["start"]
    assert starts["Swin-B-DAN"] == "Swin-B" and starts["DeiT-0.6G-Isomorphic"] == "DeiT-Base"
    swin = published.set_index("network").loc["Swin-B"]
    assert (swin["params_m_computed"], swin["gflops_computed"]) == (87.77, 15.43)
    uvc = published[published["network"] == "DeiT-Small-UVC"]
    assert uvc[["gflops", "top1"]].to_numpy().tolist() == [[2.65, 79.44], [2.32, 78.82]]
    dan, whole = (published.set_index("network").loc[name] for name in ("T2T-ViT-DAN", "T2T-ViT-14"))
    assert all(word in dan["note"] for word in ("misprints", "1.33X", "1.31X"))
    assert round(whole["gflops"] / dan["gflops"], 2) == 1.43
    assert round(whole["params_m"] / dan["params_m"], 2) == 1.30


def test_published_front(published: pd.DataFrame) -> None:
    """By FLOPs and top-1 the thesis's networks stand on the literature's front and Swin-B itself does not."""
    front = pareto_front(published, {"gflops": "min", "top1": "max"})["network"].tolist()
    assert front == ["DeiT-0.6G-Isomorphic", "LeViT-256", "LeViT-384", "Swin-B-AN-Small-4", "Swin-B-DAN"]
