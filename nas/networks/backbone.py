"""The timm model that is compressed: made, given its starting weights, its classifier fitted to the dataset."""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nas.data.listing import few
from nas.data.split_names import trained_before
from nas.networks.adapting import adapted
from nas.networks.architecture import cut_down
from nas.networks.weights import load_weights
from search_spaces.architecture import Architecture
from search_spaces.errors import UserError, reason
from supernets.families import ADAPTED

# what timm's constructors raise on arguments that cannot be; without weights to fetch, RuntimeError too
ARGUMENTS = (TypeError, AssertionError, ValueError, LookupError, AttributeError, ArithmeticError)
# what timm's converters raise on weights of another network
CONVERSION = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class TimmModel:
    """A model by timm's name and the arguments of its constructor.

    cut: the architecture that it is cut down to, where it is the compact network of an earlier round (rounds.py).
    """

    name: str
    kwargs: Mapping[str, Any]
    cut: Architecture | None = None


@dataclass(frozen=True)
class Start:
    """Where the starting weights come from.

    pretrained: timm's. checkpoint: a file, or a folder with one. Neither: timm's initialisation, drawn from seed.
    """

    pretrained: bool = False
    checkpoint: Path | None = None
    seed: int = 42

    def given(self) -> bool:
        """Whether the weights were trained before."""
        return self.pretrained or self.checkpoint is not None

    def name(self) -> str | None:
        """The weights that were trained before, in words; None where they are drawn."""
        return trained_before(self.pretrained, self.checkpoint)


class Unfilled(TorchFunctionMode):
    """What would fill a tensor on the meta device leaves it as it is, which it does anyway, after Python's long way."""

    FILLS = frozenset(
        ["add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_"]
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.FILLS or getattr(func, "__module__", "") == nn.init.__name__:
            filled = args[0] if args else kwargs["tensor"]
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs or {})


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built here has shapes and no weights."""
    with torch.device("meta"), Unfilled():
        yield


def check_model_name(model: str) -> None:
    """UserError with near matches when timm does not know the model."""
    if not timm.is_model(model):
        names = timm.list_models()
        near = difflib.get_close_matches(model, names, n=3)
        near = near or [n for n in names if n.startswith(model.split("_")[0])][:3]
        raise UserError(f"unknown model {model!r}; did you mean {', '.join(near) or 'one of timm.list_models()'}?")


def check_family(backbone: nn.Module, family: str, model: str) -> None:
    """UserError when a model is not of the space's family."""
    if not ADAPTED[family].takes(backbone):
        raise UserError(
            f"{model} is a {type(backbone).__name__}, the {family}-* spaces take"
            f" {' or '.join(ADAPTED[family].names())}; choose another --model or --space"
        )


def build(model: str, model_kwargs: Mapping[str, Any], *, pretrained: bool = False, **extra: Any) -> nn.Module:
    """timm.create_model with one clear error per thing that can be wrong with its arguments."""
    check_model_name(model)
    try:
        return timm.create_model(model, pretrained=pretrained, **dict(model_kwargs) | extra)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, *ARGUMENTS) as error:
        if not pretrained or isinstance(error, ARGUMENTS):
            words = f"timm cannot build {model} with {dict(model_kwargs)}: {reason(error)}"
            raise UserError(words) from None
        raise UserError(
            f"the pretrained weights of {model} could not be fetched ({reason(error)[:120]});"
            " give --checkpoint FILE, or --no-pretrained to start from scratch"
        ) from None


def starting_backbone(
    model: str,
    model_kwargs: Mapping[str, Any],
    num_classes: int,
    start: Start,
    class_names: Sequence[str] | None = None,
    drop_path: float | None = None,
    cut: Architecture | None = None,
) -> tuple[nn.Module, list[str], bool]:
    """The backbone with its starting weights, what is worth saying about them, and whether the classifier is new.

    A pretrained ImageNet classifier keeps the rows of the dataset's classes when these are ImageNet's
    (section 2.8); any other classifier of the wrong size is made anew. cut: as in TimmModel, which starts from a
    checkpoint.
    """
    extra: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    torch.manual_seed(start.seed)
    if not start.given() and cut is None:
        return build(model, model_kwargs, num_classes=num_classes, **extra), [], True
    if start.checkpoint is not None:
        backbone = build(model, model_kwargs, num_classes=num_classes, **extra)
        backbone = backbone if cut is None else cut_down(backbone, cut)
        return backbone, *load_into(backbone, load_weights(start.checkpoint), str(start.checkpoint), class_names)
    if cut is not None:
        raise ValueError("a compact network starts from a checkpoint")
    source = build(model, model_kwargs, pretrained=True, **extra)
    state = dict(source.state_dict())
    backbone = build(model, model_kwargs, num_classes=num_classes, **extra)
    return backbone, *load_into(backbone, state, f"timm's weights of {model}", class_names)


