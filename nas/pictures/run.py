"""The pictures of a run, drawn from its files: what it chose, curves, steps, and where it stands among others."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.split_names import HELD_OUT
from nas.pictures.architecture import PICTURE, architecture_figure, title_of
from nas.pictures.candidates import candidates_figure
from nas.pictures.figures import DPI, choices_figure, curves_figure
from nas.pictures.front import front_figure
from nas.pictures.literature import literature, users_own
from nas.pictures.rows import rows_of
from nas.pictures.scatter import WHOLE, pareto_figure
from nas.pictures.spectrum_figure import spectra, spectrum_figure
from nas.pictures.steps_figure import steps_figure
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from search_spaces.registry import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
BASIS = "basis.safetensors"
RUN_FILES = ("config.yaml", "summary.json", "log.csv")  # any of them makes a folder a run's
SWEEP_FILE = "trials.csv"
EARLIER = {"val": HELD_OUT, "test": "test split"}  # how older summaries named what they measured on
# Options that say where a run ran, its seed and what it started from, not which configuration it is.
INCIDENTAL = (
    "seed", "output", "resume", "device", "workers", "threads", "data_dir", "arch", "download", "checkpoint_every",
    "log_every", "literature", "latency_table",
)  # fmt: skip


def plot_run(
    folder: Path, points: Sequence[Mapping[str, Any]] | None = None, x: str = "gflops", behind: Path | None = None
) -> list[Path]:
    """Draw what the files of a run allow, into its folder; the paths written, in order.

    points: rows of `run_points` of the runs to set it among in the Pareto picture, of which those on the same
    dataset are taken; None: of the runs in the folders beside it. x: that picture's cost, one of gflops,
    params, images_per_s, latency. behind: a file of the literature instead of the run's own (--literature). A missing
    file, column or value leaves its part out. Raises UserError when a picture cannot be written, or `behind` is not as
    it has to be.
    """
    written: list[Path] = []
    summary, arch = _json(folder / "summary.json"), _json(folder / "arch.json")
    title = _title(folder, summary, arch)
    choices = _csv(folder / "choices.csv")
    if choices is not None:
        blocks = arch.get("blocks")
        picks = [b for b in blocks if isinstance(b, dict)] if isinstance(blocks, list) else []
        figure = choices_figure(choices, picks, title)
        written += save(figure, folder / "choices.png") if figure is not None else []
    history = _csv(folder / "log.csv")
    if history is not None:
        held_out = str(summary.get("held_out") or HELD_OUT)
        figure = curves_figure(history, title, _backbone_gflops(summary, arch), _budget(summary, arch), held_out)
        written += save(figure, folder / "curves.png") if figure is not None else []
    steps = _csv(folder / "steps.csv")
    if steps is not None:
        figure = steps_figure(steps, title)
        written += save(figure, folder / "steps.png") if figure is not None else []
    candidates = _csv(folder / "candidates.csv")
    if candidates is not None:
        figure = candidates_figure(candidates, title)
        written += save(figure, folder / "candidates.png") if figure is not None else []
    front = _csv(folder / "front.csv")
    if front is not None:
        figure = front_figure(front, candidates, title, summary.get("stage") == "retrain")
        written += save(figure, folder / "front.png") if figure is not None else []
    if _by_halves(arch.get("method")):
        figure = _architecture(folder)
        written += save(figure, folder / PICTURE) if figure is not None else []
    if (folder / BASIS).is_file():
        figure = spectrum_figure(*spectra(folder / BASIS), title)
        written += save(figure, folder / "basis.png") if figure is not None else []
    here = [p for p in run_points(folder) if _drawable(p, x)]
    if here:
        if points is None:
            points = [p for f in folder.resolve().parent.glob("*/summary.json") for p in run_points(f.parent)]
        others = [p for p in points if p["dataset"] == here[0]["dataset"] and p["run"] != here[0]["run"]]
        published = _published(folder, here[0]["dataset"], behind)
        written += _draw_points([p | {"this": True} for p in here] + others, folder / "pareto", title, x, published)
    return written


def plot_pareto(
    points: pd.DataFrame,
    path: Path,
    title: str,
    *,
    x: str = "gflops",
    y: str = "top1",
    uniform: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
    on: str = "",
) -> list[Path]:
    """Draw nas.pictures.scatter.pareto_figure and write it as path.png (150 dpi) and path.pdf (vectors).

    Frames as described there. Raises UserError for an unknown axis, when no point has both values, or when
    the files cannot be written.
    """
    figure = pareto_figure(points, title, x=x, y=y, uniform=uniform, published=published, on=on)
    return [p for suffix in (".png", ".pdf") for p in save(figure, path.with_name(path.name + suffix))]


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure atomically, in the format of the path's suffix; the same figure gives the same bytes."""
    import matplotlib

    from nas.machine.files import write_atomically

    kind = path.suffix.removeprefix(".")
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text stays text
        write_atomically(path, lambda p: figure.savefig(p, format=kind, dpi=DPI, metadata=metadata))
    return [path]


