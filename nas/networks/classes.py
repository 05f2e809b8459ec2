"""How many classes a network is to tell apart; 0: it has no classifier, and its pooled features are its output."""

from dataclasses import dataclass
from typing import Any

import timm

from nas.networks.backbone import Start, TimmModel, build, check_model_name, classifier_names, on_meta
from nas.networks.weights import load_weights
from search_spaces.errors import UserError

FEATURES = "no classifier: the network's output are its pooled features"


@dataclass(frozen=True)
class Outputs:
    """classes: of the network. labels: whether the images have some, which may be read. line: what is to be said."""

    classes: int
    labels: bool = True
    line: str = ""

    def lacks(self) -> str:
        """What stands against learning from labels, in words; empty for nothing."""
        if not self.labels:
            return "these images have none" if self.classes else "these images have none, and the network no classifier"
        return "" if self.classes else "the network has no classifier"

    def lines(self) -> tuple[str, ...]:
        """What is to be said of a network without classifier."""
        return (self.line,) if self.line else ()


def outputs_of(asked: int | None, labelled: int, model: TimmModel, start: Start, as_it_is: bool) -> Outputs:
    """What a network gives that is started anew.

    asked: --num-classes. labelled: classes of the images' labels, 0 without. as_it_is: whether the weights are taken as
    they are, so that a classifier which they lack would know nothing. UserError where nothing says how many classes.
    """
    labels = labelled > 0
    if asked == 0:
        return Outputs(0, labels, FEATURES)
    if asked is not None:
        return Outputs(asked, labels)
    if labels and not as_it_is:
        return Outputs(labelled)
    held = classes_held(model, start)
    if labels:
        if held == 0:
            words = (
                f"{model.name} comes without classifier: its output are its pooled features, and labels only measure"
            )
            return Outputs(0, True, f"{words} them (for a new classifier say --num-classes {labelled}, and train it)")
        return Outputs(labelled)
    if held is None:
        raise UserError("images without labels teach no network from scratch; give --checkpoint or --pretrained")
    return Outputs(held, False, "" if held else f"{model.name} has no classifier: its output are its pooled features")


def classes_held(model: TimmModel, start: Start) -> int | None:
    """Of the classifier that weights hold, 0 where they hold none; None where there are no weights yet."""
    if model.cut is not None:
        return model.cut.num_classes
    if start.checkpoint is not None:
        state = load_weights(start.checkpoint)
        with on_meta():
            backbone: Any = build(model.name, model.kwargs)
        names = [f"{name}.weight" for name in (*classifier_names(backbone), "head", "head.fc", "fc", "classifier")]
        return next((len(state[name]) for name in names if name in state), 0)
    if not start.pretrained:
        return None
    check_model_name(model.name)
    config = timm.get_pretrained_cfg(model.name)
    return None if config is None else int(config.num_classes)
