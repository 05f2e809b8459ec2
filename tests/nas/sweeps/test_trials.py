"""What --sweep means: which trials, with which options, and what is refused before anything runs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas.cli import parse
from nas.config import RetrainConfig, SearchConfig
from nas.runs.folder import open_run
from nas.sweeps.options import SweepConfig
from nas.sweeps.trials import Trial, make_trials, single_search
from search_spaces.errors import UserError


def trials(*arguments: str) -> list[Trial]:
    return make_trials(parse(SweepConfig, list(arguments), "search.py"))


def test_a_grid_is_every_combination_of_typed_values_over_the_command_line() -> None:
    found = trials(
        "--sweep", "budget=0.2,0.35", "--epochs", "3", "--sweep=no-aug=true,false", "--sweep", "alphas=1 2,1 2 4"
    )
    assert [t.name for t in found] == [f"00{i}" for i in range(8)]
    assert [t.search.budget for t in found] == [0.2] * 4 + [0.35] * 4
    assert [t.search.no_aug for t in found] == [True, True, False, False] * 2
    assert [t.search.alphas for t in found] == [(1, 2), (1, 2, 4)] * 4
    assert all(t.search.epochs == 3 and t.retrain is None for t in found)
    assert found[3].values == {"budget": 0.2, "no_aug": False, "alphas": (1, 2, 4)}
    assert found[3].words() == "budget 0.2, no_aug False, alphas 1 2 4"


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("seed=0,1", [0, 1]),
        ("aa=none,rand-m9-mstd0.5-inc1", ["none", "rand-m9-mstd0.5-inc1"]),
        ("budget=none,0.3", [None, 0.3]),
        ("amp=True,false", [True, False]),
        ("width=stream,inner", ["stream", "inner"]),
        ("model_kwargs=depths=1,1,2,1 img_size=32;img_size=64", [("depths=1,1,2,1", "img_size=32"), ("img_size=64",)]),
        ("gamma=1e-13", [1e-13]),
    ],
)
def test_values_are_read_as_the_command_line_reads_them(spec: str, values: list[Any]) -> None:
    option = spec.partition("=")[0]
    assert [getattr(t.search, option) for t in trials("--sweep", spec)] == values


@pytest.mark.slow
def test_a_range_is_drawn_for_every_point_of_the_grid_and_the_same_every_time() -> None:
    arguments = ("--sweep", "gamma=loguniform(1e-13,1e-11)", "--trials", "40", "--sweep", "seed=0,1")
    found = trials(*arguments)
    assert [t.search.seed for t in found] == [0] * 40 + [1] * 40
    gammas = [float(t.search.gamma or 0) for t in found]
    assert all(1e-13 <= g <= 1e-11 for g in gammas) and len(set(gammas)) == 80
    assert 25 <= sum(math.log10(g) < -12 for g in gammas) <= 55  # evenly in the logarithm
    assert trials(*arguments) == found
    assert [t.search.gamma for t in trials(*arguments, "--seed", "7")] != gammas


@pytest.mark.slow
def test_integers_and_choices_are_drawn_as_such() -> None:
    found = trials("--sweep", "epochs=randint(2,5)", "--sweep", "alphas=choice(1 2,1 2 4)", "--trials", "30")
    assert {t.search.epochs for t in found} == {2, 3, 4}
    assert {t.search.alphas for t in found} == {(1, 2), (1, 2, 4)}


def test_a_trial_is_a_run_of_its_own_with_its_share_of_the_machine(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    arguments = ("--sweep", "seed=0,1", "--data-dir", "pictures", "--output", "sweep", "--cpus-per-trial", "2")
    first, second = trials(*arguments, "--gpus-per-trial", "0")
    assert (first.search.threads, first.search.device) == (2, "cpu")
    assert first.search.data_dir == tmp_path / "pictures"  # a worker may stand elsewhere
    assert first.search.output is None and not first.search.resume
    assert replace(first.search, seed=1) == second.search and type(first.search) is SearchConfig
    assert trials(*arguments, "--threads", "5")[0].search.threads == 5
    assert trials(*arguments)[0].search.device is None


def test_the_second_stage_takes_data_and_seed_from_the_first_and_its_own_options() -> None:
    arguments = ("--sweep", "seed=3,4", "--epochs", "9", "--val-fraction", "0.2", "--retrain-trials")
    _, second = trials(*arguments, "--sweep", "retrain.epochs=5", "--threads", "2")
    assert isinstance(second.retrain, RetrainConfig)
    assert (second.retrain.seed, second.retrain.val_fraction, second.retrain.threads) == (4, 0.2, 2)
    assert second.retrain.epochs == 5 and second.search.epochs == 9
    assert trials(*arguments)[0].retrain.epochs is None  # the space's own


MISTAKES = {
    "no values": (["budget"], "expected OPTION=VALUE,VALUE"),
    "an option misspelt": (["budgt=0.2"], "'budgt' is no option of search.py; expected budget"),
    "an option of the second stage": (["init=base"], "'init' is no option of search.py"),
    "the second stage without it": (["retrain.lr=1e-3"], "--retrain-trials"),
    "what is not a trial's": (["output=a,b"], "--output cannot be swept"),
    "what is the sweep's": (["trials=1,2"], "is no option of search.py"),
    "not a number": (["budget=0.2,half"], "'half' is no value of --budget"),
    "not one of": (["width=inner,outer"], "'outer' is no value of --width"),
    "a broken number of epochs": (["epochs=uniform(1,3)", 2], "is no value of --epochs"),
    "a value twice": (["budget=0.2,0.20"], "0.2 stands there twice"),
    "an option twice": (["seed=0,1", "seed=2"], "--sweep seed is given twice"),
    "a range without a number of draws": (["budget=uniform(0.2,0.5)"], "say --trials N"),
    "draws without a range": (["seed=0,1", 3], "--trials counts the draws of a range"),
    "no draws": (["budget=uniform(0.2,0.5)", 0], "expected at least 1"),
    "a range unknown": (["budget=normal(0,1)", 2], "expected one of uniform, quniform"),
    "a range the wrong way round": (["budget=uniform(0.5,0.2)", 2], "expected uniform(low,high)"),
    "a range of words": (["budget=uniform(a,b)", 2], "expected uniform(low,high)"),
    "a logarithm of nothing": (["gamma=loguniform(0,1)", 2], "low above 0"),
    "a choice of what is not allowed": (["alphas=choice(1 2,one)", 2], "'one' is no value of --alphas"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused_in_one_line(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    specs, says = MISTAKES[mistake]
    number = ["--trials", str(specs.pop())] if isinstance(specs[-1], int) else []
    with pytest.raises(UserError) as error:
        trials(*(part for spec in specs for part in ("--sweep", spec)), *number)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cpus-per-trial", "0"], "more than 0"),
        (["--gpus-per-trial", "-1"], "0 or more"),
        (["--max-concurrent", "0"], "at least 1"),
        (["--scheduler", "asha", "--val-fraction", "0"], "--val-fraction above 0"),
    ],
)
def test_shares_of_a_machine_that_no_trial_can_have(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        trials("--sweep", "seed=0,1", *arguments)


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="under torchrun"):
        trials("--sweep", "seed=0,1")


def test_options_of_a_sweep_without_one_are_refused_and_a_search_does_not_know_them() -> None:
    with pytest.raises(UserError, match="--retrain-trials goes with --sweep"):
        single_search(parse(SweepConfig, ["--retrain-trials"], "search.py"))
    assert single_search(parse(SweepConfig, ["--seed", "3"], "search.py")) == SearchConfig(seed=3)


def test_a_resume_knows_the_sweep_and_a_yaml_file_may_hold_it(tmp_path: Path) -> None:
    config = parse(SweepConfig, ["--sweep", "seed=0,1", "--sweep", "budget=0.3", "--output", str(tmp_path / "s")], "p")
    open_run(config, "")
    resumed = parse(SweepConfig, ["--output", str(tmp_path / "s"), "--resume", "--max-concurrent", "1"], "search.py")
    assert make_trials(resumed) == make_trials(config)
    assert open_run(resumed, "") == resumed
    with pytest.raises(UserError, match="sweep: was"):
        open_run(replace(resumed, sweep=("seed=0,1,2",)), "")
    (tmp_path / "sweep.yaml").write_text("sweep:\n- seed=0,1\n- budget=0.3\n")
    from_file = parse(SweepConfig, ["--config", str(tmp_path / "sweep.yaml")], "search.py")
    assert make_trials(from_file) == make_trials(config)
