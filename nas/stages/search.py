"""Stage 1: search a supernet for an architecture, and write arch.json."""

import shlex
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.config import SearchConfig
from nas.data.loaders import open_data, report_unreadable
from nas.machine.devices import amp_dtype, autocast, pick_device
from nas.machine.distributed import is_main, joined, on_main, quiet_unless_main
from nas.machine.files import write_json
from nas.machine.ranges import as_given
from nas.machine.timing import Network, timed
from nas.methods.recipe import departures
from nas.methods.table import foreign_to, training_of
from nas.networks.architecture import architecture_of, slices_of, write_architecture
from nas.networks.basis_file import recorded as recorded_basis
from nas.networks.basis_file import save_basis
from nas.networks.compact_file import save_compact
from nas.networks.rounds import ROUND, check_resumed, save_round, with_stem
from nas.networks.weights import save_weights
from nas.pictures.run import plot_run
from nas.prices.costs import Bound
from nas.prices.flops import FLOPS
from nas.prices.options import BAND
from nas.prices.whole import clocked, facts_of, is_clocked
from nas.runs.folder import PLACE, SUPERNET, open_run, results_path
from nas.searchers.measured import Measured
from nas.searchers.searcher import Answer, Run
from nas.stages.afterwards import Afterwards
from nas.stages.asked import Asked, ask, headline, resolve, said, started_from
from nas.stages.front import Member, conclude_front
from nas.stages.next_command import data_words, next_command
from nas.stages.original import LARGE_NETWORK, as_it_was, untouched
from nas.stages.prepare import Beginning, compared, preparation, prepare
from nas.training.basis import Standing
from nas.training.evaluate import by_split, print_table
from nas.training.loop import OnEpoch
from nas.training.prepared import Prepared
from nas.training.refit import kept_refit
from nas.training.scores import scores_of
from search_spaces.architecture import Architecture
from search_spaces.registry import SPACES, Space
from search_spaces.slices import NetworkSlice, network_slice
from supernets.basis import Basis, timm_state
from supernets.compact import cut
from supernets.refit import written

RECORDED = (  # options of everybody's search that arch.json keeps
    "dataset", "val_fraction", "epochs", "price", "gflops", "mparams", "ms",
    "band", "batch_size", "lr", "start", "arch_lr", "arch_data", "gamma", "seed",
    "stage_width", "alphas", "pretrained", "amp", "detach_teacher", "basis", "importance",
)  # fmt: skip


def run_search(config: SearchConfig, on_epoch: OnEpoch | None = None) -> Path:
    """Run stage 1 to its end and return the run's folder. Under torchrun, every process calls it.

    on_epoch: as in `fit`.
    """
    config, space = resolve(config)
    device = pick_device(config)
    with joined(device), quiet_unless_main():
        return _search(config, space, device, on_epoch)


def _search(config: SearchConfig, space: Space, device: torch.device, on_epoch: OnEpoch | None) -> Path:
    splits = open_data(config)
    asked = ask(config, space, splits)
    answer = asked.searcher.pick(config, asked.question)
    if answer is not None:
        return picked(asked, answer)
    start = started_from(config)
    classes, measures, trains = asked.outputs.classes, asked.searcher.measures, config.supernet is not None
    as_it_comes, apart = measures and not trains, measures and trains
    beginning = Beginning("search", space, asked.model, splits, classes, start, device, asked.plan, as_it_comes, apart)
    held_out = config.arch_data == "val"
    config, prepared = prepare(config, beginning, said(asked), start.name(), held_out)
    keep_earlier(asked, prepared)
    asked = replace(asked, config=replace(config, **training_of(space).resolved(config, prepared)))
    print(headline(asked))
    run, after = run_of(asked, prepared, on_epoch), Afterwards(prepared.folder)
    if isinstance(asked.searcher, Measured) and config.front:
        answers = [standing_in(asked, prepared, answer) for answer in asked.searcher.front(run, config.front)]
        write_supernet(prepared)
        members = [member_of(at(asked, b), answer) for b, answer in zip(config.front, answers, strict=True)]
        conclude_front(config, prepared, members, after)
        after.end()
        return prepared.folder
    answer = standing_in(asked, prepared, asked.searcher.search(run))
    arch = found(asked, answer)
    write_architecture(arch, prepared.folder)
    write_supernet(prepared)
    conclude(asked, answer, prepared, arch, after)
    after.end()
    return prepared.folder


