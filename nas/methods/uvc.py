"""UVC's options: what they mean for the loss, and which are refused."""

from torch import Tensor

from nas.config import SearchConfig
from nas.objectives.distill import distill_weight, distilled_terms
from nas.objectives.teacher import Teacher
from nas.prices.costs import SpaceCosts
from nas.prices.selection import Candidate, SelectionProblem, check_budget
from nas.searchers.minimax import Loss, unit_prices
from nas.training.losses import cross_entropy
from search_spaces.errors import UserError
from search_spaces.registry import Space


def make_loss(config: SearchConfig, teacher: Teacher | None, smoothing: float) -> Loss:
    """L_distill of a search: (1 - w) CE(q) + w D(teacher, q), or CE(q) without a teacher."""

    def loss(images: Tensor, q: Tensor, target: Tensor) -> dict[str, Tensor]:
        if teacher is None:
            return {"ce": cross_entropy(q, target, smoothing)}
        hard, weight = config.distill == "hard", distill_weight(config)
        return distilled_terms(teacher(images), q, target, hard, weight, config.distill_temperature, smoothing)

    return loss


def check_uvc_options(config: SearchConfig, space: Space) -> None:
    """Refuse options of UVC's search that the space does not have, and those that UVC has no use for."""
    uvc = space.method.name == "uvc"
    if not uvc:
        for given, flag in ((not config.prune, "--no-prune"), (config.skip != "block", f"--skip {config.skip}")):
            if given:
                raise UserError(f"{flag} goes with method uvc; the space is {space.name}")
        return
    if not config.budget and config.gflops is None:
        raise UserError(f"{space.name} compresses to a budget; give --budget or --gflops")
    if config.alphas is not None:
        raise UserError(f"--alphas: {space.name} has no compression factor; it counts heads, channels and neurons")
    if config.width != "stream":
        raise UserError(f"--width {config.width}: {space.name} keeps the whole stream in every block; leave it out")
    if config.gamma is not None:
        raise UserError("--gamma prices FLOPs where there is no budget; method uvc always has one")
    if config.arch_data == "val" and config.skip == "none":
        raise UserError("--arch-data val trains gates; --skip none has none")


def check_reach(costs: SpaceCosts, budget: float, skip: str, prune: bool) -> None:
    """Refuse a budget below what the mechanisms asked for can reach."""
    blocks = []
    for shape, block in zip(costs.space.shapes, costs.network.blocks, strict=True):
        price = unit_prices(shape, block)
        units = prune or skip == "none"
        attn = price.channel * (price.head_dim + 1) if units else price.attn
        mlp = price.neuron if units else price.mlp
        least = attn * (skip not in ("block", "attention", "halves")) + mlp * (skip not in ("block", "mlp", "halves"))
        ends = (price.attn + price.mlp, least)
        blocks.append(tuple(Candidate(macs, shape.embed_dim, 0.0) for macs in ends))
    whole = costs.uniform()
    problem = SelectionProblem(
        tuple(blocks), whole.stages, whole.constant, whole.stem_per_channel, whole.merge_per_pair,
        whole.head_per_channel, whole.fixed_widths,
    )  # fmt: skip
    check_budget(problem, costs.full_flops, budget)