def run_points(folder: Path) -> list[dict[str, Any]]:
    """The networks of a run's summary.json as rows for pareto_figure: large or original, and subnet, refitted or
    compact.

    Params are a count, gflops in GFLOPs (MACs), images_per_s at batch 32, top-k in percent; absent ones are
    NaN. Runs that differ in nothing but their seed share `config`. Empty when there is no summary.
    """
    summary, arch = _json(folder / "summary.json"), _json(folder / "arch.json")
    small = "compact" if isinstance(summary.get("compact"), dict) else "subnet"
    as_cut = "refitted" if small == "compact" and summary.get("stage") == "search" else small
    facts = {
        "run": str(folder.resolve()),
        "space": str(summary.get("space") or arch.get("space") or ""),
        "dataset": str(summary.get("dataset", "")),
        "seed": summary.get("seed"),
        "on": _device_of(summary),
        "split": EARLIER.get(str(summary.get("split")), summary.get("split")) or "",
    }
    rows = []
    for name, role in (*_references(summary, arch).items(), (small, as_cut)):
        found = summary.get(name)
        if not isinstance(found, dict):
            continue
        values = _measured(found)
        # Whole, a network is the same whatever the small one's budget, and runs are its seeds; trained, it is another
        # one after each stage.
        stage = summary.get("stage") if role == "large" else ""
        alone = f"{role} {values['gflops']} {summary.get('train', 'adjoined')} {stage}"
        config = alone if role in WHOLE else _configuration(folder, summary, arch)
        label = "" if role in WHOLE else _label(summary, arch)
        rows.append(facts | values | {"role": role, "config": config, "label": label, "alpha": _alpha(arch)})
    return rows + [facts | own for own in _of_front(folder, summary, arch)]


def _measured(found: Mapping[str, Any]) -> dict[str, float]:
    """What a network of a summary costs and is worth."""
    values = {k: _value(found, k) for k in ("params", "gflops", "top1", "top5", "held_out_top1")}
    measured, predicted = _value(found, "ms"), _value(found, "ms_predicted")
    latency = predicted if math.isnan(measured) else measured
    return values | {"images_per_s": _value(found, "images_per_s_32"), "latency": latency}


