"""A trial without Ray: its outcome, its files here and on a shared place, its row; and which trials ASHA compares."""

import csv
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import nas.stages.retrain
import nas.stages.search
import nas.sweeps.storage
from nas.config import RetrainConfig, SearchConfig
from nas.data.split_names import HELD_OUT
from nas.machine.files import write_csv, write_json
from nas.runs.folder import open_run
from nas.sweeps.options import SweepConfig
from nas.sweeps.storage import Storage, exclusive, scratch, storage_of
from nas.sweeps.table import TrialTable, trial_row
from nas.sweeps.trial import as_plain, epochs_done, finished, outcome_of, run_trial
from nas.sweeps.trials import Trial, make_trials
from search_spaces.errors import UserError

ROOT = Path(__file__).parents[3]
EPOCHS = 3


class Fake:
    """Stands for both stages: three epochs that leave log.csv, and in the end a summary."""

    def __init__(self) -> None:
        self.dies_at: tuple[str, int] | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.ran: list[tuple[str, int, int, bool]] = []

    def __call__(self, stage: str, config: Any, on_epoch: Any) -> Path:
        folder = open_run(config, "").output
        assert folder is not None
        log = folder / "log.csv"
        rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
        for epoch in range(len(rows) + 1, EPOCHS + 1):
            if self.dies_at == (stage, epoch):
                raise self.error
            self.ran.append((stage, config.seed, epoch, config.resume))
            row = {"epoch": epoch, "held_out_subnet_top1": 50.0 + epoch, "selected_gflops": 0.5}
            rows.append(row)  # type: ignore[arg-type]
            write_csv(log, rows)
            print(f"epoch {epoch}")
            on_epoch(row)
        small = {"params": 10, "gflops": 0.5, "top1": 61.0 + config.seed, "top5": 90.0}
        name = "subnet" if stage == "search" else "compact"
        facts = {"stage": stage, "space": "swin-dan-nano", "dataset": "digits", "seed": config.seed}
        facts |= {"split": "test fifth"}
        write_json(folder / "summary.json", facts | {name: small, "large": small})
        (folder / "arch.json").write_text("{}")
        return folder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    stages = Fake()
    monkeypatch.setattr(nas.stages.search, "run_search", lambda c, e: stages("search", c, e))
    monkeypatch.setattr(nas.stages.retrain, "run_retrain", lambda c, e: stages("retrain", c, e))
    return stages


def trial(name: str = "000", retrain: bool = False, **options: Any) -> Trial:
    return Trial(name, options, SearchConfig(**options), RetrainConfig(**options) if retrain else None)


def run(one: Trial, sweep: Path, storage: Storage | None = None, node: str = "node", replay: bool = False) -> list[Any]:
    """The rows reported, but for the first that says where."""
    rows: list[Any] = []
    run_trial(as_plain(one, sweep, storage, replay), node, rows.append)
    return [row for row in rows if row["stage"] != "start"]


def test_a_trial_runs_both_stages_once_and_reports_every_epoch(fake: Fake, tmp_path: Path) -> None:
    one = trial(retrain=True, seed=4)
    rows = run(one, tmp_path)
    assert [(r["stage"], r["epoch"], r["held_out_top1"]) for r in rows] == [
        (stage, epoch, 50.0 + epoch) for stage in ("search", "retrain") for epoch in (1, 2, 3)
    ]
    assert [r.get("iteration") for r in rows] == [1, 2, 3, None, None, None]  # ASHA compares searches
    assert outcome_of(tmp_path / "000")["status"] == "done"
    assert yaml.safe_load((tmp_path / "000/retrain/config.yaml").read_text())["arch"].endswith("000/search/arch.json")
    assert run(one, tmp_path) == []  # nothing is left to do
    assert len(fake.ran) == 6
    assert [r["epoch"] for r in run(one, tmp_path, replay=True)] == [1, 2, 3]  # but a scheduler hears of it
    assert len(fake.ran) == 6


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("the ce term of the loss is nan"), "the ce term"),
        (RuntimeError("out of\nmemory"), "RuntimeError: out"),
    ],
)
def test_a_failed_trial_keeps_its_error_and_is_tried_again(
    error: Exception, says: str, fake: Fake, tmp_path: Path
) -> None:
    fake.dies_at, fake.error = ("search", 2), error
    run(trial(), tmp_path)
    outcome = outcome_of(tmp_path / "000")
    assert outcome["status"] == "failed" and says in outcome["error"] and not finished(outcome)
    assert ("Traceback" in (tmp_path / "000/output.log").read_text()) == isinstance(error, RuntimeError)
    fake.dies_at = None
    run(trial(), tmp_path)
    assert [(epoch, resumed) for _, _, epoch, resumed in fake.ran] == [(1, False), (2, True), (3, True)]
    assert outcome_of(tmp_path / "000")["status"] == "done"


