"""What the parts of a dataset are called: in lines, tables, pictures and summaries alike."""

HELD_OUT = "held-out training images"


def trained_before(pretrained: bool | None, checkpoint: object) -> str | None:
    """The weights that a run starts from and that were trained before; None where they are drawn."""
    return "checkpoint" if checkpoint is not None else "pretrained weights" if pretrained else None


def held_out_words(seen_by: str | None) -> str:
    """The images that decisions are taken on. seen_by: weights that may have been trained on them before."""
    return HELD_OUT if seen_by is None else f"{HELD_OUT}, perhaps seen by the {seen_by}"


def reported_words(split: str | None) -> str:
    """The images that results are reported on, by the split's own name; None: a part that was set aside for it."""
    if split is None:
        return "test fifth"
    return "validation split" if split in ("val", "valid", "validation") else f"{split} split"
