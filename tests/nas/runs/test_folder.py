"""A run's folder: what may differ between a run and its resumption, and what may not."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.config import SearchConfig
from nas.prices.options import BAND
from nas.runs.folder import WRITTEN, open_run, saved_config
from nas.sweeps.options import SweepConfig
from search_spaces.errors import UserError


def test_a_resume_with_other_options_is_refused_by_name(tmp_path: Path) -> None:
    config = open_run(SearchConfig(output=tmp_path / "run", lr=1e-3, workers=2), "search")
    again = replace(config, resume=True)
    assert open_run(replace(again, workers=0), "search").output == tmp_path / "run"
    with pytest.raises(UserError, match=r"--resume with other options \(lr: was 0\.001, now 0\.01\)"):
        open_run(replace(again, lr=1e-2), "search")
    with pytest.raises(UserError, match="already holds a run"):
        open_run(config, "search")


def test_a_run_goes_on_that_began_before_an_option_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    open_run(SearchConfig(output=folder, lr=1e-3), "search")
    options = yaml.safe_load((folder / "config.yaml").read_text())
    del options["band"], options["searcher"]
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    config = replace(saved_config(SearchConfig, folder), resume=True)
    assert open_run(config, "search").band == BAND
    with pytest.raises(UserError, match=f"band: was {BAND}, now 0.1"):
        open_run(replace(config, band=0.1), "search")


@pytest.mark.parametrize("name", ["log.csv", "arch.json", "compact.safetensors", "curves.png", "README.md", "best.pt"])
def test_files_that_are_no_runs_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name}, and no run; .* choose a folder of its own"):
        open_run(SearchConfig(output=tmp_path), "search")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "mine"}


def test_a_folder_of_runs_and_of_notes_may_hold_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    open_run(SearchConfig(output=tmp_path / "first"), "search")
    assert open_run(SearchConfig(output=tmp_path), "search").output == tmp_path


def test_what_runs_leave_is_known_by_its_kind(tmp_path: Path) -> None:
    """All that the README says a run leaves."""
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    names = re.findall(
        r"`([a-z_]+\.[a-z0-9]+)`", readme[readme.index("| file |") : readme.index("## Your own network")]
    )
    assert len(names) > 20
    assert {Path(name).suffix for name in names if not name.endswith(".py")} <= WRITTEN


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [open_run(SearchConfig(), "search-x").output for _ in range(4)]
    assert len(set(folders)) == 4 and all((f / "config.yaml").is_file() for f in folders if f is not None)


@pytest.mark.parametrize("kind", ["too long", "under a file", "read only", "a file"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {
        "too long": tmp_path / ("x" * 300),
        "under a file": tmp_path / "file" / "run",
        "a file": tmp_path / "file",
    }
    if kind == "read only":  # root may write anywhere

        def refused(self: Path, *args: Any, **options: Any) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(
        UserError, match=r"^--output .*(File name too long|Not a directory|Permission denied|is a file)"
    ):
        open_run(SearchConfig(output=folder.get(kind, tmp_path / "run")), "search")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: fast", "option 'lr' is 'fast'; expected float"),
        ("epochs: [1, 2]", r"option 'epochs' is \(1, 2\); expected int"),
        ("aa: {a: 1}", "option 'aa' is {'a': 1}"),
        ("width: sideways", "option 'width' is 'sideways'"),
        ("- lr", "expected a mapping"),
        ("7", "expected a mapping"),
        ("lr: [", "not readable as YAML"),
        ("lr: 2020-99-99", "not readable as YAML"),
        ("loops: 3", "unknown option 'loops'"),
    ],
)
def test_an_edited_config_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        saved_config(SearchConfig, tmp_path)


def test_more_epochs_are_taken_and_said_and_fewer_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    config = open_run(SearchConfig(output=folder, epochs=4), "search")
    with pytest.raises(UserError, match="epochs: was 4, now 3"):
        open_run(replace(config, resume=True, epochs=3), "search")
    with pytest.raises(UserError, match=r"\(lr: was None, now 0\.1\)"):
        open_run(replace(config, resume=True, epochs=9, lr=0.1), "search")
    assert saved_config(SearchConfig, folder).epochs == 4
    open_run(replace(config, resume=True, epochs=9), "search")
    assert "--epochs 4, now 9: from here on the schedules" in capsys.readouterr().out
    assert saved_config(SearchConfig, folder).epochs == 9


def test_data_may_move_under_a_run_but_not_under_a_sweep(tmp_path: Path) -> None:
    for folder, more in (("run", ()), ("sweep", ("budget=0.3,0.5",))):
        config = SweepConfig(output=tmp_path / folder, data_dir=Path("here"), sweep=more)
        moved = replace(open_run(config, "search"), data_dir=Path("there"), resume=True)
        if not more:
            assert open_run(moved, "search").data_dir == Path("there")  # nas/runs/images.py looks at it
        else:
            with pytest.raises(UserError, match="data_dir: was 'here', now 'there'"):
                open_run(moved, "search")
