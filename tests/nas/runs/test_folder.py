"""A run's folder: what may differ between a run and its resumption, and what may not."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nas.config import SearchConfig
from nas.runs.folder import open_run, saved_config
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
    del options["price"], options["searcher"]
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    config = replace(saved_config(SearchConfig, folder), resume=True)
    assert open_run(config, "search").price == "flops"
    with pytest.raises(UserError, match="price: was 'flops', now 'params'"):
        open_run(replace(config, price="params"), "search")


def test_data_may_move_under_a_run_but_not_under_a_sweep(tmp_path: Path) -> None:
    for folder, more in (("run", ()), ("sweep", ("budget=0.3,0.5",))):
        config = SweepConfig(output=tmp_path / folder, data_dir=Path("here"), sweep=more)
        moved = replace(open_run(config, "search"), data_dir=Path("there"), resume=True)
        if not more:
            assert open_run(moved, "search").data_dir == Path("there")  # nas/runs/images.py looks at it
        else:
            with pytest.raises(UserError, match="data_dir: was 'here', now 'there'"):
                open_run(moved, "search")
