"""Stage 2: train an architecture adjoined with its backbone, and cut the compact network out.

Or, for comparison: the large network alone (--train plain), the small one under a frozen teacher (--train distill).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.config import RetrainConfig, with_defaults
from nas.data.loaders import Loaders, data_line, dataset_of, make_loaders, open_data, report_unreadable
from nas.data.split_names import trained_before
from nas.machine.devices import pick_device
from nas.machine.distributed import is_main, joined, quiet_unless_main
from nas.machine.files import write_csv, write_json
from nas.machine.timing import Network, images_per_second
from nas.networks.backbone import Start
from nas.networks.compact_file import describe, save_compact, slices_of
from nas.networks.opening import make_supernet, meta_supernet, model_of, search_space, start_of
from nas.networks.weights import save_weights
from nas.objectives.adjoined import Adjoined
from nas.objectives.distill import Distilled, check_distillation, distill_weight
from nas.objectives.kernel import KernelAdjoined, check_kernel_options, has_kernel_term, kernel_term
from nas.objectives.plain import Plain
from nas.objectives.teacher import Teacher, make_teacher
from nas.runs.folder import open_run, results_path
from nas.setup import check_common
from nas.training.evaluate import print_table, top_k
from nas.training.loop import OnEpoch, Training, fit, settle
from nas.training.make import make_training
from nas.training.order import order_by_importance
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.registry import Space, get_space
from search_spaces.slices import NetworkSlice
from search_spaces.space import check_uniform_alpha
from supernets.compact import cut
from supernets.importance import permute
from supernets.supernet import Supernet

SUPERNET = "the search's supernet"
LARGE = "large.safetensors"
TOLERANCE = 1e-5  # invariant 2: compact against subnet, relative to the largest logit


def resolve(config: RetrainConfig) -> tuple[RetrainConfig, Space, Architecture | None]:
    """Fill in defaults: the space's own, or those of the search that wrote --arch."""
    if (config.arch is None) == (config.space is None):
        raise UserError("give --arch, the arch.json of a search, or --space <backbone>-an with --alpha")
    if config.train == "plain" and config.alpha is not None:
        raise UserError("--alpha: --train plain trains the large network alone; leave it out")
    arch = None
    if config.arch is not None:
        if config.alpha is not None:
            raise UserError("--alpha goes with --space; the architecture of --arch has its own factors")
        arch = load_architecture(config.arch)
        space = get_space(arch.space)
        if config.pretrained is None and isinstance(arch.search.get("pretrained"), bool):
            config = replace(config, pretrained=arch.search["pretrained"])  # the permutation belongs to these weights
    elif config.train == "plain":
        assert config.space is not None
        space = get_space(config.space)
    else:
        assert config.space is not None
        space = get_space(config.space)
        if space.method.name != "an":
            raise UserError(f"{space.name} is to be searched first: python search.py --space {space.name}")
        if config.alpha is None:
            raise UserError(f"{space.name} needs --alpha, the compression factor of every block")
    config = with_defaults(config, space, "retrain")
    if config.model is not None and arch is not None:
        raise UserError("--model goes with --space; the architecture of --arch names its own model")
    config = replace(config, dataset=dataset_of(config))
    check_common(config)
    learns = config.train == "distill"
    check_distillation(config, None if learns else f"--train distill, not with --train {config.train}")
    if learns and config.distill == "none":
        raise UserError("--train distill learns from a teacher; --distill none takes it away")
    if config.result == "best" and config.val_fraction == 0:
        raise UserError("--result best needs a held-out part to choose by; set --val-fraction above 0")
    check_kernel_options(config, space)
    return config, space, arch


def uniform_architecture(
    config: RetrainConfig, space: Space, model: str, model_kwargs: dict[str, Any], num_classes: int
) -> Architecture:
    """AN at --alpha, without a search."""
    meta = meta_supernet(model, model_kwargs, num_classes, space)
    choices = search_space(space, meta, config.width, None)
    assert config.alpha is not None
    check_uniform_alpha(choices, config.alpha)
    picks = [{"alpha": config.alpha}] * len(meta.shapes)
    return describe(meta, space.name, model, model_kwargs, picks, config.width)


