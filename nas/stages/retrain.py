"""Stage 2: train an architecture adjoined with its backbone, and cut the compact network out.

Or, for comparison: the large network alone (--train plain), the small one under a frozen teacher (--train distill).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nas.config import RetrainConfig, with_defaults
from nas.data.loaders import open_data, report_unreadable
from nas.machine.devices import pick_device
from nas.machine.distributed import is_main, joined, on_main, quiet_unless_main
from nas.machine.files import write_csv, write_json
from nas.machine.timing import Network, images_per_second
from nas.methods.recipe import recipe_lines
from nas.methods.table import training_of
from nas.networks.architecture import write_architecture
from nas.networks.basis_file import recorded, save_basis
from nas.networks.compact_file import save_compact
from nas.networks.rounds import copy_round
from nas.networks.weights import save_weights
from nas.objectives.table import Kind, kind_of
from nas.objectives.teacher import Teacher, make_teacher
from nas.pictures.run import plot_run
from nas.prices.whole import clocked, facts_of
from nas.runs.folder import LARGE, results_path
from nas.stages.afterwards import Afterwards
from nas.stages.goal import (
    SEARCHED,
    Goal,
    Origin,
    first_of,
    folder_of,
    goal_of,
    learning,
    origin_of,
    original,
    outputs_of,
    resolve,
    unfounded,
)
from nas.stages.original import LARGE_NETWORK, as_it_was, untouched
from nas.stages.prepare import Beginning, compared, preparation, prepare
from nas.stages.several import Member, conclude_several
from nas.training.basis import find_basis
from nas.training.evaluate import print_table
from nas.training.loop import OnEpoch, fit
from nas.training.make import make_training
from nas.training.meter import Diverged
from nas.training.objective import Objective
from nas.training.prepared import Prepared
from nas.training.rate import find_rate, may_be_tried
from nas.training.refit import REFIT, known_refit, refitted
from nas.training.scores import scores_of
from nas.training.state import BEST, CHECKPOINT, go_back, settle
from nas.training.training import Training
from search_spaces.architecture import Architecture
from search_spaces.registry import Space
from supernets.basis import rewrite, timm_state
from supernets.compact import cut
from supernets.importance import permute
from supernets.refit import write


def run_retrain(config: RetrainConfig, on_epoch: OnEpoch | None = None) -> Path:
    """Run stage 2 to its end and return the run's folder. Under torchrun, every process calls it.

    on_epoch: as in `fit`.
    """
    asked = config.train
    config, space, archs = resolve(config)
    device = pick_device(config)
    with joined(device), quiet_unless_main():
        return _retrain(config, space, archs, device, on_epoch, asked)


def _retrain(
    config: RetrainConfig,
    space: Space,
    archs: Mapping[str, Architecture] | None,
    device: torch.device,
    on_epoch: OnEpoch | None,
    asked: str | None,
) -> Path:
    splits = open_data(config)
    outputs = outputs_of(config, space, first_of(archs), splits)
    config, lines = learning(config, asked, outputs)
    goal = goal_of(config, space, archs, splits, outputs.classes)
    origin = origin_of(goal, outputs.classes)
    beginning = Beginning("retrain", space, goal.model, splits, outputs.classes, origin.start, device, goal.plan)
    lines = (*recipe_lines(config, space, "retrain"), *outputs.lines(), *lines)
    config, prepared = prepare(config, beginning, lines, seen_by=origin.seen_by)
    goal = replace(goal, config=config)
    teacher = teacher_of(goal, prepared)
    goal = rewritten(goal, origin, prepared)
    begin(goal, origin, prepared)
    objective = objective_of(goal, prepared, teacher).to(device)
    if config.lr is None:
        config = replace(config, lr=rate_of(goal, objective, prepared))
        goal = replace(goal, config=config)
    training = make_training(config, objective, prepared)
    training.measure_start = config.result == "best"
    print(headline(goal, origin))
    if goal.arch is not None and not goal.budgets:
        write_architecture(goal.arch, prepared.folder)
    if goal.model.cut is not None:
        on_main(lambda: copy_round(folder_of(config), prepared.folder))
    after = Afterwards(prepared.folder)
    train(goal, training, after, on_epoch)
    if goal.budgets:
        conclude_front(goal, prepared, training, teacher, after)
    else:
        conclude(goal, prepared, training, teacher, after)
    after.end()
    return prepared.folder


def train(goal: Goal, training: Training, after: Afterwards, on_epoch: OnEpoch | None) -> None:
    """Train, and leave in the supernet the weights to be measured and cut.

    Of a run that comes to nothing the best network there was; Diverged where there was none.
    """
    best = goal.config.result == "best"
    try:
        fit(training, goal.config.resume, "retrain", on_epoch)
    except Diverged as error:
        if not go_back(training):
            raise
        best = True
        taken = BEST if (training.folder / BEST).is_file() else CHECKPOINT
        after.note(f"{error}; the networks are those of {taken}")
    settle(training, best)


def teacher_of(goal: Goal, prepared: Prepared) -> Teacher | None:
    """Whom the small network learns from, where it does."""
    config = goal.config
    asked = f"--train {config.train}" if kind_of(config.trained()).teacher else "--adjoined-teacher frozen"
    if asked == "--adjoined-teacher frozen" and config.adjoined_teacher != "frozen":
        return None
    return make_teacher(config, prepared, original(config, goal.given), asked)


def rewritten(goal: Goal, origin: Origin, prepared: Prepared) -> Goal:
    """The goal with its basis, or its order of importance, in which the supernet stands from here on."""
    arch = goal.arch
    if arch is None:
        return goal  # a basis would change nothing
    if goal.given is None or unfounded(goal.given):
        standing = find_basis(goal.config, prepared)
        return goal.with_archs(permutation=standing.permutation, basis=standing.basis)
    basis = goal.basis
    if basis is not None:
        on_main(lambda: save_basis(basis, prepared.folder))
        rewrite(prepared.supernet, basis, again=origin.words == SEARCHED)
        return goal.with_archs(basis=recorded(basis) | {"streams": arch.basis["streams"]})
    if arch.permutation and origin.words != SEARCHED:  # the search's weights are in that order already
        permute(prepared.supernet, arch.permutation)
    prepared.supernet.sorted = arch.permutation
    return goal


def begin(goal: Goal, origin: Origin, prepared: Prepared) -> None:
    """Refit the subnet in the supernet's weights, where it alone is trained on from there (section 2.11).

    Or take what its search refitted. The networks of a front share their weights: what one's refit writes is not for
    another.
    """
    kind = kind_of(goal.config.trained())
    resumed = goal.config.resume and on_main((prepared.folder / CHECKPOINT).is_file)
    if len(goal.archs) == 1 and kind.teacher and training_of(goal.space).refits and not resumed:
        config, values = goal.config, None
        if origin.words == SEARCHED:
            values = known_refit(config, prepared, goal.subnet, folder_of(config))
        if values is None:
            values = refitted(config, prepared, goal.subnet)
        else:
            print(f"refitted by the search: {results_path(folder_of(config) / REFIT)}")
        write(prepared.supernet, goal.subnet, values)


def objective_of(goal: Goal, prepared: Prepared, teacher: Teacher | None) -> Objective:
    """What --train minimises, by the space's method where that has its own."""
    kind: Kind = kind_of(goal.config.trained())
    make = training_of(goal.space).objectives.get(kind.name, kind.make)
    return make(goal.config, prepared.supernet, goal.members, teacher)


