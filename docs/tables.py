"""Write the tables of docs/numbers.md and docs/options.md from the code.

    python docs/tables.py

Parameters and FLOPs are computed on the meta device, without weights, in seconds; options come from the
dataclasses that nas/config.py composes, the only list there is. A test compares the pages with this script.
"""

import csv
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

from nas.cli import option_words  # noqa: E402
from nas.config import Common, RetrainConfig, SearchConfig  # noqa: E402
from nas.networks.options import KeyValues  # noqa: E402
from nas.sweeps.options import SweepConfig  # noqa: E402
from search_spaces.method import Settings  # noqa: E402
from search_spaces.registry import METHODS, SPACES  # noqa: E402
from search_spaces.slices import network_slice  # noqa: E402
from search_spaces.space import block_slices  # noqa: E402

# name, timm model, alpha, its row of results/published.csv
NETWORKS = (
    ("Swin-B", "swin_base_patch4_window7_224", (2, 4), {1: "Swin-B", 4: "Swin-B-AN-Small-4"}),
    ("ViT-B/16", "vit_base_patch16_224", (2, 3), {}),
    ("DeiT-S", "deit_small_patch16_224", (2, 3), {1: "DeiT-Small"}),
    ("T2T-ViT-14", "t2t_vit_14", (2, 3), {1: "T2T-ViT-14", 2: "T2T-ViT-AN-Small-2"}),
)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A markdown table; the columns in `right` are aligned right."""
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), rule, *map(list, rows)])


def numbers() -> str:
    """Parameters and FLOPs of AN at every alpha and width, beside the published figures."""
    import timm
    import torch

    from supernets import t2t_vit  # noqa: F401  registers T2T-ViT with timm
    from supernets.supernet import Supernet

    with open(ROOT / "results" / "published.csv") as file:
        published = {row["network"]: row for row in csv.DictReader(file)}
    rows = []
    for name, model, alphas, sources in NETWORKS:
        with torch.device("meta"):
            supernet = Supernet(timm.create_model(model))
        for alpha in (1, *alphas):
            for width in ("–",) if alpha == 1 else ("stream", "inner"):
                settings = Settings("stream" if alpha == 1 else width)
                picks = [{"alpha": alpha}] * len(supernet.shapes)
                subnet = network_slice(
                    supernet.shapes, block_slices(name, METHODS["an"], settings, supernet.shapes, picks)
                )
                params, flops = supernet.params(subnet), supernet.flops(subnet)
                source = published.get(sources.get(alpha, ""))
                figures = ["", "", ""] if source is None else [source["params_m"], source["gflops"], source["source"]]
                rows.append(
                    [
                        name,
                        str(alpha),
                        width,
                        f"{params / 1e6:.2f}",
                        f"{flops / 1e9:.2f}",
                        f"{supernet.params() / params:.2f}",
                        f"{supernet.flops() / flops:.2f}",
                        *figures,
                    ]
                )
    head = ["network", "α", "width", "M", "GFLOPs", "÷ M", "÷ GFLOPs", "published M", "published GFLOPs", "source"]
    return markdown(head, rows, right=(1, 3, 4, 5, 6, 7, 8))


def t2t_sum() -> str:
    """How the MACs of T2T-ViT-14 add up."""
    import timm
    import torch

    from supernets import t2t_vit  # noqa: F401  registers T2T-ViT with timm
    from supernets.flops import block_flops
    from supernets.supernet import Supernet

    with torch.device("meta"):
        supernet = Supernet(timm.create_model("t2t_vit_14"))
    kept, costs = supernet.identity(), supernet.adapter.costs
    per, width = costs.flops, kept.stage_widths[0]
    blocks = [block_flops(*block) for block in zip(supernet.shapes, costs.blocks, kept.blocks, strict=True)]
    parts = [
        ("tokens before `project`: three soft splits, two Performer layers", per.constant),
        (f"`project`, {costs.blocks[0].attn_tokens - 1} tokens", per.first * width),
        (f"{len(blocks)} blocks × {blocks[0] / 1e6:.3f} M", sum(blocks)),
        ("classifier, 1000 classes", per.last * width),
    ]
    total = sum(macs for _, macs in parts)
    assert len(set(blocks)) == 1 and total == supernet.flops()
    return markdown(["part", "MACs (M)"], [[p, f"{m / 1e6:.3f}"] for p, m in [*parts, ("**sum**", total)]], right=(1,))


def values_of(field: Field[Any]) -> str:
    """What an option takes, in words."""
    kind = field.type
    if kind is KeyValues:
        return "KEY=VALUE …"
    kinds = [k for k in get_args(kind) if k is not type(None)] if type(None) in get_args(kind) else [kind]
    if get_origin(kinds[0]) is tuple:
        args = get_args(kinds[0])
        return " ".join([args[0].__name__] * (1 if args[-1] is ... else len(args))) + (" …" if args[-1] is ... else "")
    if get_origin(kinds[0]) is not None:  # Literal
        return ", ".join(map(str, get_args(kinds[0])))
    return {"bool": "flag", "Path": "path"}.get(kinds[0].__name__, kinds[0].__name__)


def options(cls: type, without: type | None = None) -> str:
    """The options of a dataclass, but for those of another that it adds to."""
    left_out = set() if without is None else {field.name for field in fields(without)}
    text = option_words(cls)
    rows = []
    for field in fields(cls):
        if field.name in left_out or tyro.conf.Suppress in get_args(field.type):  # written by the run, not an option
            continue
        flag = "--" + field.name.replace("_", "-")
        assert field.default is not MISSING
        default = "" if field.default in (None, "", ()) else f"`{field.default}`"
        words = text[field.name].replace("|", "\\|").replace("<", "\\<")
        rows.append([f"`{flag}`", values_of(field), default, words])
    return markdown(["option", "value", "default", ""], rows)


def space_defaults() -> str:
    """What the spaces fill in for options that were left open: a column for all spaces with the same defaults."""
    groups: dict[str, list[str]] = {}
    for space in SPACES.values():
        groups.setdefault(repr((space.training, space.search, space.retrain)), []).append(space.name)
    rows: dict[str, list[str]] = {}
    for i, (name, *_) in enumerate(groups.values()):
        space = SPACES[name]
        for stage, values in (("", space.training), (" (search)", space.search), (" (retrain)", space.retrain)):
            for option, value in values.items():
                row = rows.setdefault(f"`--{option.replace('_', '-')}`{stage}", [""] * len(groups))
                row[i] = "none" if value is None else f"`{value}`"
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(groups)]
    legend = [f"* {letter}: {', '.join(names)}" for letter, names in zip(letters, groups.values(), strict=True)]
    table = markdown(["option", *letters], [[name, *row] for name, row in rows.items()])
    return "\n".join([*legend, "", table])


def published_recipes() -> str:
    """What --recipe published sets: an option's values for the spaces whose runs are known."""
    from nas.methods.recipe import published
    from search_spaces.defaults import SCALE

    names = ("swin-an", "swin-dan", "t2t-dan", "vit-kcr", "deit-uvc")
    rows: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        tables = {stage: published(SPACES[name], stage) for stage in ("search", "retrain")}
        both = {o for o, v in tables["search"].items() if tables["retrain"].get(o, tables) == v}
        for stage, table in tables.items():
            for option, value in table.items():
                words = "" if option in both else f" ({stage})"
                mark = "*" if option in SCALE else ""
                cell = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                rows.setdefault(f"`--{option.replace('_', '-')}`{mark}{words}", [""] * len(names))[i] = f"`{cell}`"
    return markdown(["option", *names], [[option, *rows[option]] for option in sorted(rows)])


def sections() -> dict[str, dict[str, str]]:
    """Page -> section -> its text."""
    return {
        "numbers.md": {"an": numbers(), "t2t": t2t_sum()},
        "fidelity.md": {"published": published_recipes()},
        "options.md": {
            "both": options(Common),
            "search": options(SearchConfig, Common),
            "sweep": options(SweepConfig, SearchConfig),
            "retrain": options(RetrainConfig, Common),
            "spaces": space_defaults(),
        },
    }


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with the text between `<!-- name -->` and `<!-- /name -->` replaced."""
    for name, text in parts.items():
        page, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL
        )
        assert found == 1, f"{found} sections {name}"
    return page


if __name__ == "__main__":
    for page, parts in sections().items():
        path = ROOT / "docs" / page
        path.write_text(filled(path.read_text(), parts))
        print("\n\n".join(parts.values()), end="\n\n")
