"""Kernel complexity and the truncated nuclear norm of pooled features (design section 2.3).

F (n, D) holds the pooled features that enter the classifier, one row per training image; lam_1 >= lam_2 >= …
are the eigenvalues of the Gram matrix FF^T/n. They are those of F^T F/n, so nothing of size n x n is formed.
Source: Compression of Vision Transformer by Reduction of Kernel Complexity (KCR-Transformer).

    python -m nas.kernel_complexity --model vit_tiny_patch16_224 --pretrained --dataset digits

prints the kernel complexity of any timm model on the training images of a dataset and draws its spectrum.

Shape suffixes: N images, B images of a batch, D features, r eigenvectors kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from search_spaces.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-12  # share of the trace below which an eigenvalue is the rounding of float32 features


def spectrum(features_ND: Tensor) -> Tensor:
    """The min(n, D) largest eigenvalues of FF^T/n, descending, >= 0, float64; the others are exactly zero."""
    features_ND = features_ND.detach().double()
    return spectrum_of_second_moment(features_ND.T @ features_ND, len(features_ND))


def spectrum_of_second_moment(moment_DD: Tensor, n: int) -> Tensor:
    """As `spectrum`, from the sum F^T F over n images. Raises UserError if it is not finite."""
    return _descending(torch.linalg.eigvalsh(_mean(moment_DD, n)), n)


def kernel_complexity(eigenvalues: Tensor, n: int) -> float:
    """KC = min over integers h in [0, n] of h/n + sqrt(sum_{i>h} lam_i / n); eigenvalues descending."""
    return float(_kernel_complexity_by_h(eigenvalues, n).min())


def trace_normalised(eigenvalues: Tensor) -> Tensor:
    """The spectrum scaled to sum to one: shrinking F alone no longer lowers KC. Zeros stay zeros."""
    trace = eigenvalues.sum()
    return eigenvalues / trace if trace > 0 else eigenvalues


def truncation_rank(rho: float, n: int, num_features: int) -> int:
    """r = ceil(rho * min(n, D)). Raises UserError unless 0 <= rho <= 1."""
    if not 0 <= rho <= 1:
        raise UserError(f"rho is {rho}: expected a share of the spectrum to leave free, from 0 to 1")
    # In decimals: 0.07 * 100 is 7.000000000000001 in binary, and its ceiling 8.
    return math.ceil(Fraction(str(rho)) * min(n, num_features))


def truncated_nuclear_norm(eigenvalues: Tensor, r: int) -> float:
    """TNN_r = sum_{i>r} lam_i; eigenvalues descending."""
    return float(eigenvalues[r:].double().sum())


def separable_tnn(features_BD: Tensor, basis_Dr: Tensor) -> Tensor:
    """mean_i(|f_i|^2 - |V^T f_i|^2) of a batch, a scalar: the batch's share of TNN_r.

    Over the whole training set this is TNN_r when V holds its own top r eigenvectors, and an upper bound of
    TNN_r for any other orthonormal V, such as that of the epoch before. Differentiable in f, not in V; at
    least float32 whatever autocast is in force.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        features_BD = features_BD.to(torch.promote_types(features_BD.dtype, torch.float32))
        basis_Dr = basis_Dr.detach().to(features_BD.dtype)
        # |f - V V^T f|^2 is the same number for orthonormal V. The difference of two nearly equal squares
        # would lose the small tail in float32, and could be negative.
        residual_BD = features_BD - (features_BD @ basis_Dr) @ basis_Dr.T
        return residual_BD.square().sum(dim=1).mean()


@dataclass(frozen=True)
class EpochKernel:
    """What one epoch's features gave: log these numbers. n images, eigenvalues (min(n, D),), rank r."""

    n: int
    rank: int
    eigenvalues: Tensor
    kc: float
    kc_normalised: float  # of the trace-normalised spectrum
    tnn: float


