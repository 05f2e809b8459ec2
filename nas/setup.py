"""From options to the pieces of a run: device, data, supernet, space, optimisers."""

from nas.config import Common
from nas.runs.tensorboard import writer_class
from search_spaces.errors import UserError


def check_common(config: Common) -> None:
    """Refuse option values that no run can use."""
    for name in ("epochs", "batch_size", "grad_accum_steps", "recount", "num_classes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1")
    rates = ("lr", "weight_decay", "min_lr", "warmup_lr", "opt_eps")
    counts = ("warmup_epochs", "cooldown_epochs", "keep", "aug_repeats")
    for name in (*rates, *counts, "mixup", "cutmix"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected 0 or more")
    for name in ("val_fraction", "smoothing", "reprob", "drop_path"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected a share from 0 to below 1")
    for name in ("hflip", "vflip", "mixup_prob", "mixup_switch_prob"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected a probability from 0 to 1")
    for name in ("decay_epochs", "decay_rate", "layer_decay", "clip_grad", "crop_pct"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected more than 0")
    for name in ("ratio", "scale", "cutmix_minmax"):
        value = getattr(config, name)
        if value is not None and not 0 < value[0] <= value[1]:
            raise UserError(f"--{name.replace('_', '-')} {value[0]} {value[1]}; expected two numbers, 0 < low <= high")
    mixes = bool(config.mixup or config.cutmix or config.cutmix_minmax)
    if mixes and (config.batch_size or 64) % 2:
        raise UserError(f"--batch-size {config.batch_size}: mixup pairs the images of a batch; give an even number")
    if config.tensorboard:
        writer_class()
