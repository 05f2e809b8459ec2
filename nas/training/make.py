"""An objective and everything it trains with, from the options: the same for both stages."""

import torch

from nas.machine.devices import amp_dtype
from nas.machine.every import every
from nas.training.objective import Objective
from nas.training.optim import lay_out, make_clip, make_ema, make_optimizer, make_scheduler, updates_per_epoch
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from nas.training.scores import scores_of
from nas.training.training import Training


def make_training(
    options: LoopOptions, objective: Objective, prepared: Prepared, arch_lr: float | None = None
) -> Training:
    """What `fit` runs. arch_lr: rate of the objective's architecture parameters; None where it has none."""
    loaders, device = prepared.loaders, prepared.device
    objective, backbone = objective.to(device), objective.supernet.backbone
    lay_out(options, objective.supernet)
    optimizer = make_optimizer(options, backbone)
    arch_optimizer = None if arch_lr is None else objective.architecture_optimizer(arch_lr)
    precision = amp_dtype(options, device)

    def evaluate() -> dict[str, float]:
        if loaders.val is None:
            return {}
        networks = dict(objective.networks())
        measured = scores_of(prepared, options.seed, training.autocast, networks.pop("teacher", None))
        with training.autocast():
            own = objective.held_out(loaders.val)
        scores = dict(own) | measured(networks, loaders.val)
        return {f"held_out_{name}": score for name, score in scores.items()}

    training = Training(
        objective=objective,
        optimizer=optimizer,
        scheduler=make_scheduler(options, optimizer, updates_per_epoch(options, loaders.train)),
        train_loader=loaders.train,
        epochs=options.total_epochs(),
        folder=prepared.folder,
        seed=options.seed,
        device=device,
        evaluate=evaluate,
        held_out=loaders.held_out,
        grad_scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        checkpoint_every=every(options.checkpoint_every, "--checkpoint-every"),
        log_every=every(options.log_every, "--log-every"),
        arch_optimizer=arch_optimizer,
        arch_loader=loaders.arch,
        mixup=loaders.mixup,
        clip=make_clip(options, backbone),
        accum_steps=options.grad_accum_steps,
        amp_dtype=precision,
        channels_last=options.channels_last,
        ema=make_ema(options, backbone),
        keep=options.keep,
        tensorboard=options.tensorboard,
        may_skip=options.may_skip(),
    )
    return training
