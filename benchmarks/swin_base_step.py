"""One real DAN search step of Swin-B at 224 px, A = (1, 2, 4, 8): time and peak memory beside a plain step's.

    python benchmarks/swin_base_step.py --batch-size 2

Each kind of step runs in a process of its own, so that its peak resident memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def one(kind: str, width: str, batch_size: int) -> dict[str, float]:
    """Run three steps of one kind in this process; the last is timed."""
    import timm
    import torch

    from benchmarks.search_step import costs_of, steps
    from nas.searchers.gradient import Gradient
    from supernets.supernet import Supernet

    torch.manual_seed(0)
    supernet = Supernet(timm.create_model("swin_base_patch4_window7_224", num_classes=100, drop_path_rate=0.1))
    costs = costs_of("swin-dan", supernet, width, (1, 2, 4, 8))
    objective = Gradient(supernet, costs, budget=0.45, gamma=0.0, seed=0, total_steps=100).train()
    images, target = torch.randn(batch_size, 3, 224, 224), torch.randint(0, 100, (batch_size,))
    from contextlib import nullcontext

    step = steps({"search": objective}, images, target, nullcontext)[kind]
    for _ in range(2):
        step()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--kind", choices=["plain", "search"], help="run one kind here and print JSON")
    parser.add_argument("--width", choices=["stream", "inner"], default="stream")
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(one(args.kind, args.width, args.batch_size)))
        return
    print(f"Swin-B, 224 px, batch {args.batch_size}, float32; weights, gradients and AdamW's moments included")
    plain: dict[str, float] = {}
    for kind, width in (("plain", "stream"), ("search", "stream"), ("search", "inner")):
        command = [sys.executable, __file__, "--kind", kind, "--width", width, "--batch-size", str(args.batch_size)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        figures = json.loads(result.stdout.splitlines()[-1])
        plain = plain or figures
        name = kind if kind == "plain" else f"{kind}, {width} width"
        print(
            f"{name:22} {figures['seconds']:7.2f} s ({figures['seconds'] / plain['seconds']:.2f} plain)"
            f"  peak {figures['peak_mb']:7.0f} MB ({figures['peak_mb'] / plain['peak_mb']:.2f} plain)",
            flush=True,
        )


if __name__ == "__main__":
    main()