def load_into(
    backbone: nn.Module, state: Mapping[str, Tensor], source: str, class_names: Sequence[str] | None
) -> tuple[list[str], bool]:
    """Load weights into a backbone, classifier aside when it does not fit.

    Returns what did not match, in words, and whether the classifier is new.

    Raises UserError when anything but the classifier is missing or has another shape, or something is no number.
    """
    own, held = backbone.state_dict(), state
    state, lines = adapted(dict(state), backbone, source)
    state = as_timm_has_it(state, backbone, source)
    if not set(own) & set(state):
        raise UserError(
            f"{source} does not fit {type(backbone).__name__}: it holds {few(held, 4)}; wanted are {few(own, 4)}"
        )
    for name in classifier_names(backbone):
        for leaf in (f"{name}.weight", f"{name}.bias"):
            if leaf not in state or leaf not in own or state[leaf].shape == own[leaf].shape:
                continue
            rows = imagenet_rows(class_names) if state[leaf].shape[0] == 1000 else None
            if rows is not None and len(rows) == own[leaf].shape[0]:
                state[leaf] = state[leaf][rows]
                lines.append(f"{leaf}: kept the rows of the dataset's {len(rows)} ImageNet classes")
            else:
                found = state.pop(leaf).shape[0]
                lines.append(f"{leaf}: {found} classes in {source}, {own[leaf].shape[0]} here; made anew")
    fresh = [n for n in own if n not in state and n.startswith(tuple(classifier_names(backbone)))]
    missing = sorted(set(own) - set(state) - set(fresh))
    wrong = [
        f"{n} {tuple(state[n].shape)}, here {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if missing or wrong:
        what = (["missing: " + few(missing, 4)] if missing else []) + (["shape: " + few(wrong, 4)] if wrong else [])
        raise UserError(
            f"{source} does not fit {type(backbone).__name__}: {'; '.join(what)}; check --model and --model-kwargs"
        )
    broken = [n for n in own if n in state and state[n].is_floating_point() and not state[n].isfinite().all()]
    if broken:
        raise UserError(
            f"{source} holds NaN or infinity: {few(broken, 4)}; its training has diverged, or it is damaged"
        )
    unexpected = sorted(set(state) - set(own))
    if unexpected:
        lines.append(f"not used from {source}: {few(unexpected, 4)}")
    backbone.load_state_dict({n: state[n] for n in own if n in state}, strict=False)
    return lines, bool(fresh)


def as_timm_has_it(state: Mapping[str, Tensor], backbone: nn.Module, source: str) -> dict[str, Tensor]:
    """Weights after timm's own conversion: names of other authors, position embeddings, tables and stems resized."""
    filter_fn = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return dict(state)
    try:
        return dict(filter_fn(dict(state), backbone))
    except UserError as error:
        raise UserError(f"{source}: {error}; it holds {few(state, 4)}") from None
    except CONVERSION as error:
        raise UserError(
            f"{source} does not fit {type(backbone).__name__}, timm cannot convert it ({reason(error)}); it holds"
            f" {few(state, 4)}; wanted are {few(backbone.state_dict(), 4)}"
        ) from None


def input_size(backbone: Any, model_kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) that a timm model was made for; timm's own record ignores its constructor's arguments."""
    channels, *size = backbone.pretrained_cfg["input_size"]
    size = model_kwargs.get("img_size", size)
    height, width = (size, size) if isinstance(size, int) else size
    return model_kwargs.get("in_chans", channels), height, width


def classifier_names(backbone: Any) -> list[str]:
    """Module paths of the classifier layers."""
    classifier = backbone.get_classifier()
    layers = classifier if isinstance(classifier, tuple) else (classifier,)
    return [name for name, module in backbone.named_modules() if any(module is layer for layer in layers)]


def imagenet_rows(class_names: Sequence[str] | None) -> list[int] | None:
    """ImageNet-1k indices of classes named by their wnids; None when they are not ImageNet's."""
    if not class_names:
        return None
    from timm.data import ImageNetInfo

    index = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return [index[name] for name in class_names] if all(name in index for name in class_names) else None
