"""How many of timm's pretrained plain transformers the toolkit takes, and what stands against the rest.

    python benchmarks/accepted.py
    python benchmarks/accepted.py --modules eva beit --names

Every pretrained name of the modules is built on the meta device, without weights, and handed to the supernet: once as
it was published, and once with a classifier where it has none, as a search on a data set with labels builds it.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm

from nas.networks.backbone import on_meta
from search_spaces.errors import UserError
from supernets.supernet import Supernet

MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "swin_transformer",
    "swin_transformer_v2",
    "naflexvit",
    "vision_transformer_relpos",
    "cait",
)
CLASSES = 1000


def refusal(name: str, num_classes: int) -> str:
    """The feature for which a model is refused, "" where it is taken."""
    try:
        with on_meta():
            model = timm.create_model(name, num_classes=num_classes)
        Supernet(model)
    except UserError as error:
        return str(error).partition(" is not ")[0].rpartition(": ")[2]
    return ""


def refusals(module: str) -> dict[str, tuple[str, str]]:
    """Of every pretrained name of a module, as it was published and with a classifier."""
    found: dict[str, tuple[str, str]] = {}
    known: dict[tuple[str, int], str] = {}  # pretrained weights of one architecture differ in nothing else
    for name in timm.list_models(pretrained=True, module=module):
        config = timm.get_pretrained_cfg(name)
        assert config is not None
        key = str(config.architecture), config.num_classes
        for classes in {config.num_classes, config.num_classes or CLASSES}:
            if (key[0], classes) not in known:
                known[key[0], classes] = refusal(name, classes)
        found[name] = known[key], known[key[0], config.num_classes or CLASSES]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MODULES, help="of timm.models")
    parser.add_argument("--names", action="store_true", help="print every refused name and why")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    total, reasons = Counter[str](), Counter[str]()
    print(f"{'module':<28}{'names':>6}{'taken':>7}{'with a classifier':>19}")
    for module in args.modules:
        found = refusals(module)
        taken = Counter(names=len(found), own=sum(not own for own, _ in found.values()))
        taken["classified"] = sum(not classified for _, classified in found.values())
        total += taken
        reasons.update(why for _, why in found.values() if why)
        print(f"{module:<28}{taken['names']:>6}{taken['own']:>7}{taken['classified']:>19}", flush=True)
        for name, (_, why) in found.items():
            if args.names and why:
                print(f"    {name}: {why}")
    print(f"{'all':<28}{total['names']:>6}{total['own']:>7}{total['classified']:>19}")
    print("\nrefused with a classifier, too, for")
    for why, number in reasons.most_common():
        print(f"{number:>6}  {why}")


if __name__ == "__main__":
    main()
