"""What finding and applying a basis costs: seconds of each part and peak memory, at random weights.

    python benchmarks/basis.py                          # ViT-B's widths, 224 px, 256 images: minutes on two cores
    python benchmarks/basis.py --model swin_base_patch4_window7_224

The images are noise: their number and size is what costs, not what they show.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch

from supernets.basis import rewrite, timm_state
from supernets.calibration import Wanted, calibrate
from supernets.supernet import Supernet


def peak() -> float:
    """Of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    supernet = Supernet(timm.create_model(options.model)).eval()
    stages = frozenset(shape.stage for shape in supernet.shapes)
    batches = [
        torch.randn(min(options.batch_size, options.images - i), *supernet.adapter.input_size)
        for i in range(0, options.images, options.batch_size)
    ]
    started = time.perf_counter()
    with torch.no_grad():
        supernet.large(batches[0])
    print(f"{options.model}, {options.images} images, {torch.get_num_threads()} threads")
    words = f"forward pass of {len(batches[0])} images alone"
    print(f"{words:<44} {time.perf_counter() - started:7.1f} s  peak {peak():5.2f} GiB")
    found = None
    for words, wanted in (
        ("stream", Wanted(stages)),
        ("stream, q/k, v, heads and neurons by error", Wanted(stages, inside=True, error_order=True)),
    ):
        started = time.perf_counter()
        found = calibrate(supernet, batches, wanted)
        print(f"{words:<44} {time.perf_counter() - started:7.1f} s  peak {peak():5.2f} GiB", flush=True)
    assert found is not None
    with torch.no_grad():
        before = supernet.large(batches[0][:4])
        started = time.perf_counter()
        rewrite(supernet, found)
        print(f"{'applied':<44} {time.perf_counter() - started:7.1f} s  peak {peak():5.2f} GiB")
        started = time.perf_counter()
        timm_state(supernet)
        print(f"{'taken back':<44} {time.perf_counter() - started:7.1f} s  peak {peak():5.2f} GiB")
        after = supernet.large(batches[0][:4])
    print(f"logits changed by {float((after - before).abs().max() / before.abs().max()):.1e} of the largest, float32")


if __name__ == "__main__":
    main()
