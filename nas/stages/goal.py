"""What a retrain is to train: its options with their defaults, the architectures, where the weights come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nas.config import RetrainConfig, with_defaults
from nas.data.datasets import Splits
from nas.data.split_names import trained_before
from nas.methods.recipe import with_recipe
from nas.methods.table import alternatives, check_owned, training_of
from nas.networks.architecture import architecture_of, slices_of
from nas.networks.backbone import Start, TimmModel
from nas.networks.basis_file import basis_of, streams_of
from nas.networks.classes import FEATURES, Outputs
from nas.networks.classes import outputs_of as outputs_anew
from nas.networks.compact_file import with_classes
from nas.networks.opening import meta_supernet, model_of, settled_space, start_of
from nas.networks.rounds import ROUND, check_unchanged, large_model
from nas.objectives.members import ONE, PER_STEP, Members
from nas.objectives.options import TeacherOptions
from nas.objectives.table import KINDS, UNLABELLED, Kind, kind_of
from nas.runs.folder import SUPERNET
from nas.runs.front import is_front, read_front
from nas.stages.planned import Cuts, check_trained, looked_at, planned
from nas.training.plan import BasisPlan
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import Space, get_space
from search_spaces.slices import NetworkSlice
from search_spaces.space import check_uniform_alpha, make_space
from supernets.basis import Basis, install_stages
from supernets.flops import whole_stages
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

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of a front's networks."""
        return tuple(map(float, self.archs)) if ONE not in self.archs else ()

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


def resolve(config: RetrainConfig) -> tuple[RetrainConfig, Space, dict[str, Architecture] | None]:
    """Fill in defaults, the space's own or those of the search that wrote --arch; check what needs no data.

    The architectures are those of --arch, by the names of their networks; None where it is not given.
    """
    if (config.arch is None) == (config.space is None):
        raise UserError("give --arch, the arch.json of a search, or --space <backbone>-an with --alpha")
    archs = given = None
    if config.arch is not None:
        if config.alpha is not None:
            raise UserError("--alpha goes with --space; the architecture of --arch has its own factors")
        if config.model is not None:
            raise UserError("--model goes with --space; the architecture of --arch names its own model")
        archs = architectures(config.arch)
        given = first_of(archs)
        assert given is not None
        space = get_space(given.space)
        if config.pretrained is None and isinstance(given.search.get("pretrained"), bool):
            config = replace(config, pretrained=given.search["pretrained"])  # the permutation belongs to these weights
        config = based(config, given)
    else:
        assert config.space is not None
        space = get_space(settled_space(config.space, config))
        config = replace(config, space=space.name)
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
    if config.per_step is not None and (archs is None or ONE in archs):
        raise UserError(f"--per-step {config.per_step} is of the networks of a front; --arch names none")
    if kind.teacher and config.distill == "none":
        raise UserError(f"--train {config.train} learns from a teacher; --distill none takes it away")
    check_owned(config, space, shared=(TeacherOptions,))
    return config, space, archs


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


def first_of(archs: Mapping[str, Architecture] | None) -> Architecture | None:
    """What --arch holds, of a front the narrowest; None where it is not given."""
    return None if archs is None else next(iter(archs.values()))


def goal_of(
    config: RetrainConfig, space: Space, archs: Mapping[str, Architecture] | None, splits: Splits, classes: int
) -> Goal:
    """The architectures that are trained: --arch's, with so many classes, or the one factor of --alpha."""
    given = first_of(archs)
    model = model_of(config, space) if given is None else large_model(given, folder_of(config))
    if model.cut is not None:
        check_round(config, given)
    backbone = meta_supernet(model, classes, space)
    if not kind_of(config.trained()).small:
        return Goal(config, space, model, backbone, Members.of(backbone.identity()), {}, given)
    if archs is None:
        assert config.alpha is not None
        settings = Settings(config.width, space.alphas)
        check_uniform_alpha(make_space(space.name, space.method, settings, backbone.shapes), config.alpha)
        picks = [{"alpha": config.alpha}] * len(backbone.shapes)
        archs = {ONE: architecture_of(backbone, space.name, model.name, model.kwargs, picks, config.width)}
    subnets = {name: slices_of(arch, backbone.shapes) for name, arch in archs.items()}
    members, plan, basis = Members(subnets, config.per_step or PER_STEP), BasisPlan(), None
    if given is None or unfounded(given):
        narrowed = {shape.stage for shape in backbone.shapes} - whole_stages(backbone.shapes, members.widest)
        start = original(config, given)
        check_trained(space, start)
        plan = planned(config, space, backbone, Cuts(narrowed), splits, start)
    elif config.arch is not None:
        basis = basis_of(given, folder_of(config))
        plan = looked_at(space, splits)
    install_stages(backbone, plan.streams or (() if given is None else streams_of(given.basis)))
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
    return Goal(config, space, model, backbone, members, archs, given, plan, basis)


def architectures(path: Path) -> dict[str, Architecture]:
    """Of --arch, by the names of their networks: one, or those of a front, the narrowest first."""
    if is_front(path):
        return {str(budget): arch for budget, arch in read_front(path).items()}
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
    picked = arch.search.get("searcher") == "uniform" and not arch.search.get("supernet")
    return picked and not arch.basis and not arch.permutation


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
