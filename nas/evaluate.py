"""Accuracy and speed of a network, and the table that sets large, subnet and compact side by side."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nas.distributed import sum_
from nas.losses import accuracy

Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def top_k(
    networks: dict[str, Network],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Any,
) -> dict[str, float]:
    """{"<name>_top1": percent, "<name>_top5": percent} of each network over the batches of all processes."""
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


@torch.no_grad()
def images_per_second(
    networks: dict[str, Network],
    input_size: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    autocast: Any,
    rounds: int = 15,
    seconds: float = 6.0,
) -> dict[str, float]:
    """Median throughput of each network, measured in turn (A B C A B C ...) so that drift hits all alike."""
    images = torch.randn(batch_size, *input_size, device=device)

    def run(network: Network) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with autocast():
            network(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once = {name: min(run(network), run(network)) for name, network in networks.items()}
    repeats = {name: max(1, int(0.02 / t)) for name, t in once.items()}  # at least 20 ms a sample
    times: dict[str, list[float]] = {name: [] for name in networks}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        for name, network in networks.items():
            times[name].append(sum(run(network) for _ in range(repeats[name])) / repeats[name])
        if done >= 4 and time.perf_counter() > deadline:
            break
    return {name: batch_size / float(torch.tensor(ts).median()) for name, ts in times.items()}


def print_table(rows: dict[str, dict[str, float]], title: str) -> None:
    """The table of a run: a column per network and, if there are several, the last one's ratio to the first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    names = list(rows)
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column(f"{names[-1]} / {names[0]}", justify="right")
    for key, words in COLUMNS.items():
        values = [rows[name].get(key) for name in names]
        if all(v is None for v in values):
            continue
        cells = ["–" if v is None else format_value(key, v) for v in values]
        first, last = values[0], values[-1]
        if first is None or last is None or not first:
            ratio = "–"
        else:
            ratio = f"{last - first:+.2f}" if key.startswith("top") else f"{last / first:.3f}"
        table.add_row(words, *cells, *([ratio] if len(names) > 1 else []))
    Console().print(table)


COLUMNS = {
    "params": "parameters",
    "gflops": "GFLOPs (MACs)",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "images_per_s_1": "images/s, batch 1",
    "images_per_s_32": "images/s, batch 32",
}


def format_value(key: str, value: float) -> str:
    """A cell of the table."""
    if key == "params":
        return f"{value / 1e6:.3f} M"
    if key == "gflops":
        return f"{value:.4f}" if value < 1 else f"{value:.2f}"
    return f"{value:.2f}" if key.startswith("top") else f"{value:,.0f}"
