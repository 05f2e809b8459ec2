"""What is to be done to the network before it trains, known before any weight is loaded (section 2.7)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nas.training.options import TrainingOptions
from search_spaces.errors import UserError
from supernets.streams import fixed_streams
from supernets.supernet import Supernet

DECIDING = 1024  # training images that decide between candidates
BasisKind = Literal["rotate", "order", "none"]


@dataclass(frozen=True)
class BasisPlan:
    """kind: what becomes of the network. streams: the stages whose stream is rotated. lines: what is worth saying.

    inside: whether q, k and v are changed inside the heads, where that is exact. weighed: whether it is to be found,
    too, what is lost with fewer units. deciding: of the training images in the order of calibration, so many decide
    between candidates, the first; images: how many the others are. labels: whether the images' labels may be read.
    refits: whether what is cut is refitted, a candidate too.
    """

    kind: BasisKind = "none"
    streams: tuple[int, ...] = ()
    lines: tuple[str, ...] = ()
    inside: bool = False
    weighed: bool = False
    deciding: int = 0
    images: int = 0
    labels: bool = True
    refits: bool = False


@dataclass(frozen=True)
class Facts:
    """What a plan depends on besides the options. trained: whether the weights are. images: to train on.

    narrowed: the stages of whose stream some block leaves a channel out; inside: whether some block leaves channels of
    its heads out. rotates: whether the method allows a rotation; refits: whether candidates are refitted and measured,
    on images of their own; measures: whether they are measured without. fixed: stages that may not be rotated, and why,
    beside those of which the network itself says so.
    """

    trained: bool
    images: int
    narrowed: Collection[int]
    inside: bool = False
    rotates: bool = True
    refits: bool = False
    measures: bool = False
    fixed: Mapping[int, str] = field(default_factory=dict)

    def parts(self) -> tuple[int, int]:
        """As of `parts_of`."""
        return parts_of(self.images, self.refits or self.measures)


def parts_of(images: int, decided: bool) -> tuple[int, int]:
    """How many training images decide between candidates, where any do, and how many calibrate and refit."""
    deciding = min(DECIDING, images // 4) if decided else 0
    return deciding, images - deciding


def plan_basis(options: TrainingOptions, backbone: Supernet, facts: Facts) -> BasisPlan:
    """--basis and --importance, or what becomes of a start of this kind. UserError when they contradict each other."""
    kind, importance = options.basis, options.importance
    if kind == "rotate" and not facts.rotates:
        raise UserError("--basis rotate: this method scores its own units; leave it out, or take --basis order or none")
    if kind == "none" and importance not in (None, "none"):
        raise UserError(
            f"--importance {importance} orders the network, --basis none leaves it as it is; drop one of them"
        )
    if kind == "order" and importance == "none":
        raise UserError("--basis order needs an order; --importance none has none: drop one of them")
    if kind is None:
        if facts.trained and facts.rotates and importance != "none":
            kind = "rotate"
        else:
            kind = "none" if importance in (None, "none") else "order"
    if kind != "rotate":
        deciding, images = facts.parts()
        # without a classifier the order is part of the basis, lest the features of the large network come in that order
        weighed = (facts.refits or backbone.adapter.feature_head is not None) and kind != "none"
        return BasisPlan(kind, weighed=weighed, deciding=deciding, images=images)
    return _rotation(options, backbone, facts)


def _rotation(options: TrainingOptions, backbone: Supernet, facts: Facts) -> BasisPlan:
    fixed, lines, streams = fixed_streams(backbone.adapter) | dict(facts.fixed), [], []
    deciding, left = facts.parts()
    assert options.calibration_images is not None
    images = min(options.calibration_images, left)
    sizes = {shape.stage: shape.embed_dim for shape in backbone.shapes}
    for stage in sorted(facts.narrowed):
        if stage in fixed:
            lines.append(f"stage {stage} is ordered, not rotated: {fixed[stage]}")
        elif images < sizes[stage]:
            lines.append(
                f"stage {stage} is ordered, not rotated: {images} images for {sizes[stage]} channels;"
                " give more, or a higher --calibration-images"
            )
        else:
            streams.append(stage)
    if not facts.narrowed and not facts.inside:
        lines.append(
            "nothing is rotated: no candidate leaves a channel of the stream out; heads and neurons are ordered"
        )
    kind: BasisKind = "rotate" if streams or facts.inside else "none" if options.importance == "none" else "order"
    return BasisPlan(kind, tuple(streams), tuple(lines), facts.inside, facts.refits, deciding, left)