def test_a_trial_that_is_ended_from_outside_has_no_outcome(fake: Fake, tmp_path: Path) -> None:
    """Ray ends a trial by SystemExit in its report; whether that is its end is the driver's to say."""

    def report(row: Any) -> None:
        if row.get("epoch") == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(as_plain(trial(), tmp_path, None, False), "node", report)
    assert outcome_of(tmp_path / "000") == {}
    assert [r["epoch"] for r in epochs_done(tmp_path / "000/search")] == [1, 2]


def test_another_node_takes_a_trial_over_from_the_shared_place(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    sweep, one = tmp_path / "sweep", trial(retrain=True)
    storage = storage_of(str(tmp_path / "shared"), sweep)
    assert storage is not None and storage.uri == (tmp_path / "shared/sweep").as_uri()
    fake.dies_at = ("retrain", 2)
    with pytest.raises(KeyboardInterrupt):
        run(one, sweep, storage, "a")
    assert not sweep.exists()
    stored = tmp_path / "shared/sweep/000"
    assert (stored / "search/arch.json").exists() and len(epochs_done(stored / "retrain")) == 1
    fake.dies_at = None
    run(one, sweep, storage, "b")
    assert [(stage, epoch) for stage, _, epoch, _ in fake.ran] == [
        (s, e) for s in ("search", "retrain") for e in (1, 2, 3)
    ]
    assert (outcome_of(stored)["node"], outcome_of(stored)["status"]) == ("b", "done")
    assert not (scratch(sweep, "b") / "000").exists()  # what is stored is not kept twice
    assert [p for p in stored.rglob("*") if p.name.startswith(".")] == []


def test_only_what_changed_is_copied_and_what_is_cut_short_does_not_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.fs

    here, shared = tmp_path / "here", tmp_path / "shared"
    (here / "search").mkdir(parents=True)
    (here / "search/log.csv").write_text("one")
    (here / "search/checkpoint.pt").write_text("one")
    storage, copied = Storage(shared.as_uri()), []
    copy = pyarrow.fs.copy_files

    def watched(source: str, target: str, **options: Any) -> None:
        copied.append(Path(source).name)
        copy(source, target, **options)

    monkeypatch.setattr(pyarrow.fs, "copy_files", watched)
    storage.push(here, "000")
    storage.push(here, "000")
    assert copied == ["checkpoint.pt", "log.csv"]
    (here / "search/checkpoint.pt").write_text("two!")
    os.utime(here / "search/checkpoint.pt")

    def broken(source: str, target: str, **options: Any) -> None:
        Path(target).write_text("tw")
        raise OSError("the node is gone")

    monkeypatch.setattr(pyarrow.fs, "copy_files", broken)
    with pytest.raises(OSError, match="gone"):
        storage.push(here, "000")
    monkeypatch.setattr(pyarrow.fs, "copy_files", copy)
    storage.pull("000", tmp_path / "there")
    assert {p.name: p.read_text() for p in (tmp_path / "there").rglob("*.*")} == {
        "log.csv": "one",
        "checkpoint.pt": "one",
    }
    storage.push(here, "000")
    storage.pull("000", tmp_path / "there")
    assert (tmp_path / "there/search/checkpoint.pt").read_text() == "two!"
    with pytest.raises(UserError, match="--storage nosuch://x"):
        Storage("nosuch://x").open()


def test_one_process_at_a_time_works_on_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nas.sweeps.storage, "WAIT", 0.3)
    with exclusive(tmp_path / "000"):
        with pytest.raises(UserError, match="another process"), exclusive(tmp_path / "000"):
            pass
        with exclusive(tmp_path / "001"):
            pass
    with exclusive(tmp_path / "000"):
        pass