def rate_of(goal: Goal, objective: Objective, prepared: Prepared) -> float:
    """A learning rate that follows the start; the space's own where nothing is to be lost, or nothing shows it."""
    if may_be_tried(prepared):
        return find_rate(goal.config, objective, prepared)
    own = with_defaults(goal.config, goal.space, "retrain").lr
    assert own is not None
    print(
        f"learning rate {own:g}, the space's own: the start was not trained for these classes, or nothing is held out"
    )
    return own


def headline(goal: Goal, origin: Origin) -> str:
    """What is trained, in one line."""
    large, small = goal.backbone, goal.arch
    words = f"{goal.space.name} on {goal.config.dataset}, from {origin.words}: large {large.params() / 1e6:.3f} M,"
    words += f" {large.flops() / 1e9:.4g} GFLOPs (MACs)"
    if small is None:
        return f"{words}, trained alone"
    if goal.budgets:
        return f"{words}; small {', '.join(f'{arch.flops / 1e9:.4g}' for arch in goal.archs.values())} GFLOPs"
    return f"{words}; small {small.params / 1e6:.3f} M, {small.flops / 1e9:.4g} GFLOPs"


def conclude(goal: Goal, prepared: Prepared, training: Training, teacher: Teacher | None, after: Afterwards) -> None:
    """Cut the compact network out and write it; then compare, measure every network on the reported split, draw.

    A network appears in the table only if this run trained it, or learnt from it; and the original one, as it was,
    where no large network was trained.
    """
    config, folder, device, loaders = goal.config, prepared.folder, prepared.device, prepared.loaders
    networks: dict[str, Network] = dict(training.objective.networks())
    with after.part("loading the original network"):
        networks = beside_original(goal, prepared, networks, teacher)
    facts: dict[str, Any] = {"stage": "retrain", "train": config.train, "space": goal.space.name}
    facts |= {"dataset": config.dataset, "seed": config.seed, "split": loaders.reported, "result": config.result}
    facts |= {"held_out": None if loaders.val is None else loaders.held_out}
    table = written(goal, prepared, networks, teacher)
    if goal.arch is not None:
        facts |= {"budget": goal.arch.search.get("budget")}
        with after.part("comparing compact.safetensors with the subnet"):
            facts |= compared(networks["subnet"], networks["compact"], loaders, device)
    with after.part(f"measuring accuracy on the {loaders.reported}", together=True):
        measured = scores_of(prepared, config.seed, training.autocast, networks.get(as_it_was(goal.model)))
        scores = measured.reported(networks, loaders.test, f"measuring on the {loaders.reported}")
        for name in networks:
            table[name] |= {k: scores[f"{name}_{k}"] for k in measured.columns if f"{name}_{k}" in scores}
    facts |= {"unreadable_images": report_unreadable(loaders), "left_out_files": dict(prepared.splits.left_out)}
    if not is_main():
        return
    with after.part("measuring speed"):
        for batch in (1, 32):
            size = prepared.supernet.adapter.input_size
            speeds = images_per_second(networks, size, batch, device, training.autocast)
            for name, speed in speeds.items():
                table[name][f"images_per_s_{batch}"] = speed
    if goal.arch is not None:
        facts |= facts_of(goal.arch)
        with after.part("timing the networks"):
            beside = [name for name in (as_it_was(goal.model), LARGE_NETWORK) if name in table]
            whole = beside[0] if beside and goal.model.cut is None else None
            small, compact = [name for name in ("subnet", "compact") if name in table], networks["compact"]
            assert isinstance(compact, torch.nn.Module)
            for name, row in clocked(goal.arch, compact, small, whole).items():
                table[name] |= row
    facts |= {"precision": str(training.amp_dtype or torch.float32), "threads": torch.get_num_threads()}
    with after.part("writing tables"):
        write_json(folder / "summary.json", facts | after.facts() | table)
        write_csv(folder / "table.csv", [{"network": name} | row for name, row in table.items()])
    print_table(table, f"{goal.space.name} on {config.dataset}, {loaders.reported}")
    with after.part("drawing pictures"):
        plot_run(folder)
    files = [name for name in ("compact.safetensors", LARGE, "arch.json") if (folder / name).is_file()]
    print(f"results in {results_path(folder)}: {', '.join(files)}, table.csv and pictures")


