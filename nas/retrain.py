"""Stage 2: train an architecture adjoined with its backbone, and cut the compact network out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.backbone import Start
from nas.compact_file import save_compact, slices_of
from nas.config import RetrainConfig, with_defaults
from nas.evaluate import Network, images_per_second, print_table, top_k
from nas.kernel_term import KernelAdjoined, check_kernel_options, has_kernel_term, kernel_term
from nas.loop import Training, fit
from nas.objective import Adjoined
from nas.run import open_run, write_csv, write_json
from nas.setup import (
    amp_dtype,
    check_common,
    dataset_of,
    make_loaders,
    make_optimizer,
    make_scheduler,
    make_supernet,
    meta_supernet,
    model_of,
    open_data,
    order_by_importance,
    pick_device,
    results_path,
    search_space,
    start_of,
)
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.registry import Space, get_space
from search_spaces.slices import NetworkSlice, network_slice
from search_spaces.space import check_uniform_alpha
from supernets.compact import cut
from supernets.importance import permute
from supernets.supernet import Supernet

SUPERNET = "the search's supernet"
TOLERANCE = 1e-5  # invariant 2: compact against subnet, relative to the largest logit


def resolve(config: RetrainConfig) -> tuple[RetrainConfig, Space, Architecture | None]:
    """Fill in defaults: the space's own, or those of the search that wrote --arch."""
    if (config.arch is None) == (config.space is None):
        raise UserError("give --arch, the arch.json of a search, or --space <backbone>-an with --alpha")
    arch = None
    if config.arch is not None:
        if config.alpha is not None:
            raise UserError("--alpha goes with --space; the architecture of --arch has its own factors")
        arch = load_architecture(config.arch)
        space = get_space(arch.space)
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
    subnet = network_slice(meta.shapes, choices.block_slices(picks))
    return Architecture(
        space=space.name,
        method=space.method.name,
        model=model,
        model_kwargs=model_kwargs,
        input_size=meta.adapter.input_size,
        num_classes=num_classes,
        width=config.width,
        stage_widths=subnet.stage_widths,
        blocks=tuple(dict(p) for p in picks),
        flops=meta.flops(subnet),
        params=meta.params(subnet),
        backbone_flops=meta.flops(),
        backbone_params=meta.params(),
    )


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


def run_retrain(config: RetrainConfig) -> Path:
    """Run stage 2 to its end and return the run's folder."""
    config, space, arch = resolve(config)
    device = pick_device(config)
    splits = open_data(config, space)
    if arch is None:
        model, model_kwargs = model_of(config, space)
        arch = uniform_architecture(config, space, model, model_kwargs, splits.num_classes)
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
    config = open_run(config, f"retrain-{space.name}-{config.dataset}")
    folder = config.output
    assert folder is not None
    supernet, lines, fresh = make_supernet(
        (arch.model, dict(arch.model_kwargs)), splits, start, space, config.drop_path, device
    )
    for line in lines:
        print(line)
    training, loaders = make_training(config, space, supernet, subnet, splits, device)
    if config.arch is None:
        orders = order_by_importance(
            config, supernet, loaders.train, device, trained=start.given(), fresh_classifier=fresh
        )
        arch = replace(arch, permutation=orders)
    elif arch.permutation and origin != SUPERNET:  # the search's weights are in that order already
        permute(supernet, arch.permutation)
    save_architecture(arch, folder / "arch.json")
    print(
        f"{space.name} on {config.dataset}, from {origin}: large {arch.backbone_params / 1e6:.3f} M,"
        f" {arch.backbone_flops / 1e9:.4g} GFLOPs (MACs); small {arch.params / 1e6:.3f} M,"
        f" {arch.flops / 1e9:.4g} GFLOPs"
    )
    fit(training, config.resume, "retrain")
    conclude(config, arch, subnet, training, loaders)
    return folder


def objective_of(config: RetrainConfig, space: Space, supernet: Supernet, subnet: NetworkSlice) -> Adjoined:
    """What stage 2 minimises, by the space's method."""
    common: dict[str, Any] = {"smoothing": config.smoothing or 0.0, "detach_teacher": config.detach_teacher}
    if not has_kernel_term(space):
        return Adjoined(supernet, subnet, **common)
    return KernelAdjoined(supernet, subnet, kernel=kernel_term(config), adjoined=config.adjoined, **common)


