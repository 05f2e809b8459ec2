"""A finished run opened again: its architecture, its networks, the images it was measured on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.machine.timing import Network
from nas.networks.architecture import cut_down, slices_of
from nas.networks.backbone import build
from nas.networks.basis_file import basis_of, streams_of
from nas.networks.compact_file import WEIGHTS, load_compact
from nas.networks.rounds import ROUND, large_model
from nas.networks.weights import load_weights
from nas.runs.folder import LARGE, SUPERNET
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice
from supernets.basis import install_stages, rewrite
from supernets.supernet import Supernet

LARGE_FILES = (LARGE, SUPERNET)


@dataclass(frozen=True)
class Opened:
    """A folder with an arch.json. supernet: None where no weights of the large network are there.

    whole: what the large network is in the run's summary: large, original, or previous where it is the compact network
    of an earlier round; None where it is nobody's result: a search trained the weights for the subnet alone.
    """

    folder: Path
    arch: Architecture
    subnet: NetworkSlice
    supernet: Supernet | None
    compact: nn.Module | None
    whole: str | None = "large"

    def networks(self) -> dict[str, Network]:
        """Those there are weights of: large (or as it was before), subnet, compact."""
        found: dict[str, Network] = {}
        supernet = self.supernet
        if supernet is not None:
            found = {} if self.whole is None else {self.whole: supernet.large}
            found |= {"subnet": lambda x: supernet.small(x, self.subnet)}
        return found if self.compact is None else found | {"compact": self.compact}

    def features(self) -> dict[str, Network]:
        """The same networks, to their pooled features (B, E), which enter a classifier where there is one."""
        found, supernet = self.networks(), self.supernet
        if supernet is not None and supernet.adapter.feature_head is None:
            found |= {"subnet": lambda x: supernet.small_with_features(x, self.subnet)[1].flatten(1)}
        whole = {} if self.whole is None or supernet is None else {self.whole: features_of(supernet.backbone)}
        return found | whole | ({} if self.compact is None else {"compact": features_of(self.compact)})

    def costs(self, name: str) -> dict[str, float]:
        """Parameters, and GFLOPs (MACs), of one of the networks."""
        if name == self.whole and self.supernet is not None:
            return {"params": self.supernet.params(), "gflops": self.supernet.flops() / 1e9}
        return {"params": self.arch.params, "gflops": self.arch.flops / 1e9}


def features_of(network: Any) -> Network:
    """A timm network as far as its pooled features; the output of one without classifier."""
    if network.num_classes == 0:
        return network  # type: ignore[no-any-return]
    return lambda x: network.forward_head(network.forward_features(x), pre_logits=True)


def open_folder(path: Path, device: torch.device) -> Opened:
    """path: a run's folder, or a weights file in it, which then is the only one read. UserError when nothing fits."""
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run's folder, or a weights file beside its arch.json")
    arch = load_architecture(folder)
    names = {p.name for p in folder.iterdir()} if path.is_dir() else {path.name}
    known = (WEIGHTS, *LARGE_FILES)
    if not names & set(known):
        raise UserError(f"{path}: expected {' or '.join(known)}, or a folder that holds one of them")
    large = next((folder / name for name in LARGE_FILES if name in names), None)
    supernet, classes = None, arch.num_classes
    if large is not None:
        weights, model = load_weights(large), large_model(arch, folder)
        backbone = build(model.name, model.kwargs, num_classes=classes)
        backbone = backbone if model.cut is None else cut_down(backbone, model.cut)
        try:
            backbone.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).splitlines()[1:3])
            raise UserError(f"{large} does not belong to {folder / 'arch.json'}: {reason}") from None
        supernet = Supernet(backbone)
        basis = basis_of(arch, folder)
        if basis is not None:
            rewrite(supernet, basis, again=True)
        supernet = supernet.to(device).eval()
    compact = load_compact(folder, device) if WEIGHTS in names else None
    shapes = (supernet or large_network(arch)).shapes
    return Opened(folder, arch, slices_of(arch, shapes), supernet, compact, whole_of(folder, ROUND in arch.search))


def whole_of(folder: Path, further: bool = False) -> str | None:
    """`Opened.whole`, by summary.json; large where that does not say what the run trained. further: of a round."""
    try:
        trained = json.loads((folder / "summary.json").read_text())["trained"]
    except (OSError, ValueError, KeyError, TypeError):
        return "large"
    if not trained:
        return "previous" if further else "original"
    return "large" if "large" in trained else None


def large_network(arch: Architecture, device: torch.device | str = "meta") -> Supernet:
    """The large network of an architecture, at timm's initial weights; on the meta device in a moment."""
    with torch.device(device):
        supernet = Supernet(build(arch.model, arch.model_kwargs, num_classes=arch.num_classes)).eval()
        install_stages(supernet, streams_of(arch.basis))
        return supernet
