"""timm's optimiser, schedule and weight average, from the options that timm's train.py has for them."""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nas.networks.backbone import classifier_names
from nas.training.options import TrainingOptions
from search_spaces.errors import UserError, reason
from search_spaces.slices import NetworkSlice
from supernets.supernet import Gates, Small, Supernet


def updates_per_epoch(options: TrainingOptions, loader: Any) -> int:
    """Optimiser steps of an epoch: one per --grad-accum-steps batches, one for what is left over."""
    return -(-len(loader) // options.grad_accum_steps)


def make_optimizer(options: TrainingOptions, backbone: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser on the backbone, its no_weight_decay names and layer groups respected.

    In one kernel for all weights where torch has one: a fifth to a quarter of the time on a CPU.
    """
    from timm.optim import create_optimizer_v2

    name = options.opt or "adamw"
    own = {"eps": options.opt_eps, "betas": options.opt_betas, "layer_decay": options.layer_decay}
    own["fused"] = True if "fused" in parameters_of(name) else None
    check_betas(options, name)
    try:
        return create_optimizer_v2(  # type: ignore[no-any-return]
            backbone,
            opt=name,
            lr=options.lr,
            weight_decay=options.weight_decay or 0.0,
            momentum=options.momentum,
            **{name: value for name, value in own.items() if value is not None},
        )
    except (AssertionError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"--opt {name}: timm cannot make this optimiser ({reason(error)})") from None


def parameters_of(optimizer: str) -> Mapping[str, inspect.Parameter]:
    """The constructor's arguments of timm's optimiser of a name; none where it has no such, which is another's to say.

    "fused" is among those of torch's own, of which one kernel updates all weights.
    """
    from timm.optim import get_optimizer_class

    try:
        return inspect.signature(get_optimizer_class(optimizer, bind_defaults=False)).parameters
    except ValueError:
        return {}


def check_betas(options: TrainingOptions, optimizer: str) -> None:
    """UserError for --opt-betas that an optimiser would leave unused, or fail on at its first step."""
    betas, parameters = options.opt_betas, parameters_of(optimizer)
    if betas is None or not parameters:
        return
    given = f"--opt {optimizer} --opt-betas {' '.join(map(str, betas))}"
    if "betas" not in parameters:
        raise UserError(f"{given}: this optimiser has no betas; leave them out")
    default = parameters["betas"].default
    wrong = isinstance(default, tuple) and len(default) != len(betas)
    if wrong or not all(0 <= beta < 1 for beta in betas):
        number = f"{len(default)} numbers" if isinstance(default, tuple) else "numbers"
        raise UserError(f"{given}; expected {number} from 0 to below 1")


def make_scheduler(options: TrainingOptions, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """timm's schedule, stepped at every update; None for a constant rate.

    A constant rate with a warm-up or layer decay is timm's step schedule at factor 1, which applies both.
    """
    from timm.scheduler import create_scheduler_v2

    constant = options.sched in (None, "none")
    if constant and not options.warmup_epochs and options.layer_decay is None:
        return None
    assert options.epochs is not None
    decay = {} if options.decay_epochs is None else {"decay_epochs": options.decay_epochs}
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="step" if constant else options.sched,
            num_epochs=options.epochs,
            min_lr=options.min_lr or 0.0,
            warmup_lr=1e-6 if options.warmup_lr is None else options.warmup_lr,
            warmup_epochs=min(options.warmup_epochs or 0, max(options.epochs - 1, 0)),
            cooldown_epochs=options.cooldown_epochs,
            decay_rate=1.0 if constant else options.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **decay,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--sched {options.sched}: timm cannot make this schedule ({error})") from None
    if scheduler is None:
        raise UserError(f"--sched {options.sched}; expected cosine, step, multistep, poly, tanh or none")
    return scheduler


def make_ema(options: TrainingOptions, backbone: nn.Module) -> Any:
    """timm's average of the weights, when asked for."""
    if not options.model_ema:
        return None
    decay = 0.9998 if options.model_ema_decay is None else options.model_ema_decay
    if not 0 < decay < 1:
        raise UserError(f"--model-ema-decay {decay}; expected between 0 and 1")
    from timm.utils import ModelEmaV3

    return ModelEmaV3(backbone, decay=decay, use_warmup=options.model_ema_warmup is not False)


def make_clip(options: TrainingOptions, backbone: nn.Module) -> Callable[[], None] | None:
    """timm's gradient clipping of the weights; adaptive clipping leaves the classifier out, as in timm."""
    if options.clip_grad is None:
        return None
    from timm.utils import dispatch_clip_grad

    value, mode = options.clip_grad, options.clip_mode
    left_out = tuple(f"{name}." for name in classifier_names(backbone)) if mode == "agc" else ()
    weights = [p for name, p in backbone.named_parameters() if not (left_out and name.startswith(left_out))]
    return lambda: dispatch_clip_grad([p for p in weights if p.grad is not None], value, mode=mode)


def lay_out(options: TrainingOptions, supernet: Supernet) -> None:
    """--channels-last and --compile, before the optimiser is made."""
    if options.channels_last:
        supernet.backbone.to(memory_format=torch.channels_last)
    if options.compile:
        compile_forwards(supernet)


def compile_forwards(supernet: Supernet) -> None:
    """Let training run torch.compile's versions of the large and of the small forward; evaluation stays eager.

    A search evaluates another subnet every epoch, and each would be compiled anew. The forwards are compiled and
    not the objective, whose schedules change with every step.
    """
    large, small, streams = supernet.large, supernet.small_with_features, supernet.small_with_streams
    fast_large, fast_small, fast_streams = torch.compile(large), torch.compile(small), torch.compile(streams)

    def run_large(images: Tensor) -> Tensor:
        with compile_errors(), supernet.adapter.one_draw(images):
            return (fast_large if supernet.training else large)(images)

    def run_small(images: Tensor, kept: Small, gates: Gates = None) -> tuple[Tensor, Tensor]:
        with compile_errors(), supernet.adapter.one_draw(images):
            return (fast_small if supernet.training else small)(images, kept, gates)

    def run_streams(images: Tensor, kept: NetworkSlice, after: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        with compile_errors(), supernet.adapter.one_draw(images):
            return (fast_streams if supernet.training else streams)(images, kept, after)

    supernet.large, supernet.small_with_features = run_large, run_small  # type: ignore[method-assign, assignment]
    supernet.small_with_streams = run_streams  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def compile_errors() -> Any:
    """UserError when torch cannot compile, for instance where there is no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile: torch cannot compile this network here ({reason}); leave --compile off") from None
