"""UVC's training: pruning, skipping and distillation under a budget, by minimax (section 2.5)."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from nas.methods.method import MethodTraining, search_arguments
from nas.objectives.distill import distilled_terms, per_class
from nas.objectives.options import TeacherOptions
from nas.objectives.teacher import Teacher, make_teacher
from nas.searchers.minimax import Loss, Minimax
from nas.searchers.options import GateOptions, MinimaxOptions, SearchOptions
from nas.searchers.primal_dual import Rules
from nas.searchers.searcher import Question
from nas.training.losses import cross_entropy
from nas.training.prepared import Prepared
from search_spaces.errors import UserError
from search_spaces.registry import Space


class UVCTraining(MethodTraining):
    """Its search learns from the original network."""

    searchers = ("minimax",)
    rotates = False  # its own scores say which units go
    options = (GateOptions, MinimaxOptions, TeacherOptions)
    recorded = (
        "prune", "skip", "gate_average", "gate_flops", "damping", "reference_steps", "distill", "distill_weight",
        "distill_temperature", "distill_reduction", "teacher", "warmup_epochs",
    )  # fmt: skip

    def check(self, options: SearchOptions, space: Space) -> None:
        if not options.budget and not options.limits():
            raise UserError(f"{space.name} compresses to a budget; give --budget or --gflops")
        if options.alphas is not None:
            raise UserError(f"--alphas: {space.name} has no compression factor; it counts heads, channels and neurons")
        if options.width != "stream":
            raise UserError(
                f"--width {options.width}: {space.name} keeps the whole stream in every block; leave it out"
            )
        if options.gamma is not None:
            raise UserError(f"--gamma prices FLOPs where there is no budget; {space.name} always has one")
        if options.skip == "none" and options.arch_data == "val":
            raise UserError("--arch-data val trains gates; --skip none has none")
        if options.skip == "none" and (options.gate_average or options.gate_flops):
            name = "--gate-average" if options.gate_average else "--gate-flops"
            raise UserError(f"{name} is about gates; --skip none has none")

    def resolved(self, options: SearchOptions, prepared: Prepared) -> Mapping[str, Any]:
        return {"distill": distillation(options, prepared)}

    def objective(self, options: SearchOptions, question: Question, prepared: Prepared) -> Minimax:
        arguments = search_arguments(options, question, prepared)
        epochs = options.total_epochs()
        warmup = min(options.warmup_epochs or 0, epochs - 1) * (arguments["total_steps"] // epochs)
        teacher = None
        if options.distill != "none":
            teacher = make_teacher(options, prepared, prepared.start, f"--distill {options.distill}")
        loss = make_loss(options, teacher)
        kinds: dict[str, Any] = {"loss": loss, "skip": options.skip, "prune": options.prune, "warmup_steps": warmup}
        kinds["rules"] = Rules.of(options)
        return Minimax(prepared.supernet, question.priced, **kinds, **arguments)

    def remarks(self, found: Mapping[str, Any]) -> str:
        return "removed by " + ", ".join(f"{name} {share:.1%}" for name, share in found["removed"].items())


def distillation(options: TeacherOptions, prepared: Prepared) -> Literal["soft", "hard", "none"]:
    """--distill, by default soft where there is a teacher: one that was named, or a trained original network."""
    if options.distill is not None:
        return options.distill
    named = options.teacher is not None or options.teacher_checkpoint is not None
    if named or (prepared.start.given() and not prepared.fresh_classifier):
        return "soft"
    print("no teacher: the original network was not trained for these classes; --teacher-checkpoint gives another")
    return "none"


def make_loss(options: SearchOptions, teacher: Teacher | None) -> Loss:
    """L_distill of a search: (1 - w) CE(q) + w D(teacher, q), or CE(q) without a teacher."""
    smoothing = options.smoothing or 0.0

    def loss(images: Tensor, q: Tensor, target: Tensor) -> dict[str, Tensor]:
        if teacher is None:
            return {"ce": cross_entropy(q, target, smoothing)}
        hard, weight = options.distill == "hard", options.teacher_share()
        terms = distilled_terms(teacher(images), q, target, hard, weight, options.distill_temperature, smoothing)
        return per_class(terms, q) if options.over_classes() and not hard else terms

    return loss