def make_training(
    config: RetrainConfig,
    space: Space,
    supernet: Supernet,
    subnet: NetworkSlice,
    splits: Any,
    device: torch.device,
) -> tuple[Training, Any]:
    """The adjoined objective and everything it trains with."""
    assert config.epochs is not None and config.output is not None
    loaders = make_loaders(config, splits, supernet, device)
    objective = objective_of(config, space, supernet, subnet).to(device)
    optimizer = make_optimizer(config, supernet.backbone)

    def evaluate() -> dict[str, float]:
        networks = {"large": supernet.large, "subnet": lambda x: supernet.small(x, subnet)}
        return {} if loaders.val is None else top_k(networks, loaders.val, device, training.autocast)

    training = Training(
        objective=objective,
        optimizer=optimizer,
        scheduler=make_scheduler(config, optimizer, len(loaders.train)),
        train_loader=loaders.train,
        epochs=config.epochs,
        folder=config.output,
        seed=config.seed,
        device=device,
        evaluate=evaluate,
        mixup=loaders.mixup,
        clip_grad=config.clip_grad,
        amp_dtype=amp_dtype(config, device),
        ema=make_ema(config, supernet.backbone),
    )
    return training, loaders


def make_ema(config: RetrainConfig, backbone: nn.Module) -> Any:
    """timm's average of the weights, when asked for."""
    if not config.model_ema:
        return None
    decay = 0.9998 if config.model_ema_decay is None else config.model_ema_decay
    if not 0 < decay < 1:
        raise UserError(f"--model-ema-decay {decay}; expected between 0 and 1")
    from timm.utils import ModelEmaV3

    return ModelEmaV3(backbone, decay=decay, use_warmup=True)


def conclude(config: RetrainConfig, arch: Architecture, subnet: NetworkSlice, training: Training, loaders: Any) -> None:
    """Cut the compact network out, check it against the subnet, measure both on the test split, draw."""
    folder, device = training.folder, training.device
    supernet = training.objective.supernet
    if training.ema is not None:
        supernet.backbone.load_state_dict(training.ema.module.state_dict())
    supernet.eval()
    compact = cut(supernet.backbone, subnet).eval()
    networks: dict[str, Network] = {
        "large": supernet.large,
        "subnet": lambda x: supernet.small(x, subnet),
        "compact": compact,
    }
    difference = relative_difference(networks["subnet"], compact, next(iter(loaders.test))[0].to(device))
    if difference > TOLERANCE:
        raise AssertionError(f"compact and subnet differ by {difference:.1e} of the largest logit")
    save_compact(compact, folder, arch.num_classes)
    print("measuring on the test split ...")
    scores = top_k(networks, loaders.test, device, training.autocast)
    table: dict[str, dict[str, Any]] = {
        "large": {"params": arch.backbone_params, "gflops": arch.backbone_flops / 1e9},
        "subnet": {"params": arch.params, "gflops": arch.flops / 1e9},
        "compact": {"params": sum(p.numel() for p in compact.parameters()), "gflops": arch.flops / 1e9},
    }
    for name, row in table.items():
        row |= {k: scores[f"{name}_{k}"] for k in ("top1", "top5")}
    for batch in (1, 32):
        speeds = images_per_second(networks, supernet.adapter.input_size, batch, device, training.autocast)
        for name, speed in speeds.items():
            table[name][f"images_per_s_{batch}"] = speed
    facts: dict[str, Any] = {"stage": "retrain", "space": arch.space, "dataset": config.dataset, "seed": config.seed}
    facts |= {"budget": arch.search.get("budget"), "split": "test", "compact_minus_subnet": difference}
    facts |= {"precision": str(training.amp_dtype or torch.float32), "threads": torch.get_num_threads()}
    write_json(folder / "summary.json", facts | table)
    write_csv(folder / "table.csv", [{"network": name} | row for name, row in table.items()])
    print_table(table, f"{arch.space} on {config.dataset}, test split")
    from nas.plot import plot_run

    plot_run(folder)
    print(f"results in {results_path(folder)}: compact.safetensors, arch.json, table.csv and pictures")


@torch.no_grad()
def relative_difference(first: Any, second: Any, images: Tensor) -> float:
    """max |a - b| / max |a| over the logits, in float32."""
    a, b = first(images), second(images)
    return float((a - b).abs().max() / a.abs().max())
