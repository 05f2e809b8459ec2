"""The images that a finished run was measured on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nas.config import RetrainConfig, with_defaults
from nas.data.loader import Loader, eval_loader
from nas.data.loaders import loader_spec, open_data
from nas.runs.folder import read_options, typed
from nas.runs.opened import Opened, large_network
from search_spaces.errors import UserError
from search_spaces.registry import get_space


def reported_images(opened: Opened, device: torch.device, options: Mapping[str, Any]) -> tuple[Loader, str]:
    """Batches of the reported split, prepared as in the run (config.yaml), unless options say otherwise; and its name.

    options: fields of RetrainConfig; None leaves the run's own. UserError when the images have other classes.
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
    if splits.num_classes != opened.arch.num_classes:
        raise UserError(
            f"{config.dataset or config.data_dir or 'digits'} has {splits.num_classes} classes, the networks of"
            f" {opened.folder} {opened.arch.num_classes}; give --dataset and --data-dir of what they were trained on"
        )
    backbone = (opened.supernet or large_network(opened.arch)).backbone
    spec = loader_spec(config, backbone, opened.arch.input_size, config.batch_size or 64)
    return eval_loader(splits.test, spec, device), splits.reported
