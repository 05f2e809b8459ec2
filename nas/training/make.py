"""An objective and everything it trains with, from the options: the same for both stages."""

import torch

from nas.config import Common
from nas.data.loaders import Loaders
from nas.machine.devices import amp_dtype
from nas.objectives.adjoined import Adjoined
from nas.training.evaluate import top_k
from nas.training.loop import Training
from nas.training.optim import (
    make_clip,
    make_ema,
    make_optimizer,
    make_scheduler,
    prepare,
    total_epochs,
    updates_per_epoch,
)


def make_training(
    config: Common, objective: Adjoined, loaders: Loaders, device: torch.device, arch_lr: float | None = None
) -> Training:
    """What `fit` runs. arch_lr: rate of the objective's architecture parameters; None where it has none."""
    assert config.output is not None
    objective, backbone = objective.to(device), objective.supernet.backbone
    prepare(config, objective.supernet)
    optimizer = make_optimizer(config, backbone)
    arch_optimizer = None if arch_lr is None else objective.architecture_optimizer(arch_lr)

    def evaluate() -> dict[str, float]:
        if loaders.val is None:
            return {}
        networks = {name: network for name, network in objective.networks().items() if name != "teacher"}
        scores = top_k(networks, loaders.val, device, training.autocast)
        return {f"held_out_{name}": score for name, score in scores.items()}

    training = Training(
        objective=objective,
        optimizer=optimizer,
        scheduler=make_scheduler(config, optimizer, updates_per_epoch(config, loaders.train)),
        train_loader=loaders.train,
        epochs=total_epochs(config),
        folder=config.output,
        seed=config.seed,
        device=device,
        evaluate=evaluate,
        held_out=loaders.held_out,
        arch_optimizer=arch_optimizer,
        arch_loader=loaders.arch,
        mixup=loaders.mixup,
        clip=make_clip(config, backbone),
        accum_steps=config.grad_accum_steps,
        amp_dtype=amp_dtype(config, device),
        channels_last=config.channels_last,
        ema=make_ema(config, backbone),
        keep=config.keep,
        tensorboard=config.tensorboard,
    )
    return training
