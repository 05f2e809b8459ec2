"""Kernel complexity and the truncated nuclear norm of pooled features (section 2.3).

F (n, D) holds the pooled features that enter the classifier, one row per training image; lam_1 >= lam_2 >= …
are the eigenvalues of the Gram matrix FF^T/n. They are those of F^T F/n, so nothing of size n x n is formed.

Shape suffixes: N images, B images of a batch, D features, r eigenvectors kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from search_spaces.errors import UserError


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