def test_the_table_has_every_trial_once_whatever_happens(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [trial(f"00{i}", retrain=i == 0, seed=i) for i in range(4)]
    table = TrialTable(tmp_path, trials)

    def states() -> list[str]:
        with open(tmp_path / "trials.csv") as file:
            rows = list(csv.DictReader(file))
        assert [(r["trial"], r["config.seed"]) for r in rows] == [(f"00{i}", str(i)) for i in range(4)]
        return [r["status"] for r in rows]

    assert states() == ["waiting"] * 4
    for name in ("000", "001"):
        table.started(name)
    table.epoch("000", {"stage": "search", "epoch": 2, "held_out_top1": 52.0, "gflops": 0.5})
    table.lost("001")
    assert states() == ["running", "waiting", "waiting", "waiting"]
    table.started("001")
    run(trials[0], tmp_path)
    fake.dies_at, fake.error = ("search", 3), UserError("no luck")
    run(trials[1], tmp_path)
    fake.error = SystemExit()
    with pytest.raises(SystemExit):
        run(trials[2], tmp_path)
    write_json(tmp_path / "002/outcome.json", {"trial": "002", "status": "stopped"})
    for name in ("000", "001", "002"):
        table.ended(name)
    assert states() == ["done", "failed", "stopped", "waiting"]
    done, failed, stopped, _ = table.rows
    assert (done["top1"], done["stage"], done["split"], done["search"]) == (61.0, "retrain", "test fifth", "000/search")
    assert (failed["error"], failed["restarts"], failed["epochs"]) == ("no luck", 1, 2)
    assert (stopped["top1"], stopped["epochs"], stopped["gflops"]) == (52.0, 2, 0.5)  # all there is to know
    assert stopped["split"] == stopped["held_out"] == HELD_OUT and stopped["held_out_top1"] == 52.0
    begun = replace(trials[2], search=replace(trials[2].search, checkpoint=tmp_path / "mine.safetensors"))
    assert trial_row(tmp_path, begun)["split"] == f"{HELD_OUT}, perhaps seen by the checkpoint"
    assert TrialTable(tmp_path, trials).rows[0] == table.rows[0]
    capsys.readouterr()
    table.print_all()
    out = capsys.readouterr().out
    assert "1 done, 1 stopped, 1 failed, 1 waiting" in out and len(re.findall(r"│ 00\d ", out)) == 4


def test_asha_ends_what_falls_behind_among_networks_of_one_cost() -> None:
    from nas.sweeps.ray_tune import AshaByCost

    config = SweepConfig(sweep=("budget=0.2,0.7", "seed=0,1,2,3"), epochs=9, scheduler="asha")
    trials = make_trials(config)
    scheduler = AshaByCost(trials)
    seen = [SimpleNamespace(trial_id=t.name, config={"trial": t.name}) for t in trials]
    for one in seen:
        scheduler.on_trial_add(None, one)
    accuracy = [30, 29, 28, 27, 80, 79, 78, 77]  # the small budget is worse throughout
    actions = []
    for one, top1 in zip(seen, accuracy, strict=True):
        result = {"stage": "search", "iteration": 1, "held_out_top1": float(top1)}
        actions.append(scheduler.on_trial_result(None, one, result))
    assert actions[0] == actions[4] == "CONTINUE"
    assert actions[3] == actions[7] == "STOP"
    assert (
        scheduler.on_trial_result(None, seen[0], {"stage": "search", "iteration": 9, "held_out_top1": 31.0})
        == "CONTINUE"
    )
    assert scheduler.on_trial_result(None, seen[0], {"stage": "retrain", "epoch": 1}) == "CONTINUE"
    scheduler.on_trial_complete(None, seen[0], {})
    scheduler.on_trial_remove(None, seen[1])


def test_ray_is_imported_for_sweeps_and_for_spread_candidates_alone() -> None:
    sources = [
        *ROOT.glob("*.py"),
        *(p for room in ("nas", "supernets", "search_spaces") for p in (ROOT / room).rglob("*.py")),
    ]
    users = {p.name for p in sources if re.search(r"^\s*(import|from) ray\b", p.read_text(), re.MULTILINE)}
    assert users == {"cluster.py", "spread.py", "sweep.py", "ray_tune.py", "trial.py", "trials.py"}


def test_a_job_travels_as_plain_values(tmp_path: Path) -> None:
    config = SweepConfig(sweep=("alphas=1 2,1 2 4",), retrain_trials=True, data_dir=tmp_path)
    for one in make_trials(config):
        job = as_plain(one, tmp_path, None, False)
        assert json.loads(json.dumps(job)) == job
