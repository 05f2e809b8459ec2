"""timm's other names of a model: local-dir:FOLDER and hf-hub:OWNER/NAME, as an architecture's name and a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.networks.compact_file import TIMM_NAME
from search_spaces.errors import UserError, reason

PREPARATION = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
FILES = ["config.json", "model.safetensors", "pytorch_model.bin"]


@dataclass(frozen=True)
class Source:
    """folder: where weights and config.json lie. kwargs: constructor arguments, and how its images are prepared."""

    folder: Path
    name: str
    kwargs: dict[str, Any]


def source_of(model: str | None) -> Source | None:
    """What such a name means; None for a name of timm's own. UserError where there is no config.json of timm's."""
    kind, colon, place = (model or "").partition(":")
    if not colon or kind not in ("local-dir", "hf-hub", "hf_hub"):
        return None
    from timm.models._hub import load_model_config_from_path

    folder = Path(place) if kind == "local-dir" else _downloaded(place)
    try:
        config, name, arguments = load_model_config_from_path(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--model {model}: no config.json as timm writes it ({reason(error)})") from None
    if name == TIMM_NAME:
        raise UserError(
            f"--model {model} is a compact network of this toolkit, no model of timm's; search.py --arch FOLDER"
            " compresses it further, retrain.py --arch FOLDER trains it on"
        )
    overlay = {key: config[key] for key in PREPARATION if config.get(key) is not None}
    return Source(folder, name, dict(arguments or {}) | {"pretrained_cfg_overlay": overlay})


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=FILES))
    except Exception as error:  # of httpx, of the Hub, of the file system
        raise UserError(
            f"--model hf-hub:{name} could not be fetched ({reason(error)[:120]}); download it where there is a network"
            " and give --model local-dir:FOLDER"
        ) from None