def starting_point(config: RetrainConfig, arch: Architecture, num_classes: int) -> tuple[Start, str]:
    """Where the weights start, and how to say it: --init base or supernet (section 2.8)."""
    supernet_file = None
    if config.arch is not None:
        folder = config.arch if config.arch.is_dir() else config.arch.parent
        supernet_file = folder / "supernet.safetensors"
    same_classes = arch.num_classes == num_classes
    available = supernet_file is not None and supernet_file.is_file()
    init = config.init or ("supernet" if same_classes and available and config.checkpoint is None else "base")
    if init == "supernet":
        if supernet_file is None or not available:
            where = supernet_file or "a search's folder"
            raise UserError(f"--init supernet: {where} is not there; use --init base")
        return Start(checkpoint=supernet_file, seed=config.seed), SUPERNET
    start = start_of(config)
    if arch.search.get("checkpoint") and config.checkpoint is None:
        start = Start(checkpoint=Path(str(arch.search["checkpoint"])), seed=config.seed)
    return start, "the original weights" if start.given() else "timm's initialisation"


def seen_by(config: RetrainConfig, arch: Architecture, start: Start, origin: str) -> str | None:
    """The weights that may have been trained on what is held out here, in words.

    A search from scratch never saw it: its rule has no seed, so that both stages hold out the same images.
    """
    if origin != SUPERNET or arch.search.get("val_fraction") != config.val_fraction:
        return start.name()
    return trained_before(arch.search.get("pretrained"), arch.search.get("checkpoint"))


def run_retrain(config: RetrainConfig, on_epoch: OnEpoch | None = None) -> Path:
    """Run stage 2 to its end and return the run's folder. Under torchrun, every process calls it.

    on_epoch: as in `fit`.
    """
    config, space, arch = resolve(config)
    device = pick_device(config)
    with joined(device), quiet_unless_main():
        return _retrain(config, space, arch, device, on_epoch)


def _retrain(
    config: RetrainConfig, space: Space, arch: Architecture | None, device: torch.device, on_epoch: OnEpoch | None
) -> Path:
    splits = open_data(config)
    if arch is None:
        model, model_kwargs = model_of(config, space)
        if config.train == "plain":  # the whole network: every space of a family has the same
            space = get_space(f"{space.family}-an{'-nano' if space.nano else ''}")
        alpha = 1 if config.alpha is None else config.alpha
        arch = uniform_architecture(replace(config, alpha=alpha), space, model, model_kwargs, splits.num_classes)
    meta = meta_supernet(arch.model, dict(arch.model_kwargs), splits.num_classes, space)
    subnet = slices_of(arch, meta.shapes)
    arch = replace(
        arch,
        num_classes=splits.num_classes,
        flops=meta.flops(subnet),
        params=meta.params(subnet),
        backbone_flops=meta.flops(),
        backbone_params=meta.params(),
    )
    start, origin = starting_point(
        config, arch if config.arch is None else load_architecture(config.arch), splits.num_classes
    )
    supernet, lines, fresh = make_supernet(
        (arch.model, dict(arch.model_kwargs)), splits, start, space, config.drop_path, device
    )
    # Only now: weights that cannot be had leave no folder behind.
    config = open_run(config, f"retrain-{space.name}-{config.dataset}")
    folder = config.output
    assert folder is not None
    for line in lines:
        print(line)
    loaders = make_loaders(config, splits, supernet, device, seen_by=seen_by(config, arch, start, origin))
    print(data_line(config, splits, loaders))
    teacher = None
    if config.train == "distill":
        base, _ = starting_point(replace(config, init="base"), arch, splits.num_classes)
        model_arguments = arch.model, dict(arch.model_kwargs)
        stats = loaders.stats()
        teacher = make_teacher(config, supernet, model_arguments, base, start, fresh, splits, stats, device)
        print(f"teacher: {teacher.name}, {teacher.params / 1e6:.3f} M, {teacher.flops / 1e9:.4g} GFLOPs (MACs)")
    training = make_training(config, make_objective(config, space, supernet, subnet, teacher), loaders, device)
    if config.train == "plain":
        pass  # the order would change nothing
    elif config.arch is None:
        orders = order_by_importance(
            config, supernet, loaders.train, device, trained=start.given(), fresh_classifier=fresh
        )
        arch = replace(arch, permutation=orders)
    elif arch.permutation and origin != SUPERNET:  # the search's weights are in that order already
        permute(supernet, arch.permutation)
    words = f"{space.name} on {config.dataset}, from {origin}: large {arch.backbone_params / 1e6:.3f} M,"
    words += f" {arch.backbone_flops / 1e9:.4g} GFLOPs (MACs)"
    if config.train == "plain":
        print(f"{words}, trained alone")
    else:
        if is_main():
            save_architecture(arch, folder / "arch.json")
        print(f"{words}; small {arch.params / 1e6:.3f} M, {arch.flops / 1e9:.4g} GFLOPs")
    fit(training, config.resume, "retrain", on_epoch)
    conclude(config, arch, subnet, training, loaders)
    return folder


