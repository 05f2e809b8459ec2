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

KeyValues = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")]


@dataclass(frozen=True)
class Common:
    """Options of both stages."""

    dataset: str | None = None
    """digits, imagenet, imagenet100, cifar10, cifar100, folder, or a scheme of timm's factory (hfds/…, wds/…)"""
    data_dir: Path | None = None
    """where the dataset lies"""
    train_split: str = "train"
    """the training split's name"""
    val_split: str = "validation"
    """the split that results are reported on (timm's name for it), once and at the end; it decides nothing"""
    num_classes: int | None = None
    """only where the dataset does not record it"""
    val_fraction: float = 0.1
    """share of the training images held out of training; every decision is taken on it, none on --val-split"""
    class_map: str = ""
    """timm's class map file"""
    download: bool = False
    """let torchvision or Hugging Face fetch the dataset"""

    model: str | None = None
    """any timm name of the space's family"""
    model_kwargs: KeyValues = ()
    """constructor arguments of the timm model, e.g. img_size=384 depths=2,2,6,2"""
    pretrained: bool | None = None
    """start from timm's pretrained weights"""
    checkpoint: Path | None = None
    """start from these weights (safetensors, or a torch file)"""

    importance: Literal["none", "magnitude", "taylor"] | None = None
    """order heads, neurons and channels before anything is cut; by default taylor for trained weights, magnitude
    when their classifier is fresh, none from scratch"""

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
    """peak learning rate of the weights"""
    weight_decay: float | None = None
    """weight decay; none on norms, biases and what timm's model exempts"""
    momentum: float = 0.9
    """of the optimisers that have one (sgd, momentum)"""
    layer_decay: float | None = None
    """learning rate of a layer as a fraction of the next one's"""
    sched: str | None = None
    """learning-rate schedule, by timm's name; none: constant, after the warm-up if there is one"""
    warmup_epochs: int | None = None
    """epochs of linear warm-up before the schedule begins; a constant rate (--sched none) has none. In a search by UVC
    gates, counts and multipliers stand still for as long"""
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
    drop_path: float | None = None
    """stochastic depth of the backbone"""

    aa: str | None = None
    """RandAugment or AutoAugment policy, e.g. rand-m9-mstd0.5-inc1; none to switch off"""
    no_aug: bool = False
    """resize and centre crop only"""
    hflip: float | None = None
    """probability of a horizontal flip"""
    vflip: float = 0.0
    """probability of a vertical flip"""
    color_jitter: float | None = None
    """strength of colour jitter; --aa replaces it"""
    scale: tuple[float, float] | None = None
    """share of the image that random resized crop takes"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """aspect of the random resized crop"""
    train_interpolation: str = "random"
    """of training; random draws between bilinear and bicubic"""
    interpolation: str | None = None
    """of evaluation; like crop, mean and std, the model's own unless given"""
    crop_pct: float | None = None
    """centre crop of evaluation; 1 up to 64 px"""
    mean: tuple[float, ...] | None = None
    """of the normalisation; the model's own unless given"""
    std: tuple[float, ...] | None = None
    """of the normalisation; the model's own unless given"""
    reprob: float | None = None
    """probability of random erasing"""
    remode: str | None = None
    """what random erasing fills in: pixel, const or rand"""
    recount: int = 1
    """random erasing: patches per image"""
    aug_repeats: int = 0
    """repeated augmentation: versions of an image in a batch"""
    mixup: float | None = None
    """alpha of mixup; 0 switches it off"""
    cutmix: float | None = None
    """alpha of CutMix; 0 switches it off"""
    cutmix_minmax: tuple[float, float] | None = None
    """bounds of the side that CutMix takes, instead of --cutmix's draw"""
    mixup_prob: float = 1.0
    """of mixup or cutmix, per batch, pair or element"""
    mixup_switch_prob: float = 0.5
    """of cutmix where both are on"""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """one draw for the batch, for pairs, or for each image"""
    smoothing: float | None = None
    """label smoothing"""

    model_ema: bool | None = None
    """keep an exponential moving average of the weights; evaluate it and give it as the result"""
    model_ema_decay: float | None = None
    """decay of the average, per step"""
    model_ema_warmup: bool = True
    """let the average's memory grow with the run (timm's default is off, made for long runs)"""

    amp: bool | None = None
    """train and measure under autocast (--amp-dtype)"""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """type of --amp; float16 needs CUDA"""
    channels_last: bool = False
    """NHWC memory format for images and convolutions"""
    compile: bool = False
    """torch.compile of the forward passes in training"""
    device: str | None = None
    """cuda where there is one, otherwise cpu"""
    workers: int | None = None
    """data loading processes; none for the embedded dataset, 4 otherwise"""
    threads: int | None = None
    """CPU threads of torch; its own choice by default"""
    seed: int = 42
    """of initial weights, batches, augmentation and Gumbel noise"""
    output: Path | None = None
    """the run's own folder"""
    processes: Annotated[int | None, tyro.conf.Suppress] = None
    """how many torchrun started, where there are several; written down, not asked for"""
    resume: bool = False
    """go on with the run in --output"""
    keep: int = 0
    """keep the checkpoints of the last so many epochs, besides the last and the best"""
    tensorboard: bool = False
    """write the columns of log.csv for TensorBoard too"""
    detach_teacher: bool = False
    """stop the gradient of the KL term into the large network"""

    teacher: str | None = None
    """any timm model with the dataset's classes (--train distill; a search by UVC); by default the original network"""
    teacher_kwargs: KeyValues = ()
    """constructor arguments of --teacher"""
    teacher_checkpoint: Path | None = None
    """weights of the teacher"""
    distill: Literal["soft", "hard", "none"] | None = None
    """match the teacher's distribution, or its decision; by default soft, in a search from scratch none"""
    distill_weight: float | None = None
    """share of the loss that is the teacher's (0.5; UVC: 0.1)"""
    distill_temperature: float = 1.0
    """divides both networks' logits in distillation"""

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
    prune: bool = True
    """UVC: remove heads, channels and neurons; by --no-prune nothing but what --skip skips"""
    skip: Literal["block", "attention", "mlp", "halves", "none"] = "block"
    """UVC: what a gate skips: a block, its attention, its MLP, each half by a gate of its own, or nothing"""
    flops_weight: float | None = None
    """weight w of E[F]/F_full under --no-adjoined (0.2)"""
    alpha: int | None = None
    """AN: the compression factor of every block"""
    stage_width: Literal["widest", "full"] = "widest"
    """narrow each stage to its widest slice, or keep it full"""
    budget: float | None = None
    """FLOPs of the result as a fraction of the backbone's; 0 for none"""
    gflops: float | None = None
    """the same in GFLOPs (MACs)"""
    gamma: float | None = None
    """weight of the FLOPs penalty per MAC when there is no budget (1e-12, equation 3.7)"""
    arch_lr: float | None = None
    """Adam's rate for the architecture logits, times lambda(t) in DAN and joint (docs/method.md); UVC: that of the
    gates' SGD, as of the published run's length"""
    arch_data: Literal["train", "val"] = "train"
    """train the logits on the weights' own batches, or alternate with the held-out part"""


