"""What a result takes as a whole, beside what its latency table says of it: columns of every table (section 2.13)."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nas.machine.devices import device_name
from nas.machine.runtimes import PRECISIONS, made_to_run
from nas.machine.timing import in_turn
from nas.networks.backbone import build
from nas.prices.latency_table import RECORD, Setting
from search_spaces.architecture import Architecture
from supernets.supernet import Supernet

ROUNDS = 15
MEASURED, PREDICTED = "ms", "ms_predicted"


def clocked(
    arch: Architecture, compact: nn.Module | None, small: Sequence[str], whole: str | None
) -> dict[str, dict[str, float]]:
    """Milliseconds of a batch by a table's rows, predicted and, on the table's own device, measured.

    compact: is timed as the last of `small`, the rows of the small network. whole: the row of the timm model, which is
    timed with any weights. Empty where latency was no price of the search; says where nothing can be timed, and why.
    """
    if not is_clocked(arch) or not small:
        return {}
    record = arch.search[RECORD]
    rows = {name: {PREDICTED: float(record["predicted_ms"])} for name in small}
    networks: dict[str, nn.Module] = {} if compact is None else {small[-1]: compact}
    if whole is not None:
        rows[whole] = {PREDICTED: float(record["backbone_ms"])}
        original = build(arch.model, arch.model_kwargs, num_classes=arch.num_classes)
        networks[whole] = Supernet(original).backbone  # as its adapter sets it up
    setting = Setting(**record["setting"])
    against = cannot_time(setting)
    if against:
        print(f"latency is not measured: {against}")
        return rows
    for name, ms in milliseconds(networks, arch.input_size, setting).items():
        rows[name][MEASURED] = ms
    return rows


def facts_of(arch: Architecture) -> dict[str, Any]:
    """For summary.json: which device its milliseconds are of."""
    return {RECORD: {name: arch.search[RECORD][name] for name in ("on", "table")}} if is_clocked(arch) else {}


def is_clocked(arch: Architecture) -> bool:
    """Whether latency was a price of the search that found it: `clocked` says nothing of others."""
    return bool(arch.search.get(RECORD))


def cannot_time(setting: Setting) -> str:
    """Why this is not where a table was made; empty where it is."""
    if setting.device_type == "cuda" and not torch.cuda.is_available():
        return f"the table is of {setting.device}, there is no CUDA device here"
    here = device_name(torch.device(setting.device_type))
    return "" if here == setting.device else f"the table is of {setting.device}, this is {here}"


def milliseconds(networks: Mapping[str, nn.Module], size: tuple[int, int, int], setting: Setting) -> dict[str, float]:
    """Median milliseconds of a batch of each network, in turn, as a table's halves were timed. size (C, H, W)."""
    device, dtype, before = torch.device(setting.device_type), PRECISIONS[setting.precision], torch.get_num_threads()
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    try:
        images = torch.randn(setting.batch_size, *size).to(device, dtype)
        own = {name: copy.deepcopy(network).to(device, dtype).eval() for name, network in networks.items()}
        runs = {n: made_to_run(network, images, setting.runtime, setting.threads) for n, network in own.items()}
        seconds = in_turn({name: _call(run, images) for name, run in runs.items()}, device, ROUNDS)
    finally:
        torch.set_num_threads(before)
    return {name: 1e3 * statistics.median(each) for name, each in seconds.items()}


def _call(run: Any, images: torch.Tensor) -> Any:
    return lambda: run(images)
