"""AN's training: one factor for the whole network, which nothing is searched for (section 2.1)."""

from nas.methods.method import MethodTraining


class ANTraining(MethodTraining):
    """The factor is given, or follows from the budget."""

    searchers = ("uniform",)
