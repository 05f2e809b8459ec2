"""The model card of a compact network, from the files of its run, and the upload to the Hugging Face Hub."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from nas.machine.files import write_text
from nas.networks.compact_file import TIMM_CONFIG, WEIGHTS
from nas.runs.folder import read_options
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError, reason
from search_spaces.registry import METHODS

CARD = "README.md"
TASKS = {True: "image-classification", False: "image-feature-extraction"}  # by whether there is a classifier
POINTS = ("top1", "top5", "agreement", "knn")  # in per cent
UPLOADED = ("arch.json", WEIGHTS, TIMM_CONFIG, CARD, "compact.onnx", "compact.pt2", "summary.json", "export.json")


def write_card(folder: Path, arch: Architecture | None = None) -> Path:
    """Write README.md of a run's folder and return its path."""
    path = folder / CARD
    write_text(path, model_card(folder, arch or load_architecture(folder)))
    return path


def model_card(folder: Path, arch: Architecture) -> str:
    """Architecture, data, accuracy, FLOPs, speed, and how it was made. What no file of the run says is left out."""
    summary, speed = _json(folder / "summary.json"), _json(folder / "export.json")
    options = read_options(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    name = folder.resolve().name
    front = {"library_name": "timm", "pipeline_tag": TASKS[arch.num_classes > 0], "tags": ["timm", arch.method]}
    if summary.get("dataset"):
        front["datasets"] = [summary["dataset"]]
    parts = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    parts += [
        f"A compact network cut out of `{arch.model}`{_made_by(arch)}.",
        "",
        *_networks_table(arch, summary),
        "",
        "FLOPs are multiply-accumulates of one image. The last column is compact over"
        f" {_whole(arch, summary)[0]}, for accuracies their difference in points.",
        "",
        "## Architecture",
        "",
        f"* input {' x '.join(map(str, arch.input_size))}, {_outputs(arch)}, stage widths"
        f" {', '.join(map(str, arch.stage_widths))}",
    ]
    for choice in [k for k, v in arch.blocks[0].items() if not isinstance(v, list)]:
        parts.append(f"* {choice} {_picks(arch, choice)}")
    parts += ["", "## Data and training", ""]
    if summary:
        parts.append(f"* dataset `{summary.get('dataset')}`, accuracies on its {summary.get('split', 'test split')}")
    parts += _training(summary, options)
    if arch.search:
        said = {k: v["run"] if isinstance(v, dict) else v for k, v in arch.search.items() if v not in (None, "", [])}
        parts.append(f"* searched: {', '.join(f'{k} {v}' for k, v in said.items())}")
    if speed:
        parts += ["", "## Speed", "", *_speed_table(speed)]
    parts += [
        "",
        "## Use",
        "",
        "```python",
        "import timm, nas.timm_entry",
        "",
        'network = timm.create_model("hf-hub:<user>/<name>", pretrained=True).eval()',
        "```",
        "",
        f"Made by vit-nas {arch.version} from the space `{arch.space}`.",
        "",
    ]
    return "\n".join(parts)


def _outputs(arch: Architecture) -> str:
    return f"{arch.num_classes} classes" if arch.num_classes else "features, no classifier"


def _one_by_one(arch: Architecture) -> bool:
    """Whether blocks have widths of their own, not a few candidates."""
    return arch.method in METHODS and bool(METHODS[arch.method].halves)


def _made_by(arch: Architecture) -> str:
    if _one_by_one(arch):
        return ", its widths chosen one by one"
    return f" by {arch.method.upper()} ({arch.width} width)"


def _picks(arch: Architecture, choice: str) -> str:
    """The candidates of a choice: block by block, or how many blocks have which."""
    if _one_by_one(arch):
        return f"by block: {' '.join(str(block.get(choice)) for block in arch.blocks)}"
    picks = Counter(block.get(choice) for block in arch.blocks)
    counts = ", ".join(f"{value} in {times}" for value, times in sorted(picks.items(), key=str))
    return f"over {len(arch.blocks)} blocks: {counts}"


def _training(summary: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """How the weights came about: by training, or in a search that cuts its result out by a refit alone."""
    if summary.get("stage") == "search" and isinstance(summary.get("compact"), dict):
        images = options.get("refit_images")
        words = f"refitted on up to {images} training images, without labels" if images else "not refitted"
        return [f"* cut out of trained weights, {words}; not trained since"]
    shown = ("epochs", "batch_size", "opt", "lr", "weight_decay", "sched", "aa", "mixup", "cutmix", "smoothing", "seed")
    given = [f"{key} {options[key]}" for key in shown if options.get(key) is not None]
    return [f"* {summary.get('train', 'adjoined')} training: {', '.join(given)}"] if given else []


def _networks_table(arch: Architecture, summary: dict[str, Any]) -> list[str]:
    name, large = _whole(arch, summary)
    compact = {"params": arch.params, "gflops": arch.flops / 1e9} | _row(summary, "compact")
    lines = [f"| | {name} | compact | |", "|---|---:|---:|---:|"]
    for key, words, unit in (
        ("params", "parameters (M)", 1e6),
        ("gflops", "GFLOPs (MACs)", 1),
        ("top1", "top-1 %", 1),
        ("top5", "top-5 %", 1),
        ("agreement", "same first class %", 1),
        ("kl", "KL to the large network, nats", 1),
        ("knn", "k-NN top-1 %", 1),
        ("cosine", "cosine similarity to the large network", 1),
        ("feature_error", "squared error of the features, of their variance", 1),
    ):
        if key not in compact:
            continue
        a, b = large.get(key), compact[key] / unit
        if a is None:
            lines.append(f"| {words} | – | {b:.4g} | – |")
            continue
        last = f"{b - a:+.2f}" if key in POINTS else f"{b / (a / unit):.3f}" if a else "–"
        lines.append(f"| {words} | {a / unit:.4g} | {b:.4g} | {last} |")
    return lines


def _speed_table(speed: dict[str, Any]) -> list[str]:
    lines = [
        f"torch {speed['torch']}, CPU, {speed['threads']} threads, float32; the large network has"
        f" {speed['flops_ratio']:.2f} times the FLOPs.",
        "",
        "| batch | network | backend | images/s | p50 ms | p95 ms |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for r in speed["speed"]:
        lines.append(
            f"| {r['batch']} | {r['network']} | {r['backend']} | {r['images_per_s']:.1f} | {r['p50_ms']:.2f} |"
            f" {r['p95_ms']:.2f} |"
        )
    return lines


def _row(summary: dict[str, Any], name: str) -> dict[str, Any]:
    row = summary.get(name)
    return {k: v for k, v in row.items() if k.startswith("top")} if isinstance(row, dict) else {}


def _whole(arch: Architecture, summary: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the compact network is set beside: the large one, trained with it, or as it was: the original, the previous.

    In older summaries a teacher of the original's size is it.
    """
    costs = {"params": arch.backbone_params, "gflops": arch.backbone_flops / 1e9}
    for name in ("large", "previous"):
        if isinstance(summary.get(name), dict):
            own = {k: summary[name][k] for k in costs if k in summary[name]}
            return name, costs | own | _row(summary, name)
    teacher = summary.get("teacher")
    same = isinstance(teacher, dict) and all(teacher.get(k) == v for k, v in costs.items())
    return "original", costs | (_row(summary, "original") or (_row(summary, "teacher") if same else {}))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def push_to_hub(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a compact network and its card; returns the repository's address. UserError when the Hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    missing = [name for name in ("arch.json", WEIGHTS, TIMM_CONFIG) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} holds no {', '.join(missing)}; give the folder of a retrain")
    write_card(folder)
    card = folder / CARD
    api = HfApi(library_name="vit-nas")
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        write_text(card, card.read_text().replace("<user>/<name>", made.repo_id))
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=list(UPLOADED),
            commit_message="Add compact network",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--push-to-hub {repo}: {reason(error)}; is the name right, and did you run `hf auth login`?"
        ) from None
    return str(made)
