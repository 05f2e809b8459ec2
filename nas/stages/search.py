"""Stage 1: search a supernet for an architecture, and write arch.json."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nas.config import SearchConfig, parse_key_values, with_defaults
from nas.data.loaders import Loaders, data_line, dataset_of, make_loaders, open_data, report_unreadable
from nas.machine.devices import pick_device
from nas.machine.distributed import is_main, joined, quiet_unless_main
from nas.machine.files import write_json
from nas.methods.uvc import check_reach, check_uvc_options, make_loss
from nas.networks.backbone import Start
from nas.networks.opening import make_supernet, meta_supernet, model_of, search_space, start_of
from nas.networks.weights import save_weights
from nas.objectives.distill import check_distillation
from nas.objectives.kernel import check_kernel_options, has_kernel_term, kernel_term
from nas.objectives.teacher import Teacher, make_teacher
from nas.prices.costs import SpaceCosts, space_costs
from nas.prices.selection import check_budget
from nas.runs.folder import open_run, results_path
from nas.searchers.channels import FLOPS_WEIGHT, Bernoulli, TopK, check_selection_options
from nas.searchers.decide import decide
from nas.searchers.gradient import Differentiable
from nas.searchers.minimax import UVC
from nas.searchers.supernet_search import Search
from nas.setup import check_common
from nas.training.evaluate import by_split, print_table, top_k
from nas.training.loop import OnEpoch, Training, fit, settle
from nas.training.make import make_training
from nas.training.optim import total_epochs, updates_per_epoch
from nas.training.order import order_by_importance
from search_spaces.architecture import Architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.method import FRACTIONS, Picks
from search_spaces.registry import Space, get_space
from search_spaces.slices import NetworkSlice, network_slice
from search_spaces.space import SearchSpace, check_uniform_alpha, label, require_search, uniform_alphas
from supernets.supernet import Supernet

GAMMA = 1e-12  # equation (3.7), on raw MACs


def resolve(config: SearchConfig) -> tuple[SearchConfig, Space]:
    """Fill in the space's defaults and check every option that needs no data."""
    space = get_space(config.space)
    if config.gflops is not None:
        if config.budget:
            raise UserError("--budget and --gflops name the same thing; give one of them")
        config = replace(config, budget=0.0)
    config = with_defaults(config, space, "search")
    config = replace(config, dataset=dataset_of(config))
    if config.gamma is not None and config.gamma < 0:
        raise UserError(f"--gamma {config.gamma}; expected 0 or more")
    check_common(config)
    if config.budget is not None and not 0 <= config.budget <= 1:
        raise UserError(f"--budget {config.budget}; expected a fraction of the backbone's FLOPs, 0 < B <= 1")
    if config.arch_data == "val" and config.val_fraction == 0:
        raise UserError("--arch-data val needs a held-out part; set --val-fraction above 0")
    if config.alpha is not None and space.method.name != "an":
        raise UserError(f"--alpha is AN's one factor; {space.name} searches, offer it candidates with --alphas")
    check_kernel_options(config, space)
    check_selection_options(config, space)
    check_uvc_options(config, space)
    uvc = space.method.name == "uvc"
    check_distillation(config, None if uvc else f"method uvc in a search; the space is {space.name}")
    if config.distill is not None and not uvc:
        raise UserError(f"--distill goes with method uvc in a search; the space is {space.name}")
    parse_key_values(config.model_kwargs)
    return config, space


def budget_fraction(config: SearchConfig, full_flops: int) -> float | None:
    """The budget as a fraction of the backbone's FLOPs; None when there is none."""
    if config.gflops is not None:
        if config.gflops <= 0:
            raise UserError(f"--gflops {config.gflops}; expected more than 0")
        return min(config.gflops * 1e9 / full_flops, 1.0)
    return config.budget or None


def run_search(config: SearchConfig, on_epoch: OnEpoch | None = None) -> Path:
    """Run stage 1 to its end and return the run's folder. Under torchrun, every process calls it.

    on_epoch: as in `fit`.
    """
    config, space = resolve(config)
    device = pick_device(config)
    with joined(device), quiet_unless_main():
        return _search(config, space, device, on_epoch)