def make_objective(
    config: RetrainConfig, space: Space, supernet: Supernet, subnet: NetworkSlice, teacher: Teacher | None
) -> Adjoined:
    """What --train minimises, by the space's method where both networks learn together."""
    smoothing = config.smoothing or 0.0
    if config.train == "plain":
        return Plain(supernet, smoothing)
    if teacher is None and has_kernel_term(space):
        return KernelAdjoined(
            supernet,
            subnet,
            kernel=kernel_term(config),
            adjoined=config.adjoined,
            smoothing=smoothing,
            detach_teacher=config.detach_teacher,
        )
    if teacher is None:
        return Adjoined(supernet, subnet, smoothing, config.detach_teacher)
    return Distilled(
        supernet,
        subnet,
        teacher,
        hard=config.distill == "hard",
        weight=distill_weight(config),
        temperature=config.distill_temperature,
        smoothing=smoothing,
    )


def conclude(
    config: RetrainConfig, arch: Architecture, subnet: NetworkSlice, training: Training, loaders: Loaders
) -> None:
    """Cut the compact network out, check it against the subnet, measure every network on the reported split, draw.

    A network appears in the table only if this run trained it, or learnt from it.
    """
    folder, device, objective = training.folder, training.device, training.objective
    settle(training, config.result == "best")
    supernet = objective.supernet.eval()
    networks: dict[str, Network] = objective.networks()
    facts: dict[str, Any] = {"stage": "retrain", "train": config.train, "space": arch.space, "dataset": config.dataset}
    facts |= {"seed": config.seed, "split": loaders.reported, "result": config.result}
    facts |= {"held_out": None if loaders.val is None else loaders.held_out}
    table: dict[str, dict[str, Any]] = {}
    if "teacher" in networks:
        assert isinstance(objective, Distilled)
        table["teacher"] = {"params": objective.teacher.params, "gflops": objective.teacher.flops / 1e9}
    if "large" in networks:
        table["large"] = {"params": arch.backbone_params, "gflops": arch.backbone_flops / 1e9}
        if is_main():
            save_weights(supernet.backbone.state_dict(), folder / LARGE)
    if "subnet" in networks:
        compact = cut(supernet.backbone, subnet).eval()
        networks["compact"] = compact
        difference = relative_difference(networks["subnet"], compact, next(iter(loaders.test))[0].to(device))
        if difference > TOLERANCE:
            raise AssertionError(f"compact and subnet differ by {difference:.1e} of the largest logit")
        mean, std = loaders.test.stats
        chosen = {"mean": mean, "std": std, "interpolation": config.interpolation, "crop_pct": config.crop_pct}
        if is_main():
            save_compact(compact, folder, arch, chosen)
        facts |= {"budget": arch.search.get("budget"), "compact_minus_subnet": difference}
        table["subnet"] = {"params": arch.params, "gflops": arch.flops / 1e9}
        table["compact"] = {"params": sum(p.numel() for p in compact.parameters()), "gflops": arch.flops / 1e9}
    scores = top_k(networks, loaders.test, device, training.autocast, f"measuring on the {loaders.reported}")
    for name, row in table.items():
        row |= {k: scores[f"{name}_{k}"] for k in ("top1", "top5")}
    facts |= {"unreadable_images": report_unreadable(loaders)}
    if not is_main():
        return
    for batch in (1, 32):
        speeds = images_per_second(networks, supernet.adapter.input_size, batch, device, training.autocast)
        for name, speed in speeds.items():
            table[name][f"images_per_s_{batch}"] = speed
    facts |= {"precision": str(training.amp_dtype or torch.float32), "threads": torch.get_num_threads()}
    write_json(folder / "summary.json", facts | table)
    write_csv(folder / "table.csv", [{"network": name} | row for name, row in table.items()])
    print_table(table, f"{arch.space} on {config.dataset}, {loaders.reported}")
    from nas.pictures.run import plot_run

    plot_run(folder)
    files = [name for name in ("compact.safetensors", LARGE, "arch.json") if (folder / name).is_file()]
    print(f"results in {results_path(folder)}: {', '.join(files)}, table.csv and pictures")


@torch.no_grad()
def relative_difference(first: Any, second: Any, images: Tensor) -> float:
    """max |a - b| / max |a| over the logits, in float32."""
    a, b = first(images), second(images)
    return float((a - b).abs().max() / a.abs().max())
