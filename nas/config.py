"""The options of both stages: one dataclass each, the only list there is.

Flags follow timm's train.py where it has one. None means: the space's own default (search_spaces/registry.py).
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from search_spaces.errors import UserError
from search_spaces.registry import Space

C = TypeVar("C", bound="Common")

KeyValues = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE", help="constructor arguments of the timm model")
]


@dataclass(frozen=True)
class Common:
    """Options of both stages."""

    dataset: str | None = None
    """digits, imagenet, imagenet100, cifar10, cifar100, folder, or a scheme of timm's factory (hfds/…, wds/…)"""
    data_dir: Path | None = None
    """where the dataset lies"""
    val_fraction: float = 0.1
    """share of the training set held out; every decision is taken on it, never on the test split"""
    class_map: str = ""
    """timm's class map file"""
    download: bool = False
    """let torchvision or Hugging Face fetch the dataset"""

    model: str | None = None
    """any timm name of the space's family"""
    model_kwargs: KeyValues = ()
    pretrained: bool | None = None
    """start from timm's pretrained weights"""
    checkpoint: Path | None = None
    """start from these weights (safetensors, or a torch file)"""

    importance: Literal["none", "magnitude", "taylor"] | None = None
    """order heads, neurons and channels before anything is cut; by default taylor for trained weights, magnitude
    when their classifier is fresh, none from scratch"""

    epochs: int | None = None
    batch_size: int | None = None
    opt: str | None = None
    """optimiser, by timm's name"""
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    sched: str | None = None
    """learning-rate schedule, by timm's name; none: constant"""
    warmup_epochs: int | None = None
    warmup_lr: float | None = None
    min_lr: float | None = None
    clip_grad: float | None = None
    """clip the gradient's norm"""
    drop_path: float | None = None
    """stochastic depth of the backbone"""

    aa: str | None = None
    """RandAugment or AutoAugment policy, e.g. rand-m9-mstd0.5-inc1; none to switch off"""
    hflip: float | None = None
    color_jitter: float | None = None
    scale: tuple[float, float] | None = None
    """share of the image that random resized crop takes"""
    reprob: float | None = None
    """random erasing"""
    remode: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    smoothing: float | None = None
    """label smoothing"""

    amp: bool | None = None
    """autocast"""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    device: str | None = None
    """cuda where there is one, otherwise cpu"""
    workers: int | None = None
    """data loading processes; none for the embedded dataset, 4 otherwise"""
    threads: int | None = None
    """torch threads"""
    seed: int = 42
    output: Path | None = None
    """the run's own folder"""
    resume: bool = False
    """go on with the run in --output"""
    detach_teacher: bool = False
    """stop the gradient of the KL term into the large network"""

    adjoined: bool = True
    """KCR, joint: train large and small together, or by --no-adjoined the small network alone, as KCR's authors do"""
    eta_kc: float | None = None
    """KCR, joint: weight of the truncated nuclear norm of the small network's pooled features (docs/kcr.md)"""
    rho: float | None = None
    """KCR, joint: share of the features' spectrum that this norm leaves free"""


@dataclass(frozen=True)
class SearchConfig(Common):
    """Search a backbone for a smaller network that shares its weights, and write arch.json."""

    space: str = "swin-dan-nano"
    """<backbone>-<method>[-nano]; --list-spaces shows all"""
    list_spaces: bool = False
    """print every space and stop"""
    width: Literal["stream", "inner"] = "stream"
    """what a compression factor narrows (docs/method.md)"""
    alphas: tuple[int, ...] | None = None
    """candidate compression factors"""
    fractions: tuple[float, ...] | None = None
    """KCR, joint: candidate shares of the channels that an MLP reads and writes (1, 3/4, 1/2, 1/4)"""
    selection: Literal["topk", "bernoulli"] = "topk"
    """KCR: choose a count and keep the channels of highest score, or let every channel be drawn by itself"""
    flops_weight: float | None = None
    """weight w of E[F]/F_full under --no-adjoined (0.2)"""
    alpha: int | None = None
    """AN: the compression factor of every block"""
    stage_width: Literal["widest", "full"] = "widest"
    """narrow each stage to its widest slice afterwards, or keep it full"""
    budget: float | None = None
    """FLOPs of the result as a fraction of the backbone's; 0 for none"""
    gflops: float | None = None
    """the same in GFLOPs (MACs)"""
    gamma: float | None = None
    """weight of the FLOPs penalty per MAC when there is no budget (1e-12, equation 3.7)"""
    arch_lr: float | None = None
    """Adam's rate for the architecture logits"""
    arch_data: Literal["train", "val"] = "train"
    """train the logits on the weights' own batches, or alternate with the held-out part"""


@dataclass(frozen=True)
class RetrainConfig(Common):
    """Train an architecture adjoined with its backbone, and cut the compact network out."""

    arch: Path | None = None
    """arch.json of a search, or the folder that holds it"""
    space: str | None = None
    """instead of --arch: a space of method AN, which needs no search"""
    alpha: int | None = None
    """AN: the compression factor of every block"""
    width: Literal["stream", "inner"] = "stream"
    """AN: what the factor narrows"""
    init: Literal["base", "supernet"] | None = None
    """start from the original weights or from where the search arrived; by default the latter if the number of
    classes is the same"""
    model_ema: bool | None = None
    """keep an exponential moving average of the weights and cut the compact network out of it"""
    model_ema_decay: float | None = None


def parse_key_values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """timm's KEY=VALUE arguments: Python literals, "a,b" as a tuple, anything else as text."""
    import ast

    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-kwargs {pair!r}; expected KEY=VALUE, e.g. img_size=32")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def with_defaults(config: C, space: Space, stage: Literal["search", "retrain"]) -> C:
    """Fill every option that was left None from the space's defaults for the stage."""
    own = dict(space.training) | dict(space.search if stage == "search" else space.retrain)
    names = {f.name for f in fields(config)}
    chosen = {k: v for k, v in own.items() if k in names and getattr(config, k) is None}
    return replace(config, **chosen)
