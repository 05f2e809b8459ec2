"""The name "compact" for timm: after `import nas.timm_entry`, timm.create_model opens compact networks.

timm.create_model("local-dir:results/<run>", pretrained=True)       # by the config.json in the folder
timm.create_model("compact", folder="results/<run>", pretrained=True, features_only=True)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from nas.networks.compact_file import TIMM_CONFIG, WEIGHTS, load_compact
from search_spaces.errors import UserError


def folder_of(pretrained_cfg: Mapping[str, Any], cache_dir: str | None = None) -> Path:
    """The folder that timm's source means: local-dir's own, or a snapshot of a Hugging Face repository."""
    if pretrained_cfg.get("source") == "local-dir":
        return Path(pretrained_cfg["file"])
    if not pretrained_cfg.get("hf_hub_id"):
        raise UserError(
            'compact: which network? Give timm.create_model("local-dir:FOLDER") or ("compact", folder="FOLDER")'
        )
    from huggingface_hub import snapshot_download

    repo, _, revision = str(pretrained_cfg["hf_hub_id"]).partition("@")
    files = ["arch.json", TIMM_CONFIG, WEIGHTS]
    return Path(snapshot_download(repo, revision=revision or None, allow_patterns=files, cache_dir=cache_dir))


def compact(
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    folder: str | Path | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A compact network as timm's entry points make one.

    folder: where arch.json and compact.safetensors lie; with local-dir: and hf-hub: timm says it. pretrained False
    leaves timm's initial weights. features_only: a module from images to feature maps (NCHW), of the last out_indices
    (an int, or a tuple of indices). kwargs: num_classes, and the backbone's own, such as img_size and drop_path_rate.
    """
    source = Path(folder) if folder is not None else folder_of(pretrained_cfg or {}, cache_dir)
    options = {name: kwargs.pop(name) for name in ("out_indices", "output_fmt", "norm") if name in kwargs}
    network: Any = load_compact(source, pretrained=pretrained, **kwargs)
    network.pretrained_cfg = network.default_cfg = dict(network.pretrained_cfg) | dict(pretrained_cfg_overlay or {})
    if features_only:
        network = FeatureGetterNet(network, **{"out_indices": min(4, len(network.feature_info))} | options)
    return network  # type: ignore[no-any-return]


if not timm.is_model("compact"):
    register_model(compact)
