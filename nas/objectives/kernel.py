"""The kernel term, in both stages: eta_kc * TNN_r of the small network's features (section 2.3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.objectives.adjoined import Adjoined, Loss
from nas.objectives.members import Members
from nas.objectives.options import KernelOptions, StageTwoOptions
from nas.objectives.spectrum import EpochKernel, SecondMoment, separable_tnn
from nas.objectives.teacher import Teacher
from nas.training.losses import cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet


class KernelTerm(nn.Module):
    """eta_kc * TNN_r of the small network's pooled features, and the kernel complexity of every epoch.

    V is of the epoch before, so the first epoch has no term. rho: share of the spectrum that is left free.
    """

    def __init__(self, eta_kc: float, rho: float) -> None:
        super().__init__()
        self.eta_kc, self.rho = eta_kc, rho
        self.kernel: EpochKernel | None = None  # of the last epoch that ended
        self._moment: SecondMoment | None = None
        self._state: Mapping[str, Tensor] = {}  # a checkpoint's, until the features show their number
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)  # by which the device is known

    def forward(self, features: Tensor, step: Step) -> Tensor:
        """features (B, D), or (B, 2, D/2) of a network with two classifiers -> the weighted term, a scalar."""
        features = features.flatten(1)
        self._begin(features.shape[1])
        assert self._moment is not None
        if step.counted:  # every batch of an accumulated step is
            self._moment.update(features)
        if self._moment.previous_basis_Dr is None:
            return torch.zeros((), device=features.device)
        return self.eta_kc * separable_tnn(features, self._moment.previous_basis_Dr)

    def finish_epoch(self) -> None:
        """Refresh V and measure the epoch."""
        if self._state:  # where a run goes on, an epoch may have no step left
            self._begin(len(self._state["sum"]))
        assert self._moment is not None, "an epoch without a step"
        self.kernel = self._moment.finish(self.rho)

    def _begin(self, num_features: int) -> None:
        """The second moment, from a checkpoint's state where there is one."""
        if self._moment is None:
            self._moment = SecondMoment(num_features, self._place.device)
            if self._state:
                self._moment.load_state_dict(self._state)

    def log(self) -> dict[str, float]:
        """KC raw and on the trace-normalised spectrum, TNN_r and the trace it is part of."""
        if self.kernel is None:
            return {}
        trace = float(self.kernel.eigenvalues.sum())
        return {
            "kc": self.kernel.kc,
            "kc_normalised": self.kernel.kc_normalised,
            "tnn": self.kernel.tnn,
            "trace": trace,
        }

    def process_state(self) -> dict[str, Tensor]:
        """The running epoch's sum, of this process's images; empty before the first."""
        return {name: t.cpu() for name, t in self.get_extra_state().items() if name in ("sum", "n")}

    def load_process_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `process_state` gave."""
        self.set_extra_state({**self.get_extra_state(), **state} if state else {})

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self._state) if self._moment is None else self._moment.state_dict()

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self._moment, self._state = None, dict(state)


class KernelAdjoined(Adjoined):
    """Retraining under the kernel term: CE(p) + lambda KL(p || q) + eta_kc TNN, or CE(q) + eta_kc TNN."""

    def __init__(
        self,
        supernet: Supernet,
        subnet: NetworkSlice,
        *,
        kernel: KernelTerm,
        adjoined: bool,
        loss: Loss | None = None,
        teacher: Teacher | None = None,
        averaged: bool = False,
    ) -> None:
        super().__init__(supernet, subnet, loss, teacher, averaged)
        self.kernel, self.adjoined = kernel, adjoined

    @classmethod
    def of(
        cls, options: StageTwoOptions, supernet: Supernet, members: Members, teacher: Teacher | None
    ) -> "KernelAdjoined":
        """As the options ask for it. UserError for a front: the term is of one network's features."""
        return cls(
            supernet,
            members.only("the kernel term is of the features"),
            kernel=kernel_term(options),
            adjoined=not options.alone(),
            loss=Loss.of(options),
            teacher=teacher,
            averaged=options.adjoined_teacher == "ema",
        )

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        q, features = self.supernet.small_with_features(images, self.members.widest)
        if self.adjoined:
            p = self.supernet.large(images)
            terms = self.loss.terms(p, q, self.expert(images, p), target, step.t)
        else:
            terms = {"ce": cross_entropy(q, target, self.loss.smoothing)}
        return terms | {"tnn": self.kernel(features, step)}

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {name: network for name, network in super().networks().items() if self.adjoined or name != "large"}

    def process_state(self) -> dict[str, Tensor]:
        return self.kernel.process_state()

    def load_process_state(self, state: Mapping[str, Tensor]) -> None:
        self.kernel.load_process_state(state)

    def after_epoch(self) -> None:
        self.kernel.finish_epoch()

    def log(self, step: Step) -> dict[str, float]:
        return super().log(step) | self.kernel.log()


@dataclass(frozen=True)
class Task:
    """What networks are trained for. adjoined: both by KL, or the small one alone by its own cross-entropy."""

    supernet: Supernet
    smoothing: float
    detach_teacher: bool
    adjoined: bool

    def terms(self, images: Tensor, target: Tensor, q: Tensor, lam: float) -> dict[str, Tensor]:
        """q: logits of the small network. lam: lambda(t)."""
        if not self.adjoined:
            return {"ce": cross_entropy(q, target, self.smoothing)}
        p = self.supernet.large(images)
        return {"ce": cross_entropy(p, target, self.smoothing), "kl": lam * kl_divergence(p, q, self.detach_teacher)}


def kernel_term(options: KernelOptions) -> KernelTerm:
    """The term that the options ask for."""
    assert options.eta_kc is not None and options.rho is not None
    return KernelTerm(options.eta_kc, options.rho)