def _of_front(folder: Path, summary: Mapping[str, Any], arch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The networks of a front as rows of `run_points`."""
    rows, found = [], summary.get("front")
    as_cut = "refitted" if summary.get("refitted") else "subnet"
    role = "compact" if summary.get("stage") == "retrain" else as_cut
    for member in found if isinstance(found, list) else []:
        label = f"budget {_value(member, 'budget'):.3g}"
        config = f"{_configuration(folder, summary, arch)} {label}"
        own = {"role": role, "config": config, "label": label, "alpha": float("nan")}
        rows.append(_measured(member) | own)
    return rows


def _device_of(summary: Mapping[str, Any]) -> str:
    """Where a run's milliseconds are of; empty where it has none."""
    found = summary.get("latency")
    return str(found.get("on", "")) if isinstance(found, dict) else ""


def _references(summary: Mapping[str, Any], arch: Mapping[str, Any]) -> dict[str, str]:
    """The networks of a summary that are whole, with their roles: trained in the run (large), or as they were before.

    In older summaries a teacher of the original's FLOPs is it.
    """
    found = {name: name for name in WHOLE if name in summary}
    teacher, full = summary.get("teacher"), arch.get("backbone_flops")
    same = isinstance(teacher, dict) and isinstance(full, int) and round(_value(teacher, "gflops") * 1e9) == full
    return found or ({"teacher": "original"} if same else {})


def find_runs(root: Path) -> list[Path]:
    """Every run folder at or below `root`, hidden ones aside, in the order of their names."""
    folders = {f.parent for name in RUN_FILES for f in root.rglob(name) if not _hidden(f, root)}
    return sorted(f for f in folders if not (f / SWEEP_FILE).exists())


def plot_together(folder: Path, points: Sequence[Mapping[str, Any]], x: str, behind: Path | None = None) -> list[Path]:
    """A Pareto picture of all these points into the folder; one for each dataset. behind: as in `plot_run`."""
    written: list[Path] = []
    drawn = [p for p in points if _drawable(p, x)]
    datasets = sorted({p["dataset"] for p in drawn})
    for dataset in datasets:
        name = "pareto" if len(datasets) == 1 else f"pareto-{dataset.replace('/', '-')}"
        chosen = [p for p in drawn if p["dataset"] == dataset]
        title = f"{folder.resolve().name}: all runs on {dataset}"
        written += _draw_points(chosen, folder / name, title, x, _published(folder, dataset, behind))
    return written


def _published(folder: Path, dataset: str, behind: Path | None) -> pd.DataFrame:
    """The literature on a data set, with a user's file: this one, or the one that the folder's run was given.

    What has become of a run's file since is no reason not to draw: then without it.
    """
    if behind is not None:
        return literature(dataset, behind)
    given = _yaml(folder / "config.yaml").get("literature")
    try:
        return literature(dataset, Path(given) if given else users_own())
    except UserError as error:
        log.warning("%s; drawn without it", error)
        return literature(dataset)


def _draw_points(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str, x: str, published: pd.DataFrame
) -> list[Path]:
    """Split the rows into points and the line of uniform alpha, draw; of milliseconds a picture for each device."""
    import pandas as pd

    places = list(dict.fromkeys(str(row.get("on", "")) for row in rows)) if x == "latency" else [""]
    if len(places) > 1:
        this = [str(row["on"]) for row in rows if row.get("this")]  # a run's own picture is of its device
        chosen = [(place, [row for row in rows if row["on"] == place]) for place in places if place in (this or places)]
        names = [path if len(chosen) == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, len(chosen) + 1)]
        drawn = [_draw_points(own, at, title, x, published) for (_, own), at in zip(chosen, names, strict=True)]
        return [file for files in drawn for file in files]
    frame = pd.DataFrame([{"this": False, **row} for row in rows])
    methods = frame["space"].str.split("-").str[1]
    on_line = methods.map(_uniform) & ~frame["role"].isin(WHOLE) & frame["this"].ne(True)
    line = frame[on_line] if frame[on_line]["alpha"].nunique() > 1 else None
    others = frame.drop(line.index) if line is not None else frame
    name = path if x == "gflops" else path.with_name(f"{path.name}-{x}")
    return plot_pareto(others, name, title, x=x, uniform=line, published=published, on=places[0])


def _title(folder: Path, summary: Mapping[str, Any], arch: Mapping[str, Any]) -> str:
    """The space, the dataset, and what else tells this run from its siblings."""
    options = _yaml(folder / "config.yaml")
    space = summary.get("space") or arch.get("space") or options.get("space") or folder.name
    dataset, seed = (summary.get(k, options.get(k)) for k in ("dataset", "seed"))
    parts = [str(summary["stage"])] if summary.get("stage") else []
    parts += [_label(summary, arch)] if (summary or arch) and "front" not in summary else []
    parts += [f"seed {seed}"] if seed is not None else []
    return f"{space}" + (f" on {dataset}" if dataset else "") + (f" ({', '.join(parts)})" if parts else "")


