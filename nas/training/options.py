"""The options of the training loop."""

from dataclasses import dataclass
from typing import Literal

from nas.machine.options import MachineOptions
from nas.machine.ranges import at_least_one, not_negative, positive
from nas.runs.options import RunOptions


@dataclass(frozen=True)
class TrainingOptions:
    """How weights are trained."""

    basis: Literal["rotate", "order", "none"] | None = None
    """rewrite the large network, its function unchanged, so that the first channels, heads and neurons matter most:
    rotate the stream, only order it, or leave it as it is; by default rotate for trained weights, none from scratch"""
    importance: Literal["none", "magnitude", "taylor", "error"] | None = None
    """by what heads and neurons are ordered, and channels that are not rotated: by default taylor for trained
    weights, magnitude when their classifier is fresh; error: by what least squares could not take over"""
    calibration_images: int | None = None
    """training images, prepared as in evaluation, on which a rotation, or an order by error, is found
    (2048; free widths at full size 512)"""
    refit_images: int | None = None
    """training images, prepared as in evaluation, on which free widths are refitted when they are cut
    (4096; in the -nano spaces 2048); 0: not at all"""
    refit_memory: float = 8.0
    """GiB that the streams of a refit may take; it uses as many of --refit-images as fit"""
    epochs: int | None = None
    """passes over the training set"""
    batch_size: int | None = None
    """images per step and process"""
    grad_accum_steps: int = 1
    """batches per optimiser step; t counts optimiser steps"""
    opt: str | None = None
    """optimiser, by timm's name"""
    opt_eps: float | None = None
    """of the optimiser; its own unless given"""
    opt_betas: tuple[float, ...] | None = None
    """of the optimiser; its own unless given"""
    lr: float | None = None
    """peak learning rate of the weights; by default the space's own, and in stage 2 from a checkpoint, or of free
    widths that are distilled, the highest at which a few steps from the start do no harm"""
    weight_decay: float | None = None
    """weight decay; none on norms, biases and what timm's model exempts"""
    momentum: float = 0.9
    """of the optimisers that have one (sgd, momentum)"""
    layer_decay: float | None = None
    """learning rate of a layer as a fraction of the next one's"""
    sched: str | None = None
    """learning-rate schedule, by timm's name; none: constant, after the warm-up if there is one"""
    warmup_epochs: int | None = None
    """epochs of linear warm-up before the schedule begins; a constant rate (--sched none) has none. In a minimax
    search gates, counts and multipliers stand still for as long"""
    warmup_lr: float | None = None
    """rate at which the warm-up begins"""
    min_lr: float | None = None
    """floor of the schedule"""
    decay_epochs: float | None = None
    """step schedule: epochs between decays"""
    decay_rate: float = 0.1
    """step schedule: factor of a decay; poly: its power"""
    cooldown_epochs: int = 0
    """epochs at the schedule's last rate, after --epochs"""
    clip_grad: float | None = None
    """clip the gradient of the weights"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """what --clip-grad bounds: the norm, each value, or adaptively"""
    model_ema: bool | None = None
    """keep an exponential moving average of the weights; evaluate it and give it as the result"""
    model_ema_decay: float | None = None
    """decay of the average, per step"""
    model_ema_warmup: bool | None = None
    """let the average's memory grow with the run (true; timm's default is off, made for long runs)"""
    channels_last: bool = False
    """NHWC memory format for images and convolutions"""
    compile: bool = False
    """torch.compile of the forward passes in training"""

    def total_epochs(self) -> int:
        """Epochs of the run: --epochs and the cool-down, as in timm."""
        assert self.epochs is not None
        return self.epochs + self.cooldown_epochs

    def check_training(self) -> None:
        """Refuse values that no run can use."""
        at_least_one(self, "batch_size", "grad_accum_steps", "calibration_images")
        not_negative(
            self,
            "epochs",
            "refit_images",
            "lr",
            "weight_decay",
            "min_lr",
            "warmup_lr",
            "opt_eps",
            "warmup_epochs",
            "cooldown_epochs",
        )
        positive(self, "decay_epochs", "decay_rate", "layer_decay", "clip_grad", "refit_memory")


@dataclass(frozen=True)
class LoopOptions(RunOptions, MachineOptions, TrainingOptions):
    """All that the training loop reads: how, where, and into which folder."""