class SecondMoment:
    """F^T F of the running epoch, and the top eigenvectors V of the epoch before.

        moment = SecondMoment(num_features, device)
        for each epoch:
            for each batch:
                moment.update(features_BD)
                if moment.previous_basis_Dr is not None:  # None during the first epoch: no TNN term
                    loss = loss + eta_kc * separable_tnn(features_BD, moment.previous_basis_Dr)
            log(moment.finish(rho))  # refreshes V, restarts the sum

    The sum is kept in float64, D * D * 8 bytes: eigenvalues many orders below the first one matter to KC.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None) -> None:
        self.previous_basis_Dr: Tensor | None = None  # float32, no gradient
        self._sum_DD = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self._n = 0

    def update(self, features_BD: Tensor) -> None:
        """Add a batch of the running epoch; carries no gradient. Raises ValueError if it is not (B, D)."""
        if features_BD.ndim != 2 or features_BD.shape[1] != len(self._sum_DD):
            raise ValueError(f"features of shape {tuple(features_BD.shape)}, expected (B, {len(self._sum_DD)})")
        features_BD = features_BD.detach().to(torch.float64)
        self._sum_DD.addmm_(features_BD.T, features_BD)
        self._n += len(features_BD)

    def finish(self, rho: float) -> EpochKernel:
        """End the epoch: sum over the processes of torch.distributed, refresh V, start again from zero.

        Every process must call it, and all get the same V. Raises ValueError after an epoch without images,
        UserError for a rho outside [0, 1] or features that are not finite.
        """
        n = self._all_reduce()
        if n == 0:
            raise ValueError("finish() after an epoch without a single update()")
        rank = truncation_rank(rho, n, len(self._sum_DD))
        ascending, vectors_DD = torch.linalg.eigh(_mean(self._sum_DD, n))
        eigenvalues = _descending(ascending, n)
        self.previous_basis_Dr = vectors_DD.flip(1)[:, :rank].float().contiguous()
        self._sum_DD.zero_()
        self._n = 0
        return EpochKernel(
            n=n,
            rank=rank,
            eigenvalues=eigenvalues,
            kc=kernel_complexity(eigenvalues, n),
            kc_normalised=kernel_complexity(trace_normalised(eigenvalues), n),
            tnn=truncated_nuclear_norm(eigenvalues, rank),
        )

    def _all_reduce(self) -> int:
        """Make the sum that of all processes, if there are several; returns their n."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._n
        n = torch.tensor(self._n, device=self._sum_DD.device)
        torch.distributed.all_reduce(self._sum_DD)
        torch.distributed.all_reduce(n)
        return int(n)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, plain tensors. Inside an epoch the sum is this process's own: each must save its state."""
        state = {"sum": self._sum_DD.clone(), "n": torch.tensor(self._n)}
        if self.previous_basis_Dr is not None:
            state["previous_basis"] = self.previous_basis_Dr.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken. Raises ValueError for another number of features."""
        if state["sum"].shape != self._sum_DD.shape:
            raise ValueError(f"state of {len(state['sum'])} features, expected {len(self._sum_DD)}")
        self._sum_DD.copy_(state["sum"])
        self._n = int(state["n"])
        basis_Dr = state.get("previous_basis")
        # A copy: the state may be loaded twice.
        self.previous_basis_Dr = None if basis_Dr is None else basis_Dr.to(self._sum_DD.device, copy=True)


def _mean(moment_DD: Tensor, n: int) -> Tensor:
    """F^T F/n in float64, checked: LAPACK fails on NaN in words that name no cause."""
    if n < 1:
        raise ValueError(f"a second moment of {n} images")
    if not bool(moment_DD.isfinite().all()):
        raise UserError(
            "pooled features: found NaN or infinity, expected finite numbers; "
            "the training has diverged (lower the learning rate) or the checkpoint is damaged"
        )
    return moment_DD.double() / n


def _descending(eigenvalues: Tensor, n: int) -> Tensor:
    # The rank is at most n. What rounding leaves below zero, or beyond the n-th place, is zero.
    return eigenvalues.flip(0)[:n].clamp(min=0)


def _kernel_complexity_by_h(eigenvalues: Tensor, n: int) -> Tensor:
    """h/n + sqrt(sum_{i>h} lam_i / n) for h = 0, 1, ... up to the last h that can be the minimum."""
    if n < 1 or len(eigenvalues) > n:
        raise ValueError(f"{len(eigenvalues)} eigenvalues of {n} images, expected at most {n}")
    lam = eigenvalues.detach().double().cpu()
    # Summed from the small end. After the last eigenvalue the tail is zero and only h/n grows: h stops there.
    tail = torch.cat([lam.flip(0).cumsum(0).flip(0), lam.new_zeros(1)])
    return torch.arange(len(lam) + 1, dtype=torch.float64) / n + (tail / n).sqrt()


# The command


def main(argv: Sequence[str] | None = None) -> None:
    """Print KC, raw and trace-normalised, and draw the spectrum. Exit code 2 and one line for bad input."""
    from nas.cli import errors

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
    from nas.backbone import Start, starting_backbone
    from nas.config import parse_key_values
    from nas.datasets import DataSpec, open_splits
    from nas.plot import save

    if options.pretrained and options.checkpoint:
        raise UserError("--pretrained and --checkpoint both name the weights; give one of them")
    splits = open_splits(DataSpec(options.dataset, options.data_dir, options.val_fraction))
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


@torch.no_grad()
def _kernel_of(
    model: Any, kwargs: Mapping[str, Any], images: Any, options: argparse.Namespace
) -> tuple[EpochKernel, int]:
    """One pass over the images, centre crops, in float32: the kernel of the pooled features, and D."""
    from timm.data import resolve_data_config

    from nas.backbone import input_size
    from nas.data import eval_loader
    from nas.evaluate import progress
    from nas.transforms import LoaderSpec

    data = resolve_data_config({"input_size": input_size(model, kwargs)}, model=model)
    crop_pct = 1.0 if data["input_size"][1] <= 64 else data["crop_pct"]  # as in training: nas.setup
    spec = LoaderSpec(
        batch_size=options.batch_size,
        input_size=data["input_size"],
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=crop_pct,
        workers=options.workers,
    )
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

    from nas.figures import GREY, PALETTE

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