def _search(config: SearchConfig, space: Space, device: torch.device, on_epoch: OnEpoch | None) -> Path:
    model, model_kwargs = model_of(config, space)
    splits = open_data(config)
    meta = meta_supernet(model, model_kwargs, splits.num_classes, space)
    choices = search_space(space, meta, config.width, config.alphas, fractions_of(config))
    costs = space_costs(choices, meta.adapter.costs, meta.flops(), config.stage_width == "full")
    budget = budget_fraction(config, meta.flops())
    if space.method.name != "an":
        require_search(choices)
        if budget is not None:
            check_budget(costs.uniform(), costs.full_flops, budget)
            if space.method.name == "uvc":
                check_reach(costs, budget, config.skip, config.prune)
    elif config.alpha is None and budget is None:
        raise UserError(f"{space.name} needs --alpha or --budget; allowed alpha: {_list(uniform_alphas(choices))}")
    alpha = None if space.method.name != "an" else pick_alpha(costs, config.alpha, budget)
    if alpha is not None:
        config, folder = open_run_of(config, choices)
        picks: list[Picks] = [{"alpha": alpha}] * len(choices.shapes)
        kept: list[dict[str, list[int]]] = [{}] * len(picks)
        write_architecture(folder, config, space, choices, meta, picks, kept, budget, model, model_kwargs, {})
        print(f"alpha {alpha} in every block; AN needs no search\nnext: {next_command(config, folder)}")
        return folder
    start = start_of(config)
    supernet, lines, fresh = make_supernet((model, model_kwargs), splits, start, space, config.drop_path, device)
    config, folder = open_run_of(config, choices)  # only now: weights that cannot be had leave no folder behind
    for line in lines:
        print(line)
    loaders = make_loaders(config, splits, supernet, device, config.arch_data, start.name())
    print(data_line(config, splits, loaders))
    total = total_epochs(config) * updates_per_epoch(config, loaders.train)
    teacher = None
    if space.method.name == "uvc":
        config = replace(config, distill=distillation(config, start, fresh))
        if config.distill != "none":
            stats = loaders.stats()
            whole = (model, model_kwargs)
            asked = f"--distill {config.distill}"
            teacher = make_teacher(config, supernet, whole, start, start, fresh, splits, stats, device, asked)
            print(f"teacher: {teacher.name}, {teacher.params / 1e6:.3f} M, {teacher.flops / 1e9:.4g} GFLOPs (MACs)")
    objective = objective_of(config, space, supernet, costs, budget, total, teacher)
    training = make_training(config, objective, loaders, device, config.arch_lr or 1e-3)
    orders = order_by_importance(config, supernet, loaders.train, device, trained=start.given(), fresh_classifier=fresh)
    print(
        f"{space.name} on {config.dataset}: {choices.size():.3g} architectures, backbone {model}"
        f" {meta.params() / 1e6:.2f} M parameters, {meta.flops() / 1e9:.4g} GFLOPs (MACs)"
        + (f", budget {budget:.4g}" if budget is not None else f", gamma {objective.gamma:g}" * config.adjoined)
    )
    fit(training, config.resume, "search", on_epoch)
    conclude(config, space, choices, objective, training, loaders, budget, model, model_kwargs, orders)
    return folder


def open_run_of(config: SearchConfig, choices: SearchSpace) -> tuple[SearchConfig, Path]:
    """The run's folder, and the first lines of its output: what was offered and is left out."""
    config = open_run(config, f"search-{choices.name}-{config.dataset}")
    assert config.output is not None
    for line in choices.dropped:
        print(f"{choices.name}: {line}")
    return config, config.output


def fractions_of(config: SearchConfig) -> tuple[float, ...] | None:
    """The channel fractions to choose from; None where every channel is drawn by itself."""
    return None if config.selection == "bernoulli" else config.fractions or FRACTIONS


def distillation(config: SearchConfig, start: Start, fresh_classifier: bool) -> Literal["soft", "hard", "none"]:
    """--distill, by default soft where there is a teacher: one that was named, or a trained original network."""
    named = config.teacher is not None or config.teacher_checkpoint is not None
    if config.distill is not None:
        return config.distill
    if named or (start.given() and not fresh_classifier):
        return "soft"
    print("no teacher: the original network was not trained for these classes; --teacher-checkpoint gives another")
    return "none"


