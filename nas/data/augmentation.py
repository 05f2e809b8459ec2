"""What training does to images: the sets that --augment names, what an open option means, and how it is said."""

from collections.abc import Mapping
from typing import Any

from nas.data.options import DataOptions
from search_spaces.errors import UserError

# Each replaces the space's own values of these options; an option that is given replaces either.
STRENGTHS: Mapping[str, Mapping[str, Any]] = {
    "none": dict(aa="none", color_jitter=0.0, hflip=0.0, scale=(1.0, 1.0), reprob=0.0, mixup=0.0, cutmix=0.0),
    "light": dict(aa="none", color_jitter=0.0, hflip=0.5, scale=(0.5, 1.0), reprob=0.0, mixup=0.0, cutmix=0.0),
    "strong": dict(
        aa="rand-m9-mstd0.5-inc1", color_jitter=0.0, hflip=0.5, scale=(0.08, 1.0), reprob=0.25, mixup=0.8, cutmix=1.0
    ),
}


def held(options: DataOptions, own: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    """Options for what was left open, by --augment or by the start: {option: value}, to replace the space's own.

    own: the space's. trained: whether the run starts from a network of the user's; then a set that was made for
    hundreds of epochs is not its default (section 2.14).
    """
    name = options.augment
    if name is None and trained and any(own.get(option) for option in ("aa", "mixup", "cutmix")):
        name = "light"
    return dict(STRENGTHS[name]) if name is not None else {}


def squared(options: DataOptions) -> dict[str, Any]:
    """What --augment none asks for beside its set: a crop of the whole image is the largest square in its middle."""
    return {"ratio": (1.0, 1.0)} if options.augment == "none" and options.ratio == DataOptions.ratio else {}


def check_augmentation(options: DataOptions) -> None:
    """Refuse what contradicts --no-aug."""
    if options.no_aug and options.augment is not None:
        raise UserError(f"--no-aug and --augment {options.augment} both say what is done to an image; drop one")
    if options.no_aug and options.train_crop_mode is not None:
        raise UserError(f"--train-crop-mode {options.train_crop_mode}: --no-aug crops nothing at random; drop one")


def in_effect(options: DataOptions) -> dict[str, Any]:
    """The options of STRENGTHS with what they mean where they were left open. A policy replaces colour jitter."""
    policy = None if options.aa in (None, "none") else options.aa
    jitter = options.color_jitter
    if jitter is None:
        jitter = 0.0 if options.aa == "none" else 0.4  # timm's
    return {
        "aa": policy,
        "color_jitter": jitter,
        "hflip": 0.5 if options.hflip is None else options.hflip,
        "scale": options.scale or (0.08, 1.0),
        "reprob": options.reprob or 0.0,
        "mixup": options.mixup or 0.0,
        "cutmix": options.cutmix or 0.0,
    }


def augmentation_line(options: DataOptions) -> str:
    """What is done to training images, in one line, with the set's name where it is one."""
    found = in_effect(options)
    parts = ["--no-aug"] if options.no_aug else _of_an_image(options, found)
    parts += [f"mixup {found['mixup']:g}"] if found["mixup"] else []
    cut = found["cutmix"] or options.cutmix_minmax
    parts += (
        [f"CutMix {cut:g}" if isinstance(cut, float) else f"CutMix of sides {cut[0]:g} to {cut[1]:g}"] if cut else []
    )
    name = _name(options, found)
    return f"augmentation{f' ({name})' if name else ''}: {', '.join(parts)}"


def _of_an_image(options: DataOptions, found: Mapping[str, Any]) -> list[str]:
    low, high = found["scale"]
    crops = f"crops of {low:g} to {high:g} of the area"
    if (low, high) == options.ratio == (1.0, 1.0):
        crops = "the square in the middle"
    parts = [crops if options.train_crop_mode in (None, "rrc") else f"{options.train_crop_mode} {low:g} to {high:g}"]
    parts += [f"horizontal flips {found['hflip']:g}"] if found["hflip"] else []
    parts += [f"vertical flips {options.vflip:g}"] if options.vflip else []
    if found["aa"]:
        parts.append(found["aa"])
    elif found["color_jitter"]:
        parts.append(f"colour jitter {found['color_jitter']:g}")
    return parts + ([f"erasing {found['reprob']:g}"] if found["reprob"] else [])


def _name(options: DataOptions, found: Mapping[str, Any]) -> str:
    """The set of STRENGTHS that this is; empty for none of them."""
    if options.no_aug or options.vflip or options.train_crop_mode not in (None, "rrc") or options.cutmix_minmax:
        return ""
    jitter = 0.0 if found["aa"] else found["color_jitter"]
    own = dict(found) | {"aa": found["aa"] or "none", "color_jitter": jitter}
    names = [name for name, held in STRENGTHS.items() if own == held]
    ratio = (1.0, 1.0) if names == ["none"] else DataOptions.ratio
    return names[0] if names and options.ratio == ratio else ""
