"""The options of the data set, and of how its images are prepared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nas.machine.ranges import at_least_one, interval, not_negative, positive, probability, share

# options that say which images a run trains on, and how they are held out and prepared
TRAINED_ON = ("dataset", "data_dir", "train_split", "num_classes", "class_map", "labels")
PREPARATION = ("val_fraction", "exif", "interpolation", "crop_pct", "mean", "std")


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they become batches."""

    dataset: str | None = None
    """digits, imagenet, imagenet100, cifar10, cifar100, folder, or a scheme of timm's factory (hfds/…, wds/…)"""
    data_dir: Path | None = None
    """where the dataset lies"""
    train_split: str = "train"
    """the training split's name"""
    val_split: str = "validation"
    """the split that results are reported on (timm's name for it), once and at the end; it decides nothing"""
    num_classes: int | None = None
    """only where the dataset does not record it. 0: no classifier, the network's pooled features are its output"""
    labels: bool = True
    """read the images' labels; by --no-labels they are images alone, as in a folder without class folders
    (docs/unlabelled.md)"""
    val_fraction: float = 0.1
    """share of the training images held out of training; every decision is taken on it, none on --val-split"""
    class_map: str = ""
    """timm's class map file"""
    download: bool = False
    """let torchvision or Hugging Face fetch the dataset"""
    exif: bool = True
    """turn images as their EXIF data says, in training and evaluation alike (docs/data.md)"""
    workers: int | None = None
    """data loading processes; none for the embedded dataset, otherwise 4, or one for every core if they are fewer"""
    augment: Literal["none", "light", "strong"] | None = None
    """a set of augmentations (docs/training.md); --aa, --scale and so on override what it holds. By default the
    space's own; from a checkpoint light where that is made for hundreds of epochs"""
    aa: str | None = None
    """RandAugment or AutoAugment policy, e.g. rand-m9-mstd0.5-inc1; none: neither a policy nor colour jitter"""
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
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = None
    """how a training crop is taken, as timm has it: rrc, a random part resized; rkrc and rkrr, the image resized, its
    aspect kept but for a draw, and cropped in the middle or at random (rrc)"""
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
    mixup_prob: float | None = None
    """of mixup or cutmix, per batch, pair or element (1)"""
    mixup_switch_prob: float = 0.5
    """of cutmix where both are on"""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """one draw for the batch, for pairs, or for each image"""

    def dataset_name(self) -> str:
        """The embedded digits unless something else is asked for."""
        return self.dataset or ("digits" if self.data_dir is None else "folder")

    def mixes(self) -> bool:
        """Whether the images of a batch are mixed in pairs."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)

    def check_data(self) -> None:
        """Refuse values that no run can use."""
        at_least_one(self, "recount")
        not_negative(self, "aug_repeats", "mixup", "cutmix", "num_classes")
        share(self, "val_fraction", "reprob")
        probability(self, "hflip", "vflip", "mixup_prob", "mixup_switch_prob")
        positive(self, "crop_pct")
        interval(self, "ratio", "scale", "cutmix_minmax")
