"""Choosing how many units of a block stay, naming which, and skipping its halves (section 2.5)."""

KEPT_V, KEPT_HIDDEN = "kept_v", "kept_hidden"  # the indices' names in a block's entry of arch.json
SKIPS = {"block": 1, "attention": 1, "mlp": 1, "halves": 2, "none": 0}  # what gates skip -> gates of a block
