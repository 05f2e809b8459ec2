"""The images that a finished run was measured on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nas.config import RetrainConfig, with_defaults
from nas.data.datasets import Splits
from nas.data.loader import Loader, eval_loader
from nas.data.loaders import loader_spec, open_data
from nas.data.transforms import LoaderSpec
from nas.runs.folder import read_options, typed
from nas.runs.opened import Opened, large_network
from search_spaces.errors import UserError
from search_spaces.registry import get_space


@dataclass(frozen=True)
class Reported:
    """images: batches of the reported split; words: its name. bank: makes those of the training part.

    classes: of their labels; 0: there are none.
    """

    images: Loader
    words: str
    bank: Callable[[], Any]
    classes: int


def reported_of(splits: Splits, spec: LoaderSpec, device: torch.device) -> Reported:
    """The reported split of a data set, and its training part, both prepared as in evaluation."""
    images = eval_loader(splits.test, spec, device)
    return Reported(images, splits.reported, lambda: eval_loader(splits.train, spec, device), splits.num_classes)


def reported_images(
    opened: Opened, device: torch.device, options: Mapping[str, Any], any_classes: bool = False
) -> Reported:
    """The reported split, prepared as in the run (config.yaml) unless options say otherwise.

    options: fields of RetrainConfig; None leaves the run's own. any_classes: whether they may be others than the
    network's. UserError when the images have other classes.
    """
    config, saved = RetrainConfig(), opened.folder / "config.yaml"
    if saved.is_file():
        known = {k: v for k, v in read_options(saved).items() if hasattr(config, k)}
        config = RetrainConfig(**typed(RetrainConfig, known, saved))
    if options.get("dataset") or options.get("data_dir"):  # not the run's: nothing of its data applies
        config = replace(config, dataset=None, data_dir=None, num_classes=None, class_map="")
    config = replace(config, **{k: v for k, v in options.items() if v is not None})
    space = get_space(opened.arch.space)
    config = with_defaults(config, space, "retrain")
    splits = open_data(config)
    different = splits.num_classes != opened.arch.num_classes
    if different and splits.num_classes and opened.arch.num_classes and not any_classes:
        raise UserError(
            f"{config.dataset or config.data_dir or 'digits'} has {splits.num_classes} classes, the networks of"
            f" {opened.folder} {opened.arch.num_classes}; give --dataset and --data-dir of what they were trained on"
        )
    backbone = (opened.supernet or large_network(opened.arch)).backbone
    spec = loader_spec(config, backbone, opened.arch.input_size, config.batch_size or 64)
    return reported_of(splits, spec, device)
