"""What a search leaves that answers for several budgets: an architecture for each, one table, one picture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from nas.config import SearchConfig
from nas.data.loaders import report_unreadable
from nas.machine.devices import autocast
from nas.machine.distributed import is_main
from nas.machine.files import write_csv, write_json
from nas.machine.timing import Network
from nas.networks.architecture import slices_of
from nas.pictures.run import plot_run
from nas.prices.whole import clocked, is_clocked
from nas.prices.whole import facts_of as clock_facts
from nas.runs.folder import results_path
from nas.runs.front import FRONT, architecture_file
from nas.searchers.searcher import Answer
from nas.stages.afterwards import Afterwards
from nas.stages.next_command import next_command
from nas.stages.original import LARGE_NETWORK, as_it_was
from nas.training.evaluate import by_split, print_table
from nas.training.prepared import Prepared
from nas.training.refit import refitted
from nas.training.scores import scores_of
from search_spaces.architecture import Architecture, save_architecture
from search_spaces.slices import NetworkSlice
from supernets.compact import cut
from supernets.refit import written


@dataclass(frozen=True)
class Member:
    """The best architecture at a budget. share: its price, as a fraction of the backbone's."""

    budget: float
    arch: Architecture
    answer: Answer
    share: float

    @property
    def file(self) -> str:
        """Its name in the run's folder."""
        return architecture_file(self.budget)


def conclude_front(config: SearchConfig, prepared: Prepared, members: Sequence[Member], after: Afterwards) -> None:
    """Write the architectures, measure their networks (refitted where they are when they are cut), write the table."""
    loaders, folder = prepared.loaders, prepared.folder
    if is_main():
        for member in members:
            save_architecture(member.arch, folder / member.file)
    trained = LARGE_NETWORK in members[0].answer.trained
    before = LARGE_NETWORK if trained else as_it_was(prepared.model)
    scores: dict[str, dict[str, float]] = {name: {} for name in (before, *(str(m.budget) for m in members))}
    with after.part(f"measuring accuracy on the {loaders.reported}", together=True):
        if trained or (prepared.start.given() and not prepared.fresh_classifier):
            scores[before] = scores_at(config, prepared, prepared.supernet.large)
        for member in members:
            subnet = slices_of(member.arch, prepared.supernet.shapes)
            with cut_like(config, prepared, subnet) as network:
                scores[str(member.budget)] = scores_at(config, prepared, network)
    clocks: dict[str, dict[str, float]] = {}
    with after.part("timing the networks"):
        for member in members if is_main() and is_clocked(members[0].arch) else ():
            compact = cut(prepared.supernet.backbone, slices_of(member.arch, prepared.supernet.shapes))
            clocks |= clocked(member.arch, compact, [str(member.budget)], None)
    if not is_main():
        return
    first, supernet = members[0].arch, prepared.supernet
    table = {before: {"params": supernet.params(), "gflops": supernet.flops() / 1e9} | scores[before]}
    rows: list[dict[str, Any]] = []
    for m in members:
        costs = {"params": m.arch.params, "gflops": m.arch.flops / 1e9}
        costs |= clocks.get(str(m.budget), {})
        table[str(m.budget)] = costs | scores[str(m.budget)]
        facts = {"budget": m.budget, "price": m.share, **costs, "in_band": m.answer.in_band, "file": m.file}
        rows.append(facts | {"value": m.answer.value} | scores[str(m.budget)])
    with after.part("writing tables"):
        write_csv(folder / FRONT, rows)
        write_json(folder / "summary.json", facts_of(config, prepared, members) | after.facts() | {"front": rows})
    print_table(table, f"{first.space} on {config.dataset}: a front", by_split(loaders.reported, loaders.held_out))
    for m in members:
        if not m.answer.in_band:
            print(f"budget {m.budget:.4g}: {m.budget - m.share:.4f} of it is unused by the best that was found")
    with after.part("drawing pictures"):
        plot_run(folder)
    print(f"results in {results_path(folder)}: {', '.join(m.file for m in members)}")
    print(f"next, for any of them: {next_command(config, folder, members[0].file)}")


def scores_at(config: SearchConfig, prepared: Prepared, network: Network) -> dict[str, float]:
    """What a network is worth on the reported split, and as held_out_... on the held-out part."""
    loaders, precision = prepared.loaders, partial(autocast, config, prepared.device)
    measured = scores_of(prepared, config.seed, precision, prepared.supernet.large)
    found: dict[str, float] = {}
    for prefix, batches in (("", loaders.test), ("held_out_", loaders.val)):
        if batches is not None:
            networks, words = {"network": network}, f"measuring on the {loaders.reported}"
            scores = measured(networks, batches) if prefix else measured.reported(networks, batches, words)
            found |= {f"{prefix}{name.removeprefix('network_')}": value for name, value in scores.items()}
    return found


@contextmanager
def cut_like(config: SearchConfig, prepared: Prepared, subnet: NetworkSlice) -> Iterator[Network]:
    """The subnet as its compact network computes it; the supernet keeps its own weights."""
    values = refitted(config, prepared, subnet) if prepared.plan.refits else {}
    with written(prepared.supernet, subnet, values):
        yield partial(prepared.supernet.small, small=subnet)


def facts_of(config: SearchConfig, prepared: Prepared, members: Sequence[Member]) -> dict[str, Any]:
    """What summary.json says of the run."""
    loaders = prepared.loaders
    return {
        "stage": "search",
        "space": members[0].arch.space,
        "dataset": config.dataset,
        "seed": config.seed,
        "split": loaders.reported,
        "held_out": loaders.held_out,
        **clock_facts(members[0].arch),
        "unreadable_images": report_unreadable(loaders),
        "left_out_files": dict(prepared.splits.left_out),
        "seconds": dict(members[0].answer.seconds),
        "refitted": prepared.plan.refits,
    }
