"""Stage 2: train an architecture adjoined with its backbone, and cut the compact network out.

Or, for comparison: the large network alone (--train plain), the small one under a frozen teacher (--train distill).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nas.config import RetrainConfig, with_defaults
from nas.data.datasets import Splits
from nas.data.loaders import open_data, report_unreadable
from nas.data.split_names import trained_before
from nas.machine.devices import pick_device
from nas.machine.distributed import is_main, joined, on_main, quiet_unless_main
from nas.machine.files import write_csv, write_json
from nas.machine.timing import Network, images_per_second
from nas.methods.recipe import recipe_lines, with_recipe
from nas.methods.table import alternatives, check_owned, training_of
from nas.networks.architecture import architecture_of, slices_of, write_architecture
from nas.networks.backbone import Start, TimmModel
from nas.networks.basis_file import basis_of, recorded, save_basis, streams_of
from nas.networks.classes import FEATURES, Outputs
from nas.networks.classes import outputs_of as outputs_anew
from nas.networks.compact_file import save_compact, with_classes
from nas.networks.opening import meta_supernet, model_of, start_of
from nas.networks.rounds import ROUND, check_unchanged, copy_round, large_model
from nas.networks.weights import save_weights
from nas.objectives.members import ONE, PER_STEP, Members
from nas.objectives.options import TeacherOptions
from nas.objectives.table import KINDS, UNLABELLED, Kind, kind_of
from nas.objectives.teacher import Teacher, make_teacher
from nas.pictures.run import plot_run
from nas.prices.whole import clocked, facts_of
from nas.runs.folder import LARGE, SUPERNET, results_path
from nas.runs.front import is_front, read_front
from nas.stages.afterwards import Afterwards
from nas.stages.original import LARGE_NETWORK, as_it_was, untouched
from nas.stages.planned import Cuts, looked_at, planned
from nas.stages.prepare import Beginning, compared, preparation, prepare
from nas.stages.several import Member, conclude_several
from nas.training.basis import find_basis
from nas.training.evaluate import print_table
from nas.training.loop import OnEpoch, fit
from nas.training.make import make_training
from nas.training.meter import Diverged
from nas.training.objective import Objective
from nas.training.plan import BasisPlan
from nas.training.prepared import Prepared
from nas.training.rate import find_rate, may_be_tried
from nas.training.refit import refitted
from nas.training.scores import scores_of
from nas.training.state import BEST, CHECKPOINT, go_back, settle
from nas.training.training import Training
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import Space, get_space
from search_spaces.slices import NetworkSlice
from search_spaces.space import check_uniform_alpha, make_space
from supernets.basis import Basis, install_stages, rewrite, timm_state
from supernets.compact import cut
from supernets.flops import whole_stages
from supernets.importance import permute
from supernets.refit import write
from supernets.supernet import Supernet

SEARCHED, ORIGINAL, DRAWN = "the search's supernet", "the original weights", "timm's initialisation"


@dataclass(frozen=True)
class Goal:
    """What is trained, known before any weight is loaded. backbone: on the meta device.

    members: the small networks, none where the large one is trained alone; archs: their architectures, by the same
    names. given: the architecture as --arch holds it, of a front the narrowest. plan: of the basis, where that is still
    to be found; basis: that of --arch.
    """

    config: RetrainConfig
    space: Space
    model: TimmModel
    backbone: Supernet
    members: Members
    archs: Mapping[str, Architecture]
    given: Architecture | None
    plan: BasisPlan = field(default_factory=BasisPlan)
    basis: Basis | None = None
    budgets: tuple[float, ...] = ()

    @property
    def arch(self) -> Architecture | None:
        """The one that is trained, of a front the widest; None where there is none."""
        return list(self.archs.values())[-1] if self.archs else None

    @property
    def subnet(self) -> NetworkSlice:
        """Its slice."""
        return self.members.widest

    def with_archs(self, **fields: Any) -> "Goal":
        """The same with these fields in each architecture."""
        return replace(self, archs={name: replace(arch, **fields) for name, arch in self.archs.items()})


@dataclass(frozen=True)
class Origin:
    """Where the weights come from: words for it, and for those that may have seen the held-out images."""

    start: Start
    words: str
    seen_by: str | None


def run_retrain(config: RetrainConfig, on_epoch: OnEpoch | None = None) -> Path:
    """Run stage 2 to its end and return the run's folder. Under torchrun, every process calls it.

    on_epoch: as in `fit`.
    """
    asked = config.train
    config, space, given = resolve(config)
    device = pick_device(config)
    with joined(device), quiet_unless_main():
        return _retrain(config, space, given, device, on_epoch, asked)


def _retrain(
    config: RetrainConfig,
    space: Space,
    given: Architecture | None,
    device: torch.device,
    on_epoch: OnEpoch | None,
    asked: str | None,
) -> Path:
    splits = open_data(config)
    outputs = outputs_of(config, space, given, splits)
    config, lines = learning(config, asked, outputs)
    goal = goal_of(config, space, given, splits, outputs.classes)
    origin = origin_of(goal, outputs.classes)
    beginning = Beginning("retrain", space, goal.model, splits, outputs.classes, origin.start, device, goal.plan)
    lines = (*recipe_lines(config, space, "retrain"), *outputs.lines(), *lines)
    config, prepared = prepare(config, beginning, lines, seen_by=origin.seen_by)
    goal = replace(goal, config=config)
    teacher = teacher_of(goal, prepared)
    goal = rewritten(goal, origin, prepared)
    begin(goal, prepared)
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


def resolve(config: RetrainConfig) -> tuple[RetrainConfig, Space, Architecture | None]:
    """Fill in defaults, the space's own or those of the search that wrote --arch; check what needs no data."""
    if (config.arch is None) == (config.space is None):
        raise UserError("give --arch, the arch.json of a search, or --space <backbone>-an with --alpha")
    given = None
    if config.arch is not None:
        if config.alpha is not None:
            raise UserError("--alpha goes with --space; the architecture of --arch has its own factors")
        if config.model is not None:
            raise UserError("--model goes with --space; the architecture of --arch names its own model")
        given = next(iter(architectures(config.arch).values()))
        space = get_space(given.space)
        if config.pretrained is None and isinstance(given.search.get("pretrained"), bool):
            config = replace(config, pretrained=given.search["pretrained"])  # the permutation belongs to these weights
        config = based(config, given)
    else:
        assert config.space is not None
        space = get_space(config.space)
    config = with_recipe(config, space, "retrain")
    alpha, lr, config = config.alpha, config.lr, with_defaults(config, space, "retrain", started(given))
    kind = kind_of(config.trained())
    if kind.small and ((training_of(space).refits and kind.teacher) or config.brings_weights() or started(given)):
        config = replace(config, lr=lr)  # none given: it follows the start
    if not kind.small and alpha is not None:
        raise UserError(f"--alpha: --train {config.train} trains the large network alone; leave it out")
    if given is None and kind.small:
        check_unsearched(config, space)
    config = replace(config, dataset=config.dataset_name())
    config.check()
    check_objective(config, kind)
    if config.per_step is not None and not (config.arch is not None and is_front(config.arch)):
        raise UserError(f"--per-step {config.per_step} is of the networks of a front; --arch names none")
    if kind.teacher and config.distill == "none":
        raise UserError(f"--train {config.train} learns from a teacher; --distill none takes it away")
    check_owned(config, space, shared=(TeacherOptions,))
    return config, space, given