def conclude_front(
    goal: Goal, prepared: Prepared, training: Training, teacher: Teacher | None, after: Afterwards
) -> None:
    """As `conclude`, for the networks of a front."""
    prepared.supernet.eval()
    whole = {k: network for k, network in training.objective.networks().items() if k not in goal.archs}
    if LARGE_NETWORK in whole and is_main():
        save_weights(timm_state(prepared.supernet), prepared.folder / LARGE)
    with after.part("loading the original network"):
        whole = beside_original(goal, prepared, whole, teacher)
    rows = zip(goal.budgets, goal.archs.values(), goal.members.subnets.values(), strict=True)
    members = [Member(budget, arch, subnet) for budget, arch, subnet in rows]
    conclude_several(goal.config, prepared, training, members, whole, after)


def beside_original(
    goal: Goal, prepared: Prepared, networks: dict[str, Network], teacher: Teacher | None
) -> dict[str, Network]:
    """The networks with the original one first, where that was trained for the classes: the teacher where it is it.

    Beside a large network that was trained the original is named only where the small one learnt from it.
    """
    base = original(goal.config, goal.given)
    if "teacher" in networks and teacher is not None and not teacher.named and base.given():
        others = {name: network for name, network in networks.items() if name != "teacher"}
        return {as_it_was(goal.model): networks["teacher"]} | others
    network = None if LARGE_NETWORK in networks else untouched(prepared, base)
    return networks if network is None else {as_it_was(goal.model): network} | networks


def written(
    goal: Goal, prepared: Prepared, networks: dict[str, Network], teacher: Teacher | None
) -> dict[str, dict[str, Any]]:
    """Write what was trained, before anything can fail on it; adds the compact network. Parameters and FLOPs of all."""
    supernet, arch, folder = prepared.supernet.eval(), goal.arch, prepared.folder
    table: dict[str, dict[str, Any]] = {}
    if teacher is not None and "teacher" in networks:
        table["teacher"] = {"params": teacher.params, "gflops": teacher.flops / 1e9}
    whole = {"params": goal.backbone.params(), "gflops": goal.backbone.flops() / 1e9}
    before = as_it_was(goal.model)
    if before in networks or (LARGE_NETWORK not in networks and teacher is None):
        table[before] = dict(whole)
    if LARGE_NETWORK in networks:
        table[LARGE_NETWORK] = dict(whole)
        if is_main():
            save_weights(timm_state(supernet), folder / LARGE)
    if arch is not None:
        compact = cut(supernet.backbone, goal.subnet).eval()
        networks["compact"] = compact
        if is_main():
            save_compact(compact, folder, arch, preparation(goal.config, prepared.loaders))
        table["subnet"] = {"params": arch.params, "gflops": arch.flops / 1e9}
        table["compact"] = {"params": sum(p.numel() for p in compact.parameters()), "gflops": arch.flops / 1e9}
    return table
