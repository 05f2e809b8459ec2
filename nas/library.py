"""What `import nas` gives (docs/library.md): both stages, and the way from a timm network to a compact one by hand.

Importing this registers T2T-ViT with timm (supernets/families.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nas.config import C, RetrainConfig, SearchConfig
from nas.networks.architecture import architecture_of, slices_of
from nas.networks.backbone import TimmModel
from nas.networks.basis_file import recorded, save_basis, streams_of
from nas.networks.compact_file import load_compact, save_compact
from nas.networks.opening import meta_supernet
from nas.runs.folder import fits, words_of
from nas.runs.front import member_folder
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import Architecture
from search_spaces.errors import UserError
from search_spaces.method import Picks
from search_spaces.registry import get_space
from search_spaces.slices import NetworkSlice
from supernets import basis as bases
from supernets import compact
from supernets.calibration import Wanted, calibrate
from supernets.importance import magnitude_scores, orders_of
from supernets.streams import fixed_streams
from supernets.supernet import Supernet

__all__ = ["Architecture", "Supernet", "cut", "load", "pick", "retrain", "rewrite", "save", "search"]

COMMAND_LINE = ("list_spaces", "verbose", "processes")  # fields that are no options of a run


def search(space: str | None = None, **options: Any) -> Path:
    """Stage 1: search a space and return the run's folder, which holds arch.json.

    space: by default that of search.py, with arch= the free widths of that run's family. options: those of search.py,
    by the fields of SearchConfig. Raises TypeError for a name that is none of them and UserError for a value that no
    run can use.
    """
    return run_search(config_of(SearchConfig, "search", {"space": space} | options))


def retrain(arch: str | Path | None = None, **options: Any) -> Path:
    """Stage 2: train an architecture with its backbone, cut it out, and return the run's folder.

    arch: the folder of a search, or an arch.json; without one, space="<backbone>-an" and alpha. options: those of
    retrain.py, by the fields of RetrainConfig; errors as in `search`.
    """
    return run_retrain(config_of(RetrainConfig, "retrain", {"arch": arch} | options))


def load(folder: str | Path, *, budget: float | None = None, **options: Any) -> nn.Module:
    """The compact network of a folder, in eval mode; options and errors are those of load_compact.

    budget: which one, of the run of a front (docs/searchers.md).
    """
    place = Path(folder) if budget is None else member_folder(Path(folder), budget)
    return load_compact(place, **options)


def rewrite(supernet: Supernet, batches: Iterable[Tensor]) -> bases.Basis:
    """Rewrite a supernet, in place, so that its first channels, heads and neurons matter most; its function stays.

    batches: images (B, C, H, W), prepared as in evaluation, on the supernet's device, no fewer in all than its widest
    stream has channels. Streams are rotated where that is exact and otherwise ordered, as heads and neurons are, by
    magnitude. `pick` and `cut` then speak of this basis; `save` takes it. Raises UserError when images are too few.
    """
    fixed = fixed_streams(supernet.adapter)
    widths = {shape.stage: shape.embed_dim for shape in supernet.shapes if shape.stage not in fixed}
    found = calibrate(supernet, enough(batches, max(widths.values(), default=0)), Wanted(frozenset(widths)))
    orders = orders_of(magnitude_scores(supernet), supernet)
    rotated = {f"stream.{stage}" for stage in widths}
    found = replace(found, orders={name: order for name, order in orders.items() if name not in rotated})
    bases.rewrite(supernet, found)
    return found


def enough(batches: Iterable[Tensor], least: int) -> Iterator[Tensor]:
    """The batches, and a UserError behind them where they have fewer images than that."""
    seen = 0
    for images in batches:
        seen += len(images)
        yield images
    if seen < least:
        raise UserError(f"a stream of {least} channels is not rotated on {seen} images; give at least {least}")


def pick(
    supernet: Supernet,
    space: str,
    picks: Sequence[Picks],
    *,
    width: str = "stream",
    model_kwargs: Mapping[str, Any] | None = None,
) -> Architecture:
    """The architecture of one candidate per choice and block, without a search; its .flops are MACs.

    picks: {"alpha": 2} per block, in order, as the space's method chooses. model_kwargs: what timm.create_model was
    given besides the name. Raises UserError when the picks do not fit, or these do not make the backbone again.
    """
    backbone: Any = supernet.backbone
    model, kwargs = getattr(backbone, "pretrained_cfg", {}).get("architecture"), dict(model_kwargs or {})
    if model is None:
        raise UserError("the backbone has no name in timm, by which arch.json could say it; use timm.create_model")
    again = meta_supernet(TimmModel(model, kwargs), backbone.num_classes, get_space(space))
    if sizes_of(again) != sizes_of(supernet):
        raise UserError(
            f"{model} with {kwargs or 'its defaults'} is not the supernet's backbone;"
            " give in model_kwargs what timm.create_model was given"
        )
    arch, basis = architecture_of(supernet, space, model, kwargs, picks, width), supernet.basis
    if basis is None:
        return arch
    return replace(arch, **standing(basis))


def standing(basis: bases.Basis) -> dict[str, Any]:
    """What an architecture says of a basis: its hash, or, where it only orders, the orders themselves."""
    if basis.streams or basis.qk or basis.v:
        return {"basis": recorded(basis), "permutation": {}}
    return {"basis": {}, "permutation": basis.orders}


def cut(network: nn.Module, subnet: Architecture | NetworkSlice) -> nn.Module:
    """The compact network of an architecture: its own copies of the weights, in the order in which they stand.

    network: a supernet or its backbone, which stays as it is.
    """
    supernet = network if isinstance(network, Supernet) else Supernet(network)
    if isinstance(subnet, Architecture):
        asked, here = streams_of(subnet.basis), tuple(sorted(supernet.adapter.streams))
        if asked != here:
            raise UserError(
                f"the basis of the architecture rotates stages {asked or 'none'}, that of the network {here or 'none'};"
                " rewrite the network in it first (docs/library.md)"
            )
        subnet = slices_of(subnet, supernet.shapes)
    return compact.cut(supernet.backbone, subnet)


def save(network: nn.Module, folder: str | Path, arch: Architecture, basis: bases.Basis | None = None) -> None:
    """Write a compact network as `load` and timm open it: compact.safetensors, arch.json and config.json.

    basis: what `rewrite` gave, for `retrain`, which needs it where the architecture stands in one. UserError when it is
    another.
    """
    if basis is not None and any(getattr(arch, name) != value for name, value in standing(basis).items()):
        raise UserError("the architecture stands in another basis; give what nas.rewrite gave for its supernet")
    save_compact(network, Path(folder), arch)
    if basis is not None and arch.basis:
        save_basis(basis, Path(folder))


def sizes_of(supernet: Supernet) -> tuple[Any, ...]:
    """By which two backbones are told apart: the input, the blocks, and the shape of every tensor."""
    tensors = {name: t.shape for name, t in supernet.backbone.state_dict().items()}
    return supernet.adapter.input_size, supernet.shapes, tensors


def config_of(kind: type[C], call: str, options: Mapping[str, Any]) -> C:
    """The options of a stage, as its command line would read them.

    Paths may be text, tuples may be lists, and arguments of a timm model a mapping.
    """
    known: dict[str, Any] = {f.name: f.type for f in fields(kind) if f.name not in COMMAND_LINE}
    values = {}
    for name, value in options.items():
        if name not in known:
            near = " or ".join(get_close_matches(name, known)) or "one of docs/options.md"
            raise TypeError(f"nas.{call}() has no option {name!r}; expected {near}")
        if isinstance(value, Mapping):
            value = tuple(f"{key}={argument!r}" for key, argument in value.items())
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and fits(Path(value), known[name]):
            value = Path(value)
        if not fits(value, known[name]):
            words = words_of(known[name])
            raise UserError(f"nas.{call}(): {name} is {value!r}; expected {words} (docs/options.md)")
        values[name] = value
    return kind(**values)