def outputs_of(config: RetrainConfig, space: Space, given: Architecture | None, splits: Splits) -> Outputs:
    """What the networks give: as --num-classes says, or as they gave when they were searched, or as the labels say."""
    labelled, asked = splits.num_classes, config.num_classes
    if given is None:
        return outputs_anew(asked, labelled, model_of(config, space), original(config, given), as_it_is=False)
    if asked is None and (given.num_classes == 0 or not labelled):
        return Outputs(given.num_classes, labelled > 0, "" if given.num_classes else FEATURES)
    return outputs_anew(asked, labelled, TimmModel(given.model, given.model_kwargs), Start(), as_it_is=False)


def learning(config: RetrainConfig, asked: str | None, outputs: Outputs) -> tuple[RetrainConfig, tuple[str, ...]]:
    """The options with a way to train that what there is allows, and what is to be said of it. asked: --train.

    UserError where another was asked for.
    """
    kind, lacks = kind_of(config.trained()), outputs.lacks()
    if config.distill_blocks and kind.labels and not config.distill_features and not (asked is None and lacks):
        raise UserError("--distill-blocks names blocks whose tokens nothing weighs; give --distill-features")
    unread = kind.teacher and outputs.classes > 0 and config.teacher_share() == 1 and config.distill != "hard"
    if not lacks or not kind.labels or unread:
        return config, ()
    if asked is not None or not kind.small:
        raise UserError(f"--train {config.train} learns from labels; {lacks}: take --train {UNLABELLED}")
    config = replace(config, train=UNLABELLED)
    check_objective(config, kind_of(UNLABELLED))
    return config, (f"--train {UNLABELLED}, which reads no labels: {lacks}",)


