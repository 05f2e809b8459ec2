"""Candidates spread over workers of Ray: what one process finds, whoever is lost (section 2.12)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas.machine.cluster import connect
from nas.searchers.spread import Spread
from nas.stages.search import run_search
from search_spaces.errors import UserError
from tests.nas.stages.free_world import World, world
from tests.nas.stages.test_free import assert_same, rows_of
from tests.nas.stages.test_searchers import search

__all__ = ["world"]  # the fixture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("searcher", "method", "family"),
    [("random", "free", "swin"), ("evolution", "free", "vit"), ("evolution", "dan", "vit")],
)
def test_workers_find_what_one_process_finds(
    searcher: str, method: str, family: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = search(world, tmp_path / "alone", searcher, method, family)
    alone = run_search(replace(config, threads=1))
    capsys.readouterr()
    spread = run_search(replace(config, threads=1, output=tmp_path / "spread", ray_address="local"))
    assert "of Ray" in capsys.readouterr().out
    assert_same_candidates(spread, alone)


def assert_same_candidates(spread: Path, alone: Path) -> None:
    assert_same(spread, alone)
    assert [row | {"seconds": ""} for row in rows_of(spread)] == [row | {"seconds": ""} for row in rows_of(alone)]


@pytest.mark.slow
def test_whoever_is_lost_a_search_ends_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First one worker, then all others."""
    import ray

    config = replace(search(world, tmp_path / "alone", "evolution", "dan"), threads=1)
    alone, taken, take = run_search(config), [], Spread.take

    def losing(self: Spread, name: str) -> Any:
        taken.append(name)
        for worker in self.workers[: 1 if len(taken) == 2 else 99 if len(taken) == 5 else 0]:
            ray.kill(worker)
        return take(self, name)

    monkeypatch.setattr(Spread, "take", losing)
    config = replace(config, output=tmp_path / "spread", ray_address="local")
    folder = run_search(config)
    assert "the search goes on here" in capsys.readouterr().out
    assert_same_candidates(folder, alone)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:9", "refused"),
        ("127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:port", "HOST:PORT"),
        ("127.0.0.1:99999", "HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_at_once(address: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"--ray-address {address}: no Ray cluster there \(.*{why}.*\); start one by"):
        connect(address)


@pytest.mark.parametrize(("searcher", "method"), [("importance", "free"), ("uniform", "dan"), ("gradient", "dan")])
def test_searches_whose_candidates_wait_for_one_another_are_not_spread(
    searcher: str, method: str, world: World, tmp_path: Path
) -> None:
    config = search(world, tmp_path / "run", "random", method)
    config = replace(config, searcher=searcher, candidates=None, ray_address="local")
    with pytest.raises(UserError, match=r"--ray-address local goes with a search by evolution or random"):
        run_search(config)