def _label(summary: Mapping[str, Any], arch: Mapping[str, Any]) -> str:
    """What its search aimed at."""
    if _uniform(arch.get("method")) and (alpha := _alpha(arch)) is not None:
        return f"α = {alpha:g}"
    budget = _budget(summary, arch)
    return f"budget {budget:.3g}" if budget is not None else "no budget"


def _uniform(method: object) -> bool:
    """Whether one factor serves all blocks of a method's architectures."""
    return method in METHODS and METHODS[str(method)].uniform


def _by_halves(method: object) -> bool:
    """Whether a method's architectures are widths, half by half, which only a picture shows at a glance."""
    return method in METHODS and bool(METHODS[str(method)].halves)


def _architecture(folder: Path) -> Figure | None:
    """What the blocks keep; None where arch.json is damaged or speaks of another network."""
    try:
        arch = load_architecture(folder)
        rows = rows_of(arch)
    except UserError as error:
        log.warning("%s; drawn without it", error)
        return None
    return architecture_figure(rows, title_of(arch, rows))


def _alpha(arch: Mapping[str, Any]) -> float | None:
    """The compression factor, where every block has the same."""
    blocks = arch.get("blocks")
    factors = {_value(b, "alpha") for b in blocks if isinstance(b, dict)} if isinstance(blocks, list) else set()
    return factors.pop() if len(factors) == 1 and all(map(_number, factors)) else None


def _budget(summary: Mapping[str, Any], arch: Mapping[str, Any]) -> float | None:
    """The share of the backbone's FLOPs asked for; None when there was no budget."""
    search = arch.get("search")
    budget = _value(summary, "budget")
    if not _number(budget) and isinstance(search, dict):
        budget = _value(search, "budget")
    return budget if _number(budget) and budget > 0 else None


def _backbone_gflops(summary: Mapping[str, Any], arch: Mapping[str, Any]) -> float | None:
    large = summary.get("large", summary.get("original"))
    gflops = _value(arch, "backbone_flops") / 1e9
    if not _number(gflops) and isinstance(large, dict):
        gflops = _value(large, "gflops")
    return gflops if _number(gflops) else None


def _configuration(folder: Path, summary: Mapping[str, Any], arch: Mapping[str, Any]) -> str:
    """Equal for runs that differ in their seed alone; a run without options is like no other."""
    options, search = _yaml(folder / "config.yaml"), arch.get("search")
    if not options:
        return str(folder)
    searched = {k: v for k, v in search.items() if k != "seed"} if isinstance(search, dict) else {}
    own = {k: v for k, v in options.items() if k not in INCIDENTAL}
    same = [
        summary.get("stage"),
        summary.get("space"),
        _label(summary, arch),
        arch.get("width"),
        searched,
        own,
    ]
    return json.dumps(same, sort_keys=True, default=str)


def _value(values: Mapping[str, Any], key: str) -> float:
    """A number, NaN when absent or none."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _number(value: float) -> bool:
    return value == value


def _drawable(point: Mapping[str, Any], x: str) -> bool:
    return _number(point[x]) and _number(point["top1"])


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _json(path: Path) -> dict[str, Any]:
    """An object, empty when there is no such file or it is damaged: a picture is no reason to fail a run."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: not readable (%s); drawn without it", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s: not readable (%s); drawn without it", path, str(error).splitlines()[0])
        return {}
    return value if isinstance(value, dict) else {}


def _csv(path: Path) -> pd.DataFrame | None:
    """A table, None when there is no such file or it is empty or damaged."""
    import pandas as pd

    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pandas' parser and empty-file errors are ValueErrors
        log.warning("%s: not readable (%s); drawn without it", path, error)
        return None