def objective_of(
    config: SearchConfig,
    space: Space,
    supernet: Supernet,
    costs: SpaceCosts,
    budget: float | None,
    total_steps: int,
    teacher: Teacher | None = None,
) -> Search:
    """What stage 1 minimises, by the space's method."""
    common: dict[str, Any] = {
        "budget": budget,
        "gamma": GAMMA if config.gamma is None else config.gamma,
        "seed": config.seed,
        "total_steps": total_steps,
        "smoothing": config.smoothing or 0.0,
        "detach_teacher": config.detach_teacher,
    }
    if space.method.name == "uvc":
        epochs = total_epochs(config)
        warmup = min(config.warmup_epochs or 0, epochs - 1) * (total_steps // epochs)
        loss = make_loss(config, teacher, config.smoothing or 0.0)
        kinds: dict[str, Any] = {"loss": loss, "skip": config.skip, "prune": config.prune, "warmup_steps": warmup}
        return UVC(supernet, costs, **kinds, **common)
    if not has_kernel_term(space):
        return Differentiable(supernet, costs, **common)
    if not config.adjoined:
        common["flops_weight"] = FLOPS_WEIGHT if config.flops_weight is None else config.flops_weight
    kind = Bernoulli if config.selection == "bernoulli" else TopK
    return kind(supernet, costs, kernel=kernel_term(config), **common)


def pick_alpha(costs: SpaceCosts, alpha: int | None, budget: float | None) -> int:
    """AN: the alpha asked for, or the smallest whose network fits the budget."""
    space = costs.space
    if alpha is not None:
        check_uniform_alpha(space, alpha)
        return alpha
    assert budget is not None
    options = uniform_alphas(space)
    fractions = []
    for a in options:
        picks = [choices.index(a) for choices in ([o.picks["alpha"] for o in row] for row in costs.options)]
        fractions.append(costs.uniform().flops(picks) / costs.full_flops)
        if fractions[-1] <= budget:
            return a
    reach = ", ".join(f"{a}: {f:.4f}" for a, f in zip(options, fractions, strict=True))
    raise UserError(f"--budget {budget:.4g}: no alpha of {space.name} fits; FLOPs fraction by alpha: {reach}")


def write_architecture(
    folder: Path,
    config: SearchConfig,
    space: Space,
    choices: SearchSpace,
    supernet: Supernet,
    picks: list[Picks],
    kept: list[dict[str, list[int]]],
    budget: float | None,
    model: str,
    model_kwargs: dict[str, Any],
    orders: dict[str, list[int]],
    found: dict[str, Any] | None = None,
) -> tuple[Architecture, NetworkSlice]:
    """Write arch.json for the picks, checked against the space's grammar, and return it with its slices.

    found: what else the search says about them.
    """
    sample = {label(i, name): option for i, pick in enumerate(picks) for name, option in pick.items()}
    picks = list(choices.freeze(sample))
    subnet = network_slice(supernet.shapes, choices.block_slices(picks, kept), config.stage_width == "full")
    facts = SEARCH_FACTS + (KERNEL_FACTS if has_kernel_term(space) else ())
    facts += UVC_FACTS if space.method.name == "uvc" else ()
    settings = {k: v for k, v in asdict(config).items() if k in facts and v is not None} | {
        "budget": budget,
        "space_size": float(choices.size()),
    }
    settings |= found or {}
    if config.checkpoint is not None:
        settings["checkpoint"] = str(config.checkpoint)
    arch = Architecture(
        space=space.name,
        method=space.method.name,
        model=model,
        model_kwargs=model_kwargs,
        input_size=supernet.adapter.input_size,
        num_classes=supernet.backbone.num_classes,  # type: ignore[arg-type]
        width=config.width,
        stage_widths=subnet.stage_widths,
        blocks=tuple({**pick, **indices} for pick, indices in zip(picks, kept, strict=True)),
        flops=supernet.flops(subnet),
        params=supernet.params(subnet),
        backbone_flops=supernet.flops(),
        backbone_params=supernet.params(),
        permutation=orders,
        search=settings,
    )
    if is_main():
        save_architecture(arch, folder / "arch.json")
    return arch, subnet


SEARCH_FACTS = (
    "dataset", "val_fraction", "epochs", "batch_size", "lr", "arch_lr", "arch_data", "gamma", "seed", "stage_width",
    "alphas", "pretrained", "amp", "detach_teacher",
)  # fmt: skip
UVC_FACTS = ("prune", "skip", "distill", "distill_weight", "distill_temperature", "teacher", "warmup_epochs")
KERNEL_FACTS = ("fractions", "selection", "adjoined", "eta_kc", "rho", "flops_weight")


def conclude(
    config: SearchConfig,
    space: Space,
    choices: SearchSpace,
    objective: Search,
    training: Training,
    loaders: Loaders,
    budget: float | None,
    model: str,
    model_kwargs: dict[str, Any],
    orders: dict[str, list[int]],
) -> None:
    """Select, write arch.json and the weights, measure, draw.

    Large and subnet are measured on the reported split too, once and last: it decides nothing.
    """
    folder, supernet, device = training.folder, objective.supernet, training.device
    settle(training, best=False)
    supernet.eval()
    picks, selection, measured = decide(objective, training, loaders, config.stage_width == "full")
    kept, found = objective.kept(picks), objective.found()
    arch, subnet = write_architecture(
        folder, config, space, choices, supernet, picks, kept, budget, model, model_kwargs, orders, found
    )
    if "removed" in found:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in found["removed"].items())
        print(f"{arch.flops / arch.backbone_flops:.2%} of the FLOPs kept; removed by {shares}")
    if selection is not None and not selection.in_band:
        print(
            f"no architecture between {budget - 0.02:.4f} and {budget:.4f} of the FLOPs: "  # type: ignore[operator]
            f"{budget - arch.flops / arch.backbone_flops:.4f} of the budget is unused"  # type: ignore[operator]
        )
    if is_main():
        save_weights(supernet.backbone.state_dict(), folder / "supernet.safetensors")
    full = network_slice(supernet.shapes, choices.block_slices(picks, kept), full_stage_width=True)
    networks = {
        "large": supernet.large,
        "full_width": lambda x: supernet.small(x, full),
        "subnet": lambda x: supernet.small(x, subnet),
    }
    held_out = {} if loaders.val is None else top_k(networks, loaders.val, device, training.autocast)
    both = {name: networks[name] for name in ("large", "subnet")}
    scores = top_k(both, loaders.test, device, training.autocast, f"measuring on the {loaders.reported}")
    table: dict[str, dict[str, float]] = {
        "large": {"params": arch.backbone_params, "gflops": arch.backbone_flops / 1e9},
        "subnet": {"params": arch.params, "gflops": arch.flops / 1e9},
    }
    for name, row in table.items():
        for k in ("top1", "top5"):
            row[k] = scores[f"{name}_{k}"]
            if held_out:
                row[f"held_out_{k}"] = held_out[f"{name}_{k}"]
    narrowing = {
        "stage_widths": list(subnet.stage_widths),
        "held_out_top1_full_stage_width": held_out.get("full_width_top1"),
        "held_out_top1_narrowed": held_out.get("subnet_top1"),
    }
    facts: dict[str, Any] = {"stage": "search", "space": space.name, "dataset": config.dataset, "seed": config.seed}
    facts |= {"budget": budget, "split": loaders.reported, "held_out": loaders.held_out if held_out else None}
    facts |= {"precision": str(training.amp_dtype or torch.float32)}
    facts |= {"unreadable_images": report_unreadable(loaders), "finalists": measured}
    if not is_main():
        return
    write_json(folder / "summary.json", facts | found | table | {"narrowing": narrowing})
    print_table(table, f"{space.name} on {config.dataset}", by_split(loaders.reported, loaders.held_out))
    if subnet != full and held_out:
        print(
            f"top-1 of the subnet before narrowing its stages {held_out['full_width_top1']:.2f} %,"
            f" after {held_out['subnet_top1']:.2f} %, on {loaders.held_out}"
        )
    from nas.pictures.run import plot_run

    plot_run(folder)
    print(f"results in {results_path(folder)}\nnext: {next_command(config, folder)}")


def next_command(config: SearchConfig, folder: Path) -> str:
    """What to type for stage 2."""
    data = f" --dataset {config.dataset}" if config.dataset != "digits" else ""
    data += f" --data-dir {config.data_dir}" if config.data_dir else ""
    return f"python retrain.py --arch {results_path(folder)}/arch.json{data}"


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
