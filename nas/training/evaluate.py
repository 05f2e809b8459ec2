"""Accuracy of networks, and the table that sets large, subnet and compact side by side."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nas.machine.distributed import is_main, sum_
from nas.machine.progress import progress
from nas.machine.timing import Network
from nas.training.losses import accuracy

COLUMNS = {
    "params": "parameters",
    "gflops": "GFLOPs (MACs)",
    "ms_predicted": "ms, predicted",
    "ms": "ms, measured",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "agreement": "same first class %",
    "kl": "KL, nats",
    "knn": "k-NN top-1 %",
    "cosine": "cosine similarity",
    "feature_error": "feature error",
    "images_per_s_1": "images/s, batch 1",
    "images_per_s_32": "images/s, batch 32",
}
SCORES = ("top1", "top5", "agreement", "kl", "knn", "cosine", "feature_error")
POINTS = ("top1", "top5", "agreement", "knn")  # in per cent


@torch.no_grad()
def top_k(
    networks: Mapping[str, Network],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Any,
    shown_as: str | None = None,
) -> dict[str, float]:
    """{"<name>_top1": percent, "<name>_top5": percent} of each network over the batches of all processes.

    shown_as: the words of a progress bar, for batches of known number; None shows none.
    """
    if shown_as is not None and is_main():
        batches = progress(batches, shown_as)
    hits = {name: torch.zeros(2, dtype=torch.long, device=device) for name in networks}
    seen = torch.zeros((), dtype=torch.long, device=device)
    for images, target in batches:
        images, target = images.to(device), target.to(device)
        seen += (target >= 0).sum()
        for name, network in networks.items():
            with autocast():
                logits = network(images)
            hits[name] += accuracy(logits, target)
    sum_(seen, *hits.values())
    share = {name: 100.0 * h.cpu().double() / max(int(seen), 1) for name, h in hits.items()}
    return {f"{name}_top{k}": float(s[i]) for name, s in share.items() for i, k in enumerate((1, 5))}


def print_table(rows: dict[str, dict[str, float]], title: str, words: Mapping[str, str] = COLUMNS) -> None:
    """The table of a run: a column per network and, if there are several, the last one's ratio to the first.

    words: which values to show, and how to call them.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("")
    names = list(rows)
    for network in names:
        table.add_column(network, justify="right")
    if len(names) > 1:
        table.add_column(f"{names[-1]} / {names[0]}", justify="right")
    for key, name in words.items():
        values = [rows[network].get(key) for network in names]
        if all(v is None for v in values):
            continue
        cells = ["–" if v is None else format_value(key, v) for v in values]
        first, last = values[0], values[-1]
        if first is None or last is None or not first:
            ratio = "–"
        else:
            ratio = f"{last - first:+.2f}" if key.endswith(POINTS) else f"{last / first:.3f}"
        table.add_row(name, *cells, *([ratio] if len(names) > 1 else []))
    Console().print(title, table, sep="\n", highlight=False, soft_wrap=True)


def by_split(reported: str, held_out: str) -> dict[str, str]:
    """COLUMNS of a table with accuracies on two sets of images, each named."""
    where = {"": reported, "held_out_": held_out}
    scores = {f"{prefix}{k}": f"{COLUMNS[k]}, {of}" for prefix, of in where.items() for k in SCORES}
    return {k: v for k, v in COLUMNS.items() if k not in SCORES} | scores


def format_value(key: str, value: float) -> str:
    """A cell of the table."""
    if key == "params":
        return f"{value / 1e6:.3f} M"
    if key == "gflops":
        return f"{value:.4f}" if value < 1 else f"{value:.2f}"
    if key.startswith("ms"):
        return f"{value:.4g}"
    if key.endswith(POINTS):
        return f"{value:.2f}"
    return f"{value:.4f}" if key.endswith(SCORES) else f"{value:,.0f}"