def check_objective(config: RetrainConfig, kind: Kind) -> None:
    """Refuse options of another way to train than --train's."""
    tokens = config.tokens_flag()
    if tokens is not None and not kind.tokens:
        ways = alternatives([each.name for each in KINDS.values() if each.tokens])
        raise UserError(f"{tokens} goes with --train {ways}, not with --train {config.train}")
    if config.named() and kind.tokens and (config.distill_features or not kind.labels):
        raise UserError(
            f"{config.named()[0]}: tokens are matched in the channels of the original network, no other has them;"
            " leave it out"
        )
    if kind.teacher and not kind.labels and (config.distill == "hard" or config.over_classes()):
        raise UserError(f"--train {config.train} follows the teacher's whole output; leave --distill hard and mean out")
    frozen = config.adjoined_teacher == "frozen"
    given = config.adjoined_flag()
    if given is not None and kind.name != "adjoined":
        raise UserError(f"{given} goes with --train adjoined, not with --train {config.train}")
    if given is not None and config.alone():
        raise UserError(f"{given}: --no-adjoined trains the small network alone; drop one of them")
    if config.named() and not kind.teacher and not frozen:
        raise UserError(
            f"{config.named()[0]} goes with --train distill or --adjoined-teacher frozen, not with --train"
            f" {config.train}"
        )


def started(given: Architecture | None) -> bool:
    """Whether an architecture's search began at a network of the user's."""
    return given is not None and bool(given.search.get("checkpoint"))


def based(config: RetrainConfig, given: Architecture) -> RetrainConfig:
    """The options with those of the search that hold for a basis still to be found. Refuses any where there is one."""
    here = [name for name in ("basis", "importance") if getattr(config, name) is not None]
    if unfounded(given):
        asked = {name: given.search.get(name) for name in ("basis", "importance") if name not in here}
        return replace(config, **asked)  # type: ignore[arg-type]
    if here and not config.resume:  # else it may be the space's own default, as the run has recorded it
        raise UserError(f"--{here[0]} goes with --space; the architecture of --arch stands as its search left it")
    return config


def check_unsearched(config: RetrainConfig, space: Space) -> None:
    """Refuse a space that is to be searched first, or that lacks its factor."""
    if not space.method.uniform:
        raise UserError(f"{space.name} is to be searched first: python search.py --space {space.name}")
    if config.alpha is None:
        raise UserError(f"{space.name} needs --alpha, the compression factor of every block")


def goal_of(config: RetrainConfig, space: Space, given: Architecture | None, splits: Splits, classes: int) -> Goal:
    """The architecture that is trained: --arch's, with so many classes, or the one factor of --alpha."""
    model = model_of(config, space) if given is None else large_model(given, folder_of(config))
    if model.cut is not None:
        check_round(config, given)
    backbone = meta_supernet(model, classes, space)
    if not kind_of(config.trained()).small:
        return Goal(config, space, model, backbone, Members.of(backbone.identity()), {}, given)
    if given is None:
        assert config.alpha is not None
        settings = Settings(config.width, space.alphas)
        check_uniform_alpha(make_space(space.name, space.method, settings, backbone.shapes), config.alpha)
        picks = [{"alpha": config.alpha}] * len(backbone.shapes)
        archs = {ONE: architecture_of(backbone, space.name, model.name, model.kwargs, picks, config.width)}
    else:
        assert config.arch is not None
        archs = architectures(config.arch)
    subnets = {name: slices_of(arch, backbone.shapes) for name, arch in archs.items()}
    members, plan, basis = Members(subnets, config.per_step or PER_STEP), BasisPlan(), None
    if given is None or unfounded(given):
        subnet = members.widest
        narrowed = {shape.stage for shape in backbone.shapes} - whole_stages(backbone.shapes, subnet)
        plan = planned(config, space, backbone, Cuts(narrowed), splits, original(config, given))
    elif config.arch is not None:
        basis = basis_of(given, folder_of(config))
        plan = looked_at(space, splits)
    install_stages(backbone, plan.streams or streams_of(next(iter(archs.values())).basis))
    if model.cut is not None:  # the architecture is one of timm's model, whatever it was cut from
        archs = {name: with_classes(arch, classes) for name, arch in archs.items()}
    else:
        archs = {
            name: replace(
                arch,
                num_classes=classes,
                flops=backbone.flops(subnets[name]),
                params=backbone.params(subnets[name]),
                backbone_flops=backbone.flops(),
                backbone_params=backbone.params(),
            )
            for name, arch in archs.items()
        }
    budgets = tuple(map(float, archs)) if ONE not in archs else ()
    return Goal(config, space, model, backbone, members, archs, given, plan, basis, budgets)