def keep_earlier(asked: Asked, prepared: Prepared) -> None:
    """Write down which run the search goes on from; UserError where a resumed one went on from another."""
    earlier, folder = asked.earlier, prepared.folder
    if earlier is not None:
        on_main(lambda: check_resumed(earlier, folder))
        on_main(lambda: save_round(earlier, folder))


def standing_in(asked: Asked, prepared: Prepared, answer: Answer) -> Answer:
    """The answer, in a basis that changes nothing where arch.json needs one: to say that the stem ends in a layer."""
    if asked.backbone.adapter.stem_layer is None:
        return answer
    if not answer.standing.basis:
        as_it_is = Basis(orders={"stream.0": list(range(prepared.supernet.shapes[0].embed_dim))})
        on_main(lambda: save_basis(as_it_is, prepared.folder))
        answer = replace(answer, standing=Standing(basis=recorded_basis(as_it_is)))
    return replace(answer, standing=Standing(basis=with_stem(answer.standing.basis, asked.backbone)))


def write_supernet(prepared: Prepared) -> None:
    """The network's weights as the search leaves them, in timm's form."""
    if is_main():
        save_weights(timm_state(prepared.supernet), prepared.folder / SUPERNET)


def at(asked: Asked, budget: float) -> Asked:
    """The same at one budget of a front."""
    return replace(asked, question=replace(asked.question, budget=budget))


def member_of(asked: Asked, answer: Answer) -> Member:
    """An answer as a member of a front."""
    budget, priced, arch = asked.question.budget, asked.question.priced, found(asked, answer)
    assert budget is not None
    return Member(budget, arch, answer, priced.network_cost(slices_of(arch, priced.space.shapes)) / priced.full)


def run_of(asked: Asked, prepared: Prepared, on_epoch: OnEpoch | None) -> Run:
    """What the searcher works with: the method's objective among it, made when it is asked for."""
    objective = partial(training_of(asked.space).objective, asked.config, asked.question, prepared)
    return Run(asked.config, asked.question, prepared, objective, on_epoch)


def picked(asked: Asked, answer: Answer) -> Path:
    """Write what prices alone have answered: there are no weights, and nothing to measure."""
    config = open_run(asked.config, f"search-{asked.space.name}-{asked.config.dataset}")
    assert config.output is not None
    for line in said(asked):
        print(line)
    arch = found(asked, answer)
    write_architecture(arch, config.output)
    print_unused(asked, answer, arch)
    picks = ", ".join(f"{name} {value}" for name, value in answer.picks[0].items())
    print(
        f"{picks} in every block; {asked.searcher.name} needs no training\nnext: {next_command(config, config.output)}"
    )
    return config.output


def found(asked: Asked, answer: Answer) -> Architecture:
    """The architecture of an answer, checked against the space's grammar, with the options that led there."""
    config, space = asked.config, asked.question.priced.space
    picks, full = space.validated(answer.picks), config.stage_width == "full"
    name, model = asked.space.name, asked.model
    arch = architecture_of(asked.original, name, model.name, model.kwargs, picks, config.width, answer.kept, full)
    kept = recorded(asked)
    settings: dict[str, Any] = {k: v for k, v in asdict(config).items() if k in kept and v is not None}
    settings |= {"searcher": asked.searcher.name, "budget": asked.question.budget, "space_size": float(space.size())}
    settings |= dict(answer.found) | {"recipe": config.recipe}
    costs, subnet = asked.question.priced, slices_of(arch, asked.question.priced.space.shapes)
    settings["share"] = costs.network_cost(subnet) / costs.full
    for each in (costs, *(bound.priced for bound in costs.bounds)):
        settings |= each.price.recorded(each.network_cost(subnet), each.full)
    if other := departures(config, asked.space, "search"):
        settings["other_than_published"] = sorted(other)
    checkpoint = started_from(config).checkpoint
    if checkpoint is not None:
        settings["checkpoint"] = str(checkpoint)
    if asked.earlier is not None:
        settings[ROUND] = asked.earlier.record()
    return replace(arch, permutation=answer.standing.permutation, basis=answer.standing.basis, search=settings)


