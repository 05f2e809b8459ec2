"""Kernel complexity and the truncated nuclear norm of pooled features (section 2.3).

F (n, D) holds the pooled features that enter the classifier, one row per training image; lam_1 >= lam_2 >= …
are the eigenvalues of the Gram matrix FF^T/n. They are those of F^T F/n, so nothing of size n x n is formed.
Source: Compression of Vision Transformer by Reduction of Kernel Complexity; section 2.3.

    python -m nas.kernel_complexity --model vit_tiny_patch16_224 --pretrained --dataset digits

prints the kernel complexity of any timm model on the training images of a dataset and draws its spectrum.

Shape suffixes: N images, B images of a batch, D features, r eigenvectors kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nas.data.options import DataOptions
from nas.objectives.spectrum import EpochKernel, SecondMoment, _kernel_complexity_by_h, trace_normalised
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-12  # share of the trace below which an eigenvalue is the rounding of float32 features


# The command


def main(argv: Sequence[str] | None = None) -> None:
    """Print KC, raw and trace-normalised, and draw the spectrum. Exit code 2 and one line for bad input."""
    from nas.failing import errors

    options = _parser().parse_args(argv)
    with errors(_parser().prog):
        if options.output.suffix != ".png" or options.output.is_dir():
            raise UserError(f"--output {options.output}: expected the name of a .png file")
        _measure(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nas.kernel_complexity",
        description="Kernel complexity of the features that a timm model hands to its classifier, over the "
        "training images of a dataset: prints it raw and trace-normalised, draws the spectrum.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="any timm model")
    add("--model-kwargs", nargs="+", default=(), metavar="KEY=VALUE", help="its constructor arguments")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights: safetensors or torch file; EMA if it has one",
    )
    add("--pretrained", action=argparse.BooleanOptionalAction, default=False, help="timm's own weights")
    add("--dataset", default="digits", metavar="NAME", help="as in search.py (default: the embedded digits)")
    add("--data-dir", type=Path, metavar="DIR", help="where the dataset lies")
    add(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share held out in training, left out here",
    )
    add("--batch-size", type=int, default=128, metavar="B", help="images at a time (default: 128)")
    add("--workers", type=int, default=0, metavar="N", help="data loading processes (default: none)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one",
    )
    add("--output", type=Path, default=Path("spectrum.png"), metavar="PNG", help="default: spectrum.png")
    return parser


def _measure(options: argparse.Namespace) -> None:
    import supernets.t2t_vit  # noqa: F401 - enters T2T-ViT into timm's registry
    from nas.data.loaders import open_data
    from nas.networks.backbone import Start, starting_backbone
    from nas.networks.key_values import parse_key_values
    from nas.pictures.run import save

    if options.pretrained and options.checkpoint:
        raise UserError("--pretrained and --checkpoint both name the weights; give one of them")
    splits = open_data(data_of(options))
    kwargs = parse_key_values(tuple(options.model_kwargs))
    start = Start(options.pretrained, options.checkpoint)
    model, notes, _ = starting_backbone(options.model, kwargs, splits.num_classes, start, splits.class_names)
    kernel, num_features = _kernel_of(model, kwargs, splits.train, options)

    weights = options.checkpoint or ("timm's pretrained weights" if start.given() else "random weights")
    spectra = (kernel.eigenvalues, trace_normalised(kernel.eigenvalues))
    h_raw, h_normalised = (int(_kernel_complexity_by_h(lam, kernel.n).argmin()) for lam in spectra)
    for note in notes:
        print(f"note: {note}")
    print(f"{options.model}, {weights}")
    print(f"{options.dataset}: n = {kernel.n} training images, D = {num_features} pooled features")
    print(f"KC                    {kernel.kc:.6f}  at h = {h_raw}")
    print(f"KC, trace-normalised  {kernel.kc_normalised:.6f}  at h = {h_normalised}")
    title = f"{options.model}, {getattr(weights, 'name', weights)}, on {options.dataset}"
    save(_figure(kernel, num_features, (h_raw, h_normalised), title), options.output)
    print(options.output)


def data_of(options: argparse.Namespace) -> DataOptions:
    """Which images, as both stages are told."""
    names = ("dataset", "data_dir", "val_fraction", "workers")
    return DataOptions(**{name: getattr(options, name) for name in names})


@torch.no_grad()
def _kernel_of(
    model: Any, kwargs: Mapping[str, Any], images: Any, options: argparse.Namespace
) -> tuple[EpochKernel, int]:
    """One pass over the images, centre crops, in float32: the kernel of the pooled features, and D."""
    from nas.data.loader import eval_loader
    from nas.data.loaders import loader_spec
    from nas.machine.progress import progress
    from nas.networks.backbone import input_size

    spec = loader_spec(data_of(options), model, input_size(model, kwargs), options.batch_size)
    try:
        device = torch.device(options.device)
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}; try --device cpu") from None
    moment: SecondMoment | None = None
    for batch, _ in progress(eval_loader(images, spec, device), "features"):
        features_BD = model.forward_head(model.forward_features(batch), pre_logits=True)
        if features_BD.ndim != 2:
            raise UserError(
                f"{options.model} hands features of shape {tuple(features_BD.shape)} to its classifier, "
                "expected (batch, features); choose a model that pools first"
            )
        moment = moment or SecondMoment(features_BD.shape[1], device)
        moment.update(features_BD)
    if moment is None:
        raise UserError(f"--dataset {options.dataset}: no training images")
    return moment.finish(rho=0.0), features_BD.shape[1]  # rho 0: no basis is needed


def _figure(kernel: EpochKernel, num_features: int, minima: tuple[int, int], title: str) -> Figure:
    """The spectrum, log-log, and the h at which KC is reached, raw and trace-normalised."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nas.pictures.figures import GREY, PALETTE

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lam = kernel.eigenvalues.cpu().numpy()
    trace = float(lam.sum())
    shown = lam[lam > ROUNDING * trace]
    axes.loglog(range(1, len(shown) + 1), shown, color="black", marker=".", markersize=4, linewidth=1)
    names = (f"KC = {kernel.kc:.4g}", f"trace-normalised KC = {kernel.kc_normalised:.4g}")
    for h, name, color, stroke in zip(minima, names, PALETTE, ("--", ":"), strict=False):
        axes.axvline(h + 0.5, color=color, linestyle=stroke, linewidth=1.8, label=f"{name}, reached at h = {h}")
    rest = len(lam) - len(shown)
    axes.set_xlabel("i, from the largest eigenvalue" + (f" ({rest} more: zero to rounding)" if rest else ""))
    axes.set_ylabel("eigenvalue $\\hat\\lambda_i$ of $FF^T/n$")
    if trace > 0:
        to_share: Callable[[Any], Any] = lambda y: y / trace  # noqa: E731
        from_share: Callable[[Any], Any] = lambda y: y * trace  # noqa: E731
        share = axes.secondary_yaxis("right", functions=(to_share, from_share))
        share.set_ylabel("share of the trace")
    axes.grid(True, color=GREY, alpha=0.3, linewidth=0.5)
    axes.legend(loc="lower left", framealpha=1)
    figure.suptitle(
        f"{title}\nSpectrum of the pooled features F: n = {kernel.n} images, D = {num_features} features",
        fontsize=11,
    )
    figure.supxlabel(
        "KC = min over h of  $h/n + (\\sum_{i>h}\\hat\\lambda_i/n)^{1/2}$:  lower means features that span "
        "fewer directions.\nEigenvalues left of a line count one by one, those right of it by their sum.",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    main()