def architectures(path: Path) -> dict[str, Architecture]:
    """Of --arch, by the names of their networks: one, or those of a front, the narrowest first."""
    if is_front(path):
        return {f"{budget:g}": arch for budget, arch in read_front(path).items()}
    return {ONE: load_architecture(path)}


def folder_of(config: RetrainConfig) -> Path:
    """The folder of --arch."""
    assert config.arch is not None
    return config.arch if config.arch.is_dir() else config.arch.parent


def check_round(config: RetrainConfig, given: Architecture | None) -> None:
    """Refuse a further round whose first weights are not what they were, or a training of its large network alone."""
    assert given is not None
    if not kind_of(config.trained()).small:
        raise UserError(
            f"--train {config.train} trains the large network alone, which here is the compact network of"
            f" {given.search[ROUND]['run']}: train that on by --arch {given.search[ROUND]['run']}"
        )
    if config.checkpoint is None:
        check_unchanged(given)


def unfounded(arch: Architecture) -> bool:
    """Whether an architecture was picked without weights (a uniform one, by its price), so that its basis is open."""
    return not arch.basis and not arch.permutation and arch.search.get("searcher") == "uniform"


def origin_of(goal: Goal, num_classes: int) -> Origin:
    """Where the weights start: --init base or supernet (section 2.8), by default the latter where it fits."""
    config, searched = goal.config, None
    if config.arch is not None:
        searched = folder_of(config) / SUPERNET
    fits = goal.given is not None and goal.given.num_classes == num_classes and config.checkpoint is None
    available = searched is not None and searched.is_file()
    if (config.init or ("supernet" if fits and available else "base")) == "base":
        start = original(config, goal.given)
        return Origin(start, ORIGINAL if start.given() else DRAWN, start.name())
    if searched is None or not available:
        where = searched or "a search's folder"
        raise UserError(f"--init supernet: {where} is not there; use --init base")
    start, search = Start(checkpoint=searched, seed=config.seed), goal.given.search if goal.given is not None else {}
    # A search from scratch never saw what is held out: its rule has no seed, so both stages hold out the same images.
    same = search.get("val_fraction") == config.val_fraction
    before = trained_before(search.get("pretrained"), search.get("checkpoint"))
    return Origin(start, SEARCHED, before if same else start.name())


def original(config: RetrainConfig, given: Architecture | None) -> Start:
    """The weights that the search started from, or those asked for."""
    checkpoint = given.search.get("checkpoint") if given is not None else None
    if checkpoint and config.checkpoint is None:
        return Start(checkpoint=Path(str(checkpoint)), seed=config.seed)
    return start_of(config, config.seed)


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


def begin(goal: Goal, prepared: Prepared) -> None:
    """Refit the subnet in the supernet's weights, where it alone is trained on from there (section 2.11).

    The networks of a front share their weights: what one's refit writes is not for another.
    """
    kind = kind_of(goal.config.trained())
    resumed = goal.config.resume and on_main((prepared.folder / CHECKPOINT).is_file)
    if len(goal.archs) == 1 and kind.teacher and training_of(goal.space).refits and not resumed:
        write(prepared.supernet, goal.subnet, refitted(goal.config, prepared, goal.subnet))


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
