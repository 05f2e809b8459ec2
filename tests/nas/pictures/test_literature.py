"""A user's own points stand behind runs on their data set, with their source; a wrong file is refused by its place."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from nas.config import SearchConfig
from nas.pictures.literature import PUBLISHED, literature, read_literature
from nas.pictures.run import plot_run
from nas.pictures.scatter import pareto_figure
from nas.plot import plot_all
from search_spaces.errors import UserError

HEAD = "network,dataset,gflops,top1,source,params_m,start,note\n"
MINE = "Mine,flowers,0.9,81.5,my thesis,5.1,DeiT-Tiny,\n"
THEIRS = "Theirs,imagenet,1.1,70.25,their page,,,\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_points_stand_behind_runs_on_their_data_set_alone(tmp_path: Path) -> None:
    own = written(tmp_path / "own.csv", HEAD + MINE + THEIRS)
    flowers = literature("flowers", own)
    assert flowers[["network", "gflops", "top1", "params_m", "source"]].to_numpy().tolist() == [
        ["Mine", 0.9, 81.5, 5.1, "my thesis"]
    ]
    imagenet = literature("imagenet", own)
    assert imagenet["network"].tolist()[-1] == "Theirs" and len(imagenet) == len(read_literature(PUBLISHED)) + 1
    assert len(literature("digits", own)) == 0 and len(literature("flowers")) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1 has no column network but nothing; expected network, dataset, source, gflops, top1"),
        ("network,dataset,gflops,top1\n", "line 1 has no column source"),
        (HEAD + MINE + "X,flowers,abc,80,s,,,\n", "line 3, column gflops is 'abc'; expected a number above 0"),
        (HEAD + "X,flowers,1,nan,s,,,\n", "line 2, column top1 is 'nan'; expected a number above 0"),
        (HEAD + "X,flowers,1,0.8e3,s,,,\n", "line 2, column top1 is 800; expected per cent"),
        (HEAD + "X,flowers,1,80,,,,\n", "line 2, column source is empty"),
        (HEAD + "X,flowers,1,80,s,-4,,\n", "line 2, column params_m is '-4'"),
        (HEAD + "X,flowers,1\n", "line 2 has 3 cells; expected 8"),
        (HEAD + '"X,flowers', "not readable as CSV"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_column(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path / "own.csv", text)
    with pytest.raises(UserError) as error:
        read_literature(path)
    assert str(error.value).startswith(str(path)) and says in str(error.value)
    with pytest.raises(UserError, match=r"own\.csv"):  # before anything is trained
        SearchConfig(literature=path).check()


def test_no_such_file() -> None:
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        SearchConfig(literature=Path("none.csv")).check()


def run_folder(folder: Path, dataset: str, literature: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    costs = {"params": 5e6, "gflops": 1.0, "top1": 80.0}
    summary = {"stage": "retrain", "space": "vit-dan", "dataset": dataset, "split": "val", "compact": costs}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"seed: 1\nliterature: {literature or 'null'}\n")
    return folder


def legends(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Texts of the legends and labels of every Pareto picture that is drawn from here on."""
    seen: list[list[str]] = []

    def record(points: pd.DataFrame, title: str, **options: object) -> object:
        figure = pareto_figure(points, title, **options)  # type: ignore[arg-type]
        legend = figure.axes[0].get_legend()
        assert legend is not None
        texts = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
        seen.append(texts + [text.get_text() for text in figure.axes[0].texts])
        plt.close("all")
        return figure

    monkeypatch.setattr("nas.pictures.run.pareto_figure", record)
    return seen


@pytest.mark.slow
def test_every_picture_has_them_with_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = legends(monkeypatch)
    own = written(tmp_path / "own.csv", HEAD + MINE)
    plot_run(run_folder(tmp_path / "a" / "given", "flowers", own))
    assert "the literature: my thesis" in seen[-1] and "Mine" in seen[-1]
    plot_run(run_folder(tmp_path / "b" / "without", "flowers"))
    assert not any("literature" in text for text in seen[-1])
    (tmp_path / "results").mkdir()
    written(tmp_path / "results" / "literature.csv", HEAD + MINE.replace("my thesis", "my shelf"))
    plot_run(tmp_path / "b" / "without")
    assert "the literature: my shelf" in seen[-1]
    plot_all(tmp_path / "a", behind=tmp_path / "results" / "literature.csv")
    assert "the literature: my shelf" in seen[-1]
    plot_run(run_folder(tmp_path / "c" / "digits", "digits"))
    assert not any("literature" in text for text in seen[-1])  # ImageNet's points are for ImageNet
    plot_run(run_folder(tmp_path / "d" / "imagenet", "imagenet"))
    (words,) = (text for text in seen[-1] if text.startswith("the literature"))
    for source in ("thesis Table 4.1", "UVC's README, Overall Results", "Isomorphic Pruning's README"):
        assert source in words


def test_a_file_that_is_gone_or_damaged_since_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = legends(monkeypatch)
    plot_run(run_folder(tmp_path / "a" / "gone", "flowers", tmp_path / "gone.csv"))
    assert len(seen) == 1 and not any("literature" in text for text in seen[0])
    with pytest.raises(UserError, match="no such file"):
        plot_all(tmp_path / "a", behind=tmp_path / "gone.csv")
