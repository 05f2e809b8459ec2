"""The options of the backbone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nas.machine.ranges import share
from nas.networks.key_values import parse_key_values

KeyValues = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")]


@dataclass(frozen=True)
class NetworkOptions:
    """Which backbone, and where its weights start."""

    model: str | None = None
    """any timm name of the space's family; timm's local-dir:FOLDER and hf-hub:OWNER/NAME as well"""
    model_kwargs: KeyValues = ()
    """constructor arguments of the timm model, e.g. img_size=384 depths=2,2,6,2"""
    pretrained: bool | None = None
    """start from timm's pretrained weights"""
    checkpoint: Path | None = None
    """start from these weights: safetensors, a torch file, or a folder with one (docs/weights.md)"""
    drop_path: float | None = None
    """stochastic depth of the backbone"""

    def brings_weights(self) -> bool:
        """Whether the weights are a network of the user's, not timm's own or drawn ones."""
        return self.checkpoint is not None or (self.pretrained is not False and ":" in (self.model or ""))

    def check_network(self) -> None:
        """Refuse values that no run can use."""
        share(self, "drop_path")
        parse_key_values(self.model_kwargs)