def recorded(asked: Asked) -> set[str]:
    """The options that arch.json keeps: everybody's, the method's, the searcher's; none that only others read."""
    foreign = {f.name for record in foreign_to(asked.searcher, asked.space) for f in fields(record)}
    own = {f.name for record in asked.searcher.owned(asked.space.method) for f in fields(record)}
    return ({*RECORDED, *training_of(asked.space).recorded} | own) - foreign - {"front", *PLACE}


def conclude(asked: Asked, answer: Answer, prepared: Prepared, arch: Architecture, after: Afterwards) -> None:
    """Refit and cut where that is the method's way; measure what was found, write the summary, draw.

    The results are measured on the reported split too, once and last: it decides nothing.
    """
    remarks(asked, answer, arch)
    config, supernet, loaders = asked.config, prepared.supernet, prepared.loaders
    subnet = slices_of(arch, supernet.shapes)
    precision = partial(autocast, config, prepared.device)
    full = network_slice(supernet.shapes, subnet.blocks, full_stage_width=True)
    reference = LARGE_NETWORK if LARGE_NETWORK in answer.trained else as_it_was(asked.model)
    networks: dict[str, Network] = {"subnet": partial(supernet.small, small=subnet)}
    with after.part("loading the original network"):
        networks = reference_network(prepared, answer, reference) | networks
    more: dict[str, Network] = {}
    seconds = dict(answer.seconds)
    if training_of(asked.space).refits:
        with timed(seconds, "refit"):
            networks["compact"] = refitted_compact(config, prepared, arch, subnet, after)
    else:
        more["full_width"] = partial(supernet.small, small=full)
    measured = scores_of(prepared, config.seed, precision, networks.get(reference))
    held_out: dict[str, float] = {}
    scores: dict[str, float] = {}
    with after.part(f"measuring accuracy on the {loaders.reported}", together=True):
        if loaders.val is not None:
            held_out = measured(networks | more, loaders.val)
        words = f"measuring on the {loaders.reported}"
        results = {name: each for name, each in networks.items() if name != "subnet" or "compact" not in networks}
        scores = measured.reported(results, loaders.test, words)
    small = {"params": arch.params, "gflops": arch.flops / 1e9}
    table = {reference: {"params": asked.backbone.params(), "gflops": asked.backbone.flops() / 1e9}}
    table |= {name: dict(small) for name in networks if name != reference}
    for name in networks:
        for k in measured.columns:
            if f"{name}_{k}" in scores:
                table[name][k] = scores[f"{name}_{k}"]
            if f"{name}_{k}" in held_out:
                table[name][f"held_out_{k}"] = held_out[f"{name}_{k}"]
    facts: dict[str, Any] = {"stage": "search", "space": arch.space, "dataset": config.dataset, "seed": config.seed}
    facts |= facts_of(arch)
    facts |= {"budget": asked.question.budget, "split": loaders.reported}
    facts |= {"held_out": loaders.held_out if held_out else None}
    facts |= {"precision": str(amp_dtype(config, prepared.device) or torch.float32)}
    facts |= {"unreadable_images": report_unreadable(loaders), "left_out_files": dict(prepared.splits.left_out)}
    facts |= {"finalists": list(answer.finalists), "trained": list(answer.trained)}
    narrowing = {
        "stage_widths": list(subnet.stage_widths),
        "held_out_top1_full_stage_width": held_out.get("full_width_top1"),
        "held_out_top1_narrowed": held_out.get("subnet_top1"),
    }
    if not is_main():
        return
    if is_clocked(arch):
        with after.part("timing the networks"):
            compact = networks["compact"] if "compact" in networks else cut(supernet.backbone, subnet)
            assert isinstance(compact, nn.Module)
            whole = reference if reference in table and asked.earlier is None else None
            for name, row in clocked(arch, compact, [n for n in table if n != reference], whole).items():
                table[name] |= row
    with after.part("writing tables"):
        facts |= dict(answer.found) | ({"seconds": seconds} if seconds else {}) | after.facts()
        write_json(prepared.folder / "summary.json", facts | table | {"narrowing": narrowing})
    print_table(table, f"{arch.space} on {config.dataset}", by_split(loaders.reported, loaders.held_out))
    if "full_width" in more and subnet != full and "full_width_top1" in held_out:
        print(
            f"top-1 of the subnet before narrowing its stages {held_out['full_width_top1']:.2f} %,"
            f" after {held_out['subnet_top1']:.2f} %, on {loaders.held_out}"
        )
    with after.part("drawing pictures"):
        plot_run(prepared.folder)
    if seconds:
        print(f"seconds: {', '.join(f'{name} {value:.1f}' for name, value in seconds.items())}")
    print(f"results in {results_path(prepared.folder)}\nnext: {next_command(config, prepared.folder)}")


