"""The options of what is minimised."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from nas.machine.ranges import at_least_one, flag, not_negative, share
from nas.networks.options import KeyValues
from search_spaces.errors import UserError


@dataclass(frozen=True)
class ObjectiveOptions:
    """What every objective takes."""

    smoothing: float | None = None
    """label smoothing"""
    detach_teacher: bool = False
    """stop the gradient of the KL term into the large network"""

    def check_objective(self) -> None:
        """Refuse values that no run can use."""
        share(self, "smoothing")


@dataclass(frozen=True)
class TeacherOptions:
    """A network to learn from."""

    teacher: str | None = None
    """any timm model with the dataset's classes (--train distill; a search under a teacher); by default the original
    network"""
    teacher_kwargs: KeyValues = ()
    """constructor arguments of --teacher"""
    teacher_checkpoint: Path | None = None
    """weights of the teacher"""
    distill: Literal["soft", "hard", "none"] | None = None
    """match the teacher's distribution, or its decision; by default soft, in a search from scratch none"""
    distill_weight: float | None = None
    """share of the loss that is the teacher's (0.5; in a search 0.1)"""
    distill_temperature: float = 1.0
    """divides both networks' logits in distillation"""
    distill_reduction: Literal["batchmean", "mean"] | None = None
    """of soft distillation: the divergence of an image's two distributions (batchmean, the default), or, as torch's
    mean has it, that divided by the number of classes"""

    def named(self) -> list[str]:
        """The flags given that name a teacher."""
        values = {
            "--teacher": self.teacher,
            "--teacher-kwargs": self.teacher_kwargs,
            "--teacher-checkpoint": self.teacher_checkpoint,
        }
        return [flag for flag, value in values.items() if value]

    def teacher_share(self) -> float:
        """The share of the loss that is the teacher's."""
        return 0.5 if self.distill_weight is None else self.distill_weight

    def over_classes(self) -> bool:
        """Whether soft distillation is divided by the number of classes."""
        return self.distill_reduction == "mean"

    def check_teacher(self) -> None:
        """Refuse a teacher that nothing learns from, and weights and temperatures that make no loss."""
        given = self.named()
        if given and self.distill == "none":
            raise UserError(f"{given[0]} names a teacher, --distill none has none")
        if self.teacher_kwargs and self.teacher is None:
            raise UserError("--teacher-kwargs are arguments of --teacher; name the model too")
        if not 0 < self.teacher_share() <= 1:
            raise UserError(f"--distill-weight {self.distill_weight}; expected a share above 0 and up to 1")
        if self.over_classes() and self.distill in ("hard", "none"):
            raise UserError(
                f"--distill-reduction mean is of soft distillation, --distill {self.distill} has none; drop one of them"
            )
        if self.distill_temperature <= 0:
            raise UserError(f"--distill-temperature {self.distill_temperature}; expected more than 0")


@dataclass(frozen=True)
class KernelOptions:
    """The kernel term: the truncated nuclear norm of the small network's pooled features (section 2.3)."""

    adjoined: bool | None = None
    """of the spaces with a kernel term: train large and small together (the default), or by --no-adjoined the small
    network alone"""
    eta_kc: float | None = None
    """weight of the kernel term, the truncated nuclear norm of the small network's pooled features"""
    rho: float | None = None
    """share of the features' spectrum that the kernel term leaves free"""

    def alone(self) -> bool:
        """Whether the small network is trained by itself."""
        return self.adjoined is False

    def check_kernel(self) -> None:
        """Refuse values that no run can use."""
        if self.eta_kc is not None and self.eta_kc < 0:
            raise UserError(f"--eta-kc {self.eta_kc}; expected 0 or more")
        if self.rho is not None and not 0 <= self.rho <= 1:
            raise UserError(f"--rho {self.rho}; expected a share of the spectrum, from 0 to 1")


@dataclass(frozen=True)
class AdjoinedOptions:
    """Adjoined training in stage 2, where a trained start asks for other than equation (3.4) (section 2.14)."""

    kl_schedule: Literal["thesis", "constant", "warm"] = "thesis"
    """of --train adjoined: lambda(t), the weight of the KL term: min(4 t^2, 1), 1 from the start, or up along a line
    over the first tenth of the run"""
    small_ce: float = 0.0
    """of --train adjoined: weight of a third term, the small network's own cross-entropy"""
    adjoined_teacher: Literal["current", "ema", "frozen"] = "current"
    """of --train adjoined: whom the small network follows: the large network as it is, the average of its weights, or
    the original network, frozen (or --teacher)"""

    def check_adjoined(self) -> None:
        """Refuse values that no run can use, and a gradient stopped where there is none."""
        not_negative(self, "small_ce")
        if self.adjoined_teacher != "current" and getattr(self, "detach_teacher", False):
            raise UserError(
                f"--detach-teacher stops a gradient into the teacher; --adjoined-teacher {self.adjoined_teacher} has"
                " none: drop one of them"
            )

    def adjoined_flag(self) -> str | None:
        """The first of these options that was given, as it is typed."""
        for field in fields(AdjoinedOptions):
            value = getattr(self, field.name)
            if value != field.default:
                return f"{flag(field.name)} {value}"
        return None


@dataclass(frozen=True)
class TokenOptions:
    """The small network's tokens after those of the original one (section 2.14)."""

    distill_features: float | None = None
    """weight of matching the original network's tokens in the channels that are kept: of --train features (1), of
    --train distill (0)"""
    distill_blocks: tuple[int, ...] = ()
    """blocks, counted from 0, after which tokens are matched besides the last one"""

    def check_tokens(self) -> None:
        """Refuse values that no run can use."""
        not_negative(self, "distill_features")
        if any(block < 0 for block in self.distill_blocks):
            raise UserError(f"--distill-blocks {min(self.distill_blocks)}; blocks are counted from 0")

    def tokens_flag(self) -> str | None:
        """The first of these options that was given, as it is typed."""
        given = [field.name for field in fields(TokenOptions) if getattr(self, field.name) not in (None, ())]
        return flag(given[0]) if given else None


@dataclass(frozen=True)
class LossOptions(KernelOptions, TeacherOptions, ObjectiveOptions):
    """All that an objective of either stage reads."""


@dataclass(frozen=True)
class MembersOptions:
    """Several small networks over one set of weights."""

    per_step: int | None = None
    """of the networks of a front: so many take part in a step, in turn, beside the large one (2)"""

    def check_members(self) -> None:
        """Refuse a step of none."""
        at_least_one(self, "per_step")


@dataclass(frozen=True)
class StageTwoOptions(MembersOptions, TokenOptions, AdjoinedOptions, LossOptions):
    """All that an objective of stage 2 reads."""