@dataclass(frozen=True)
class SweepConfig(SearchConfig):
    """Search a backbone for a smaller network that shares its weights, and write arch.json; many by --sweep."""

    sweep: tuple[str, ...] = ()
    """OPTION=VALUES, once per option to vary: a grid (budget=0.2,0.35) or a range (gamma=loguniform(1e-13,1e-11));
    retrain.OPTION=VALUES for the second stage (docs/sweeps.md)"""
    trials: int | None = None
    """of a range: how many draws, for every point of the grid"""
    retrain_trials: bool = False
    """retrain what each trial found"""
    ray_address: str | None = None
    """a running Ray cluster (auto, or HOST:PORT); by default Ray is started on this machine's loopback (local)"""
    cpus_per_trial: float = 1.0
    """processor cores of a trial; --threads follows unless given"""
    gpus_per_trial: float | None = None
    """GPUs of a trial, or the share of one; by default 1 where the cluster has any"""
    procs_per_trial: int = 1
    """processes of a trial, all on one node, each with --cpus-per-trial and --gpus-per-trial (docs/distributed.md)"""
    max_concurrent: int | None = None
    """trials at a time; as many as fit by default"""
    storage: str | None = None
    """a place that every node of the cluster can write (a folder, or a URI such as s3://bucket/path), through which
    checkpoints and results travel; not needed where --output lies on such a place"""
    scheduler: Literal["fifo", "asha"] = "fifo"
    """run every trial to its end, or stop early those that fall behind (asynchronous successive halving)"""


@dataclass(frozen=True)
class RetrainConfig(Common):
    """Train an architecture adjoined with its backbone, and cut the compact network out."""

    arch: Path | None = None
    """arch.json of a search, or the folder that holds it"""
    space: str | None = None
    """instead of --arch: a space of method AN, which needs no search (with --train plain any space)"""
    alpha: int | None = None
    """AN: the compression factor of every block"""
    width: Literal["stream", "inner"] = "stream"
    """AN: what the factor narrows"""
    init: Literal["base", "supernet"] | None = None
    """start from the original weights or from where the search arrived; by default the latter if the number of
    classes is the same"""
    train: Literal["plain", "adjoined", "distill"] = "adjoined"
    """both networks (equation 3.4), the large one alone, or the small one under a frozen teacher"""
    result: Literal["last", "best"] = "last"
    """which epoch's weights are measured and cut: the last, or the best on the held-out part"""


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