def reference_network(prepared: Prepared, answer: Answer, name: str) -> dict[str, Network]:
    """What the result is to be seen beside, by its name in the table; empty where nothing was trained for the classes.

    The large network as the search trained it; as it was, where the search trained nothing or the subnet alone.
    """
    if name == LARGE_NETWORK:
        return {name: prepared.supernet.large}
    if prepared.fresh_classifier or not prepared.start.given():
        return {}
    network = untouched(prepared, prepared.start) if answer.trained else prepared.supernet.large
    return {} if network is None else {name: network}


def refitted_compact(
    config: SearchConfig, prepared: Prepared, arch: Architecture, subnet: NetworkSlice, after: Afterwards
) -> nn.Module:
    """The compact network, refitted (section 2.11), written beside arch.json; the supernet stays as it is."""
    supernet, loaders = prepared.supernet, prepared.loaders
    with written(supernet, subnet, kept_refit(config, prepared, subnet)):
        compact = cut(supernet.backbone, subnet).eval()
        if is_main():
            save_compact(compact, prepared.folder, arch, preparation(config, loaders))
        with after.part("comparing compact.safetensors with the subnet"):
            compared(partial(supernet.small, small=subnet), compact, loaders, prepared.device)
    return compact


def remarks(asked: Asked, answer: Answer, arch: Architecture) -> None:
    """Say what the method has to say of its result, and what is left of the budget."""
    words, share = training_of(asked.space).remarks(answer.found), arch.flops / arch.backbone_flops
    if words:
        print(f"{share:.2%} of the FLOPs kept; {words}")
    print_unused(asked, answer, arch)


def print_unused(asked: Asked, answer: Answer, arch: Architecture) -> None:
    """How much of the budget is left over, where that is more than it need be, and what would use it."""
    question = asked.question
    budget, band, costs = question.budget, question.band, question.priced
    if budget is None:
        return
    subnet = slices_of(arch, costs.space.shapes)
    unused = budget - costs.network_cost(subnet) / costs.full
    tight = [bound for bound in costs.bounds if is_used_up(bound, subnet)]
    if tight and (not answer.in_band or unused > BAND):
        words = " and ".join(bound.words for bound in tight)
        print(f"{unused:.4f} of the budget in {costs.price.words} is unused, for {words} is used up")
        return
    if not answer.in_band:
        print(f"no architecture between {budget - band:.4f} and {budget:.4f} of the {costs.price.words}")
    if not answer.in_band or unused > BAND:
        print(f"{unused:.4f} of the budget is unused; {finer_space(asked)}")


def is_used_up(bound: Bound, subnet: NetworkSlice) -> bool:
    """Whether an architecture is as near to another price's limit as one that fills a budget."""
    return bound.most - bound.priced.network_cost(subnet) <= BAND * bound.priced.full


def finer_space(asked: Asked) -> str:
    """What would use a budget up: smaller steps between widths, or a space where every width is chosen by itself."""
    config, space, settings = asked.config, asked.space, asked.question.priced.space.settings
    if not space.method.halves:
        finer = next(s for s in SPACES.values() if (s.family, s.nano) == (space.family, space.nano) and s.method.halves)
        words = ["--space", finer.name]
    elif settings.granularity > 1:
        words = ["--space", space.name, "--granularity", str(settings.granularity // 2)]
    else:
        return "this space has none finer"
    start = started_from(config)
    words += ["--arch", str(config.arch)] if config.arch else []
    words += ["--budget", f"{config.budget:g}"] if config.budget else []
    words += ["--price", str(config.price)] if config.budget and config.price != FLOPS.name else []
    for limit, value in config.limits().items():
        words += as_given(limit, value).split()
    words += ["--latency-table", str(config.latency_table)] if config.latency_table else []
    words += ["--model", config.model] if config.model else []
    words += ["--model-kwargs", *config.model_kwargs] if config.model_kwargs else []
    words += ["--checkpoint", str(config.checkpoint)] if config.checkpoint else []
    words += data_words(config)
    trained = "" if start.given() else ", once the network is trained (--checkpoint)"
    return f"a finer space would use it{trained}: {shlex.join(['python', 'search.py', *words])}"
