"""The network as it was before a run: what the result is set beside where the run trains no large network."""

from nas.machine.timing import Network
from nas.networks.backbone import Start, TimmModel, starting_backbone
from nas.training.prepared import Prepared

LARGE_NETWORK, ORIGINAL_NETWORK = "large", "original"  # trained in this run; as it was before
PREVIOUS_NETWORK = "previous"  # in the original's place where that is the compact network of an earlier round


def as_it_was(model: TimmModel) -> str:
    """What the large network is called as it was before the run."""
    return ORIGINAL_NETWORK if model.cut is None else PREVIOUS_NETWORK


def untouched(prepared: Prepared, start: Start) -> Network | None:
    """The large network at its weights before the run, loaded again; None where they know nothing of the classes."""
    if not start.given():
        return None
    model, names = prepared.model, prepared.splits.class_names
    backbone, _, fresh = starting_backbone(model.name, model.kwargs, prepared.num_classes, start, names, cut=model.cut)
    return None if fresh else backbone.to(prepared.device).eval().requires_grad_(False)
