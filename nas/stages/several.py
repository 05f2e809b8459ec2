"""What a retrain of a front leaves: a compact network for every budget, one table, one picture (section 2.12)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nas.config import RetrainConfig
from nas.data.loaders import report_unreadable
from nas.machine.distributed import is_main
from nas.machine.files import write_csv, write_json
from nas.machine.timing import Network, images_per_second
from nas.networks.basis_file import basis_of, save_basis
from nas.networks.compact_file import save_compact
from nas.pictures.run import plot_run
from nas.prices.whole import clocked, facts_of
from nas.runs.folder import results_path
from nas.runs.front import FRONT, compact_folder
from nas.stages.afterwards import Afterwards
from nas.stages.original import as_it_was
from nas.stages.prepare import compared, preparation
from nas.training.evaluate import by_split, print_table
from nas.training.prepared import Prepared
from nas.training.scores import scores_of
from nas.training.training import Training
from search_spaces.architecture import Architecture
from search_spaces.slices import NetworkSlice
from supernets.compact import cut

BATCHES = 1, 32


@dataclass(frozen=True)
class Member:
    """One of the networks."""

    budget: float
    arch: Architecture
    subnet: NetworkSlice

    @property
    def name(self) -> str:
        """In tables and in log.csv."""
        return str(self.budget)

    @property
    def costs(self) -> dict[str, float]:
        """Parameters, and GFLOPs (MACs)."""
        return {"params": self.arch.params, "gflops": self.arch.flops / 1e9}


def conclude_several(
    config: RetrainConfig,
    prepared: Prepared,
    training: Training,
    members: list[Member],
    whole: Mapping[str, Network],
    after: Afterwards,
) -> None:
    """Cut every network out and write it; then compare, measure all of them on the reported split, draw.

    whole: the networks of the backbone's size, by their names in the table.
    """
    loaders, device, folder = prepared.loaders, prepared.device, prepared.folder
    compact = {member.name: written(config, prepared, member) for member in members}
    small = training.objective.networks()
    for member in members:
        with after.part(f"comparing {compact_folder(member.budget)} with its subnet"):
            compared(small[member.name], compact[member.name], loaders, device)
    supernet = prepared.supernet
    table: dict[str, dict[str, Any]] = {
        name: {"params": supernet.params(), "gflops": supernet.flops() / 1e9} for name in whole
    } | {member.name: dict(member.costs) for member in members}
    networks: dict[str, Network] = {**whole, **compact}
    with after.part(f"measuring accuracy on the {loaders.reported}", together=True):
        measured = scores_of(prepared, config.seed, training.autocast, whole.get(as_it_was(prepared.model)))
        parts = ("", loaders.reported, loaders.test), ("held_out_", loaders.held_out, loaders.val)
        for prefix, images, batches in parts:
            if batches is not None:
                found = measured(networks, batches, f"measuring on the {images}")
                for name, k in ((name, k) for name in networks for k in measured.columns if f"{name}_{k}" in found):
                    table[name][f"{prefix}{k}"] = found[f"{name}_{k}"]
    facts: dict[str, Any] = {"stage": "retrain", "train": config.train, "space": prepared.space.name}
    facts |= {"dataset": config.dataset, "seed": config.seed, "split": loaders.reported, "result": config.result}
    facts |= {"held_out": None if loaders.val is None else loaders.held_out, "per_step": config.per_step}
    facts |= {"unreadable_images": report_unreadable(loaders), "left_out_files": dict(prepared.splits.left_out)}
    if not is_main():
        return
    with after.part("measuring speed"):
        for batch in BATCHES:
            speeds = images_per_second(networks, supernet.adapter.input_size, batch, device, training.autocast)
            for name, speed in speeds.items():
                table[name][f"images_per_s_{batch}"] = speed
    with after.part("timing the networks"):
        for member in members:
            table[member.name] |= clocked(member.arch, compact[member.name], [member.name], None).get(member.name, {})
    facts |= facts_of(members[0].arch)
    facts |= {"precision": str(training.amp_dtype or torch.float32), "threads": torch.get_num_threads()}
    rows = [row_of(member, table[member.name]) for member in members]
    with after.part("writing tables"):
        write_csv(folder / FRONT, rows)
        write_csv(folder / "table.csv", [{"network": name} | row for name, row in table.items()])
        write_json(folder / "summary.json", facts | after.facts() | {n: table[n] for n in whole} | {"front": rows})
    words = by_split(loaders.reported, loaders.held_out)
    print_table(table, f"{prepared.space.name} on {config.dataset}: a front", words)
    with after.part("drawing pictures"):
        plot_run(folder)
    folders = [compact_folder(member.budget) for member in members]
    print(f"results in {results_path(folder)}: {', '.join(folders)}, table.csv and pictures")
    print(f"next, for any of them: python -m nas.export {results_path(folder)}/{folders[0]}")


def row_of(member: Member, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of front.csv."""
    share = member.arch.search.get("share", member.arch.flops / member.arch.backbone_flops)  # of the search's own price
    return {"budget": member.budget, "price": share, **measured, "folder": compact_folder(member.budget)}


def written(config: RetrainConfig, prepared: Prepared, member: Member) -> nn.Module:
    """The compact network, and its folder as a run's: architecture, weights, basis."""
    compact = cut(prepared.supernet.backbone, member.subnet).eval()
    if is_main():
        folder = prepared.folder / compact_folder(member.budget)
        save_compact(compact, folder, member.arch, preparation(config, prepared.loaders))
        basis = basis_of(member.arch, prepared.folder)
        if basis is not None:
            save_basis(basis, folder)
    return compact
