"""Pictures show what the files say, whatever the files lack. Drawn from synthetic run folders."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nas.pictures.run
from nas.pictures.run import find_runs, plot_pareto, plot_run, run_points
from nas.pictures.scatter import pareto_figure
from nas.plot import main, plot_all
from search_spaces.architecture import save_architecture
from search_spaces.errors import UserError
from tests.nas.finished import free_architecture
from tests.nas.synthetic import BACKBONE, PUBLISHED, lines, make_run, texts


@pytest.fixture
def drawn(monkeypatch):
    """Every figure by the path it would be written to, without the seconds that rendering takes."""
    figures = {}

    def record(figure, path):
        figures[path] = figure
        return [path]

    monkeypatch.setattr(nas.pictures.run, "save", record)
    return figures


def test_points_that_lack_a_value_are_left_out_and_none_left_is_an_error(tmp_path):
    points = pd.DataFrame({"gflops": [1.0, None, 3.0], "top1": [70.0, 75.0, None]})
    (marks,) = (li for li in pareto_figure(points, "run").axes[0].get_lines() if li.get_label() == "_ ")
    np.testing.assert_allclose(marks.get_xydata(), [[1.0, 70.0]])
    with pytest.raises(UserError, match="no network has both images_per_s and top1"):
        plot_pareto(points, tmp_path / "pareto", "run", x="images_per_s")
    with pytest.raises(UserError, match="expected one of gflops, params, images_per_s, latency"):
        plot_pareto(points, tmp_path / "pareto", "run", x="joules")
    assert not list(tmp_path.iterdir())


def test_a_run_is_drawn_from_its_files_and_leaves_nothing_else(tmp_path):
    from PIL import Image

    run = make_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    written = plot_run(run)
    assert [path.name for path in written] == ["choices.png", "curves.png", "pareto.png", "pareto.pdf"]
    assert {path.name for path in run.iterdir()} == before | {path.name for path in written}
    for path in written[:3]:
        image = Image.open(path)
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert np.asarray(image.convert("L")).std() > 5
    pdf = written[3].read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype /Image" not in pdf, "the PDF holds pixels, not vectors"


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        plot_pareto(pd.DataFrame({"gflops": [1.0], "top1": [70.0]}), tmp_path / name, "run")
    for suffix in ("png", "pdf"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    run = make_run(tmp_path / "run")
    (run / "choices.png").write_bytes(b"old")

    def full_disk(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UserError, match="No space left"):
        plot_run(run)
    assert (run / "choices.png").read_bytes() == b"old"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "arch.json", "log.csv", "choices.csv", "summary.json"])
@pytest.mark.parametrize("damage", ["absent", "empty", "cut"])
def test_what_a_damaged_file_does_not_hold_is_left_out(tmp_path, drawn, name, damage):
    run = make_run(tmp_path / "run")
    if damage == "absent":
        (run / name).unlink()
    else:
        (run / name).write_bytes(b"" if damage == "empty" else (run / name).read_bytes()[:37])
    gone = {"log.csv": {"curves"}, "choices.csv": {"choices"}, "summary.json": {"pareto"}}.get(name, set())
    assert {path.stem for path in plot_run(run)} == {"choices", "curves", "pareto"} - gone
    assert all(figure.get_suptitle().startswith("swin-dan-nano on digits") for figure in drawn.values())


def test_free_widths_are_drawn_from_the_architecture_alone_and_candidates_from_their_table(tmp_path, drawn):
    save_architecture(free_architecture(), tmp_path / "arch.json")
    assert plot_run(tmp_path) == [tmp_path / "architecture.png"]
    rows = {"candidate": [1, 2], "value": [0.2, 0.1], "measured": "kl", "stage_widths": [144, 160]}
    pd.DataFrame(rows).to_csv(tmp_path / "candidates.csv", index=False)
    assert [path.name for path in plot_run(tmp_path)] == ["candidates.png", "architecture.png"]
    assert drawn[tmp_path / "candidates.png"].get_suptitle().startswith("vit-free")
    arch = json.loads((tmp_path / "arch.json").read_text())
    (tmp_path / "arch.json").write_text(json.dumps(arch | {"blocks": arch["blocks"][:2]}))
    assert [path.name for path in plot_run(tmp_path)] == ["candidates.png"]


def test_a_search_that_cuts_its_result_shows_it_as_refitted(tmp_path, drawn):
    run = make_run(tmp_path / "run", budget=0.5)
    summary = json.loads((run / "summary.json").read_text())
    summary["compact"] = summary["subnet"] | {"top1": 96.5}
    (run / "summary.json").write_text(json.dumps(summary))
    make_run(tmp_path / "retrained", stage="retrain", budget=0.5, top1=97.0)
    plot_run(run)
    points = lines(drawn[run / "pareto.png"].axes[0])
    np.testing.assert_allclose(points["_swin-dan-nano refitted"].get_ydata(), [96.5])
    np.testing.assert_allclose(points["_swin-dan-nano compact"].get_ydata(), [97.0])
    assert points["_swin-dan-nano refitted"].get_fillstyle() != points["_swin-dan-nano compact"].get_fillstyle()


@pytest.mark.parametrize("key", ["stage", "space", "dataset", "seed", "budget", "split", "large", "subnet"])
def test_a_summary_may_lack_any_key(tmp_path, drawn, key):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    del summary[key]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "pareto" in {path.stem for path in plot_run(run)}


def test_this_run_is_ringed_among_the_runs_beside_it_on_the_same_dataset(tmp_path, drawn):
    own = make_run(tmp_path / "own", budget=0.5)
    make_run(tmp_path / "beside", budget=0.3, top1=92.0)
    make_run(tmp_path / "retrained", stage="retrain", budget=0.3, top1=93.5)
    make_run(tmp_path / "elsewhere", dataset="cifar10", budget=0.4, top1=60.0)
    plot_run(own)
    (axes,) = drawn[own / "pareto.png"].axes
    ring = lines(axes)["this run"].get_xydata()
    np.testing.assert_allclose(ring, [[BACKBONE, 98.0], [BACKBONE * 0.5, 94.0]])
    points = lines(axes)
    np.testing.assert_allclose(sorted(points["_swin-dan-nano subnet"].get_ydata()), [91.0, 94.0])
    np.testing.assert_allclose(points["_swin-dan-nano compact"].get_ydata(), [93.5])
    assert points["_swin-dan-nano subnet"].get_fillstyle() != points["_swin-dan-nano compact"].get_fillstyle()
    assert "published results" not in points
    assert {"this run: budget 0.5", "budget 0.3"} <= set(texts(axes))
    assert "swin-dan-nano on digits" in drawn[own / "pareto.png"].get_suptitle()


def test_the_literature_stands_behind_imagenet_runs_alone(tmp_path, drawn, monkeypatch):
    known = PUBLISHED.assign(dataset="imagenet", source="a table")
    known.to_csv(tmp_path / "published.csv", index=False)
    monkeypatch.setattr(nas.pictures.literature, "PUBLISHED", tmp_path / "published.csv")
    for dataset in ("imagenet", "imagenet100"):
        run = make_run(tmp_path / dataset, dataset=dataset, space="swin-dan")
        plot_run(run)
        (axes,) = drawn[run / "pareto.png"].axes
        assert ("the literature: a table" in lines(axes)) == (dataset == "imagenet")


def test_runs_share_a_configuration_when_only_their_seed_differs(tmp_path):
    runs = [make_run(tmp_path / f"seed{s}", seed=s) for s in (1, 2)] + [make_run(tmp_path / "other", budget=0.3)]
    one, two, other = ([p["config"] for p in run_points(run) if p["role"] == "subnet"] for run in runs)
    assert one == two != other
    assert [p["split"] for p in run_points(runs[0])] == ["validation split"] * 2


def test_a_large_network_of_two_stages_is_two_networks_and_not_two_seeds_of_one(tmp_path):
    search, retrain = make_run(tmp_path / "search"), make_run(tmp_path / "retrain")
    for role, alike in (("large", False), ("original", True)):
        for folder, stage in ((search, "search"), (retrain, "retrain")):
            summary = json.loads((folder / "summary.json").read_text())
            whole = summary.pop("large", None) or summary.pop("original")
            (folder / "summary.json").write_text(json.dumps(summary | {"stage": stage, role: whole}))
        one, two = ([p["config"] for p in run_points(run) if p["role"] == role] for run in (search, retrain))
        assert (one == two) == alike and one


@pytest.mark.parametrize(("gflops", "drawn"), [(2e-6, ["original", "compact"]), (3e-6, ["compact"])])
def test_a_teacher_of_an_older_run_is_the_original_where_the_small_one_was_cut_from_it(
    gflops: float, drawn: list[str], tmp_path: Path
) -> None:
    networks = {"teacher": {"gflops": gflops, "top1": 70.0}, "compact": {"gflops": 1e-6, "top1": 60.0}}
    (tmp_path / "summary.json").write_text(json.dumps({"stage": "retrain", "dataset": "digits"} | networks))
    (tmp_path / "arch.json").write_text(json.dumps({"backbone_flops": 2000}))
    assert [p["role"] for p in run_points(tmp_path)] == drawn


def test_a_network_that_the_run_did_not_train_is_called_the_original(tmp_path, drawn):
    run = make_run(tmp_path / "run", budget=0.5)
    summary = json.loads((run / "summary.json").read_text())
    summary["original"] = summary.pop("large")
    (run / "summary.json").write_text(json.dumps(summary))
    make_run(tmp_path / "beside", budget=0.3)
    assert {p["role"] for p in run_points(run)} == {"original", "subnet"}
    plot_run(run)
    points = lines(drawn[run / "pareto.png"].axes[0])
    styles = {points[f"_swin-dan-nano {role}"].get_fillstyle() for role in ("original", "large", "subnet")}
    assert len(styles) == 3
    legend = [text.get_text() for text in drawn[run / "pareto.png"].axes[0].get_legend().get_texts()]
    assert {"original network, as it was", "large network, trained"} <= set(legend)
    assert any("backbone" in texts(axes) for axes in drawn[run / "curves.png"].axes)  # its FLOPs, all the same


def test_networks_compressed_alike_are_joined(tmp_path, drawn):
    for alpha, top1 in ((2, 96.0), (4, 94.0), (8, 90.0)):
        run = make_run(tmp_path / f"an{alpha}", stage="retrain", space="swin-an-nano", budget=1 / alpha, top1=top1)
        arch = json.loads((run / "arch.json").read_text()) | {
            "method": "an",
            "blocks": [{"alpha": alpha}] * 12,
        }
        (run / "arch.json").write_text(json.dumps(arch))
    make_run(tmp_path / "dan", stage="retrain", budget=0.5, top1=97.0)
    plot_all(tmp_path)
    (axes,) = drawn[tmp_path / "pareto.png"].axes
    np.testing.assert_allclose(lines(axes)["every block alike"].get_ydata(), [90.0, 94.0, 96.0])
    assert {"α = 2", "α = 4", "α = 8"} <= set(texts(axes))
    (axes,) = drawn[tmp_path / "an4" / "pareto.png"].axes
    assert "this run: α = 4" in texts(axes)


@pytest.mark.slow
def test_everything_below_a_folder_is_drawn_and_a_sweep_gets_its_own_picture(tmp_path, drawn):
    sweep = tmp_path / "sweep"
    trials = [make_run(sweep / f"trial{i}", budget=b) for i, b in enumerate((0.3, 0.5))]
    (sweep / "trials.csv").write_text("trial,status,search\n0,done,trial0\n1,done,trial1\n")
    (sweep / "config.yaml").write_text("space: swin-dan-nano\n")
    single = make_run(tmp_path / "single", dataset="cifar10")
    make_run(tmp_path / ".hidden" / "run")
    assert find_runs(tmp_path) == [single, *trials]
    written = plot_all(tmp_path)
    assert written == [*drawn, sweep / "index.html"]
    assert {p.parent for p in written} == {tmp_path, sweep, single, *trials}
    assert {p.name for p in written if p.parent == sweep} == {"pareto.png", "pareto.pdf", "index.html"}
    assert {p.stem for p in written if p.parent == tmp_path} == {"pareto-digits", "pareto-cifar10"}
    (axes,) = drawn[sweep / "pareto.png"].axes
    assert "this run" not in lines(axes)
    np.testing.assert_allclose(lines(axes)["_swin-dan-nano subnet"].get_xdata(), [0.3 * BACKBONE, 0.5 * BACKBONE])


def test_runs_of_other_folders_join_the_picture_once(tmp_path, drawn, capsys):
    sweep, other = tmp_path / "sweep", tmp_path / "other"
    for i, budget in enumerate((0.3, 0.5)):
        make_run(sweep / f"trial{i}", budget=budget)
    make_run(other / "more", budget=0.7)
    make_run(other / "elsewhere", dataset="cifar10")
    main([str(sweep), "--with", str(other), str(tmp_path)])
    (axes,) = drawn[sweep / "pareto.png"].axes
    marks = lines(axes)["_swin-dan-nano subnet"].get_xdata()
    np.testing.assert_allclose(marks, [0.3 * BACKBONE, 0.5 * BACKBONE, 0.7 * BACKBONE])
    assert {p.parent.parent for p in drawn} <= {tmp_path, sweep}
    with pytest.raises(SystemExit, match="2"):
        main([str(sweep), "--with", str(tmp_path / "nowhere")])


def test_command_prints_what_it_drew(tmp_path, drawn, capsys):
    run = make_run(tmp_path / "run")
    main([str(tmp_path), "--x", "params"])
    assert capsys.readouterr().out.splitlines() == [str(path) for path in drawn]
    assert run / "pareto-params.png" in drawn
    assert drawn[run / "pareto-params.png"].axes[0].get_xlabel() == "parameters (M)"


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_command_without_runs_says_so_in_one_line(tmp_path, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / name)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(tmp_path / name) in captured.err


def test_importing_the_module_loads_no_library():
    code = "import sys, nas.plot; print({'matplotlib', 'pandas', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
