"""Take the compact network elsewhere: ONNX, a torch.export program, a model card, the Hugging Face Hub.

    python -m nas.export results/<run>
    python -m nas.export results/<run> --push-to-hub user/name

writes compact.onnx and compact.pt2 (both with a dynamic batch), compares both with PyTorch on random and on real
images, and measures PyTorch, torch.compile and onnxruntime, large against compact, in turn.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from search_spaces.errors import UserError

TOLERANCE = 1e-4  # of the largest logit
ONNX, PROGRAM, REPORT = "compact.onnx", "compact.pt2", "export.json"


def differences(network: Any, others: Mapping[str, Callable[[Any], Any]], batches: Mapping[str, Any]) -> dict[str, Any]:
    """{other: {batch: max |a - b| / max |a|}} of the logits."""
    import torch

    with torch.no_grad():
        expected = {name: network(images) for name, images in batches.items()}
        return {
            other: {
                name: float((run(images) - expected[name]).abs().max() / expected[name].abs().max())
                for name, images in batches.items()
            }
            for other, run in others.items()
        }


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def measure(
    runners: Mapping[str, Callable[[Any], Any]], size: tuple[int, ...], batch: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One row per runner ("compact, ONNX"): images/s by the median, latency p50 and p95 in ms."""
    import torch

    from nas.machine.timing import sample_times

    times = sample_times(runners, torch.randn(batch, *size), nullcontext, rounds, seconds, shortest=0.0)
    rows = []
    for name, seen in times.items():
        network, _, backend = name.partition(", ")
        rows.append(
            {
                "network": network,
                "backend": backend,
                "batch": batch,
                "images_per_s": batch / statistics.median(seen),
                "p50_ms": 1e3 * statistics.median(seen),
                "p95_ms": 1e3 * percentile(seen, 0.95),
                "calls": len(seen),
            }
        )
    return rows


def print_speeds(rows: list[dict[str, Any]], flops: float) -> None:
    """A line per batch, backend and network; behind the compact one its gain over the large."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"FLOPs, large over compact: {flops:.2f}", title_justify="left")
    for heading in ("batch", "backend", "network", "images/s", "p50 ms", "p95 ms", "gain", "/ FLOPs"):
        table.add_column(heading, justify="right")
    speeds = {(r["batch"], r["backend"], r["network"]): r["images_per_s"] for r in rows}
    for r in sorted(rows, key=lambda r: (r["batch"], r["backend"], r["network"] == "compact")):
        large = speeds.get((r["batch"], r["backend"], "large"))
        gain = None if large is None or r["network"] == "large" else r["images_per_s"] / large
        ratios = ["", ""] if gain is None else [f"{gain:.2f}", f"{gain / flops:.2f}"]
        numbers = f"{r['images_per_s']:,.1f}", f"{r['p50_ms']:.2f}", f"{r['p95_ms']:.2f}"
        table.add_row(str(r["batch"]), r["backend"], r["network"], *numbers, *ratios)
    Console().print(table)


def run_export(options: argparse.Namespace) -> dict[str, Any]:
    """Export, compare, measure, write export.json and the model card; returns what export.json holds."""
    import torch

    from nas.config import RetrainConfig
    from nas.machine.devices import pick_device
    from nas.machine.files import write_atomically, write_json
    from nas.machine.runtimes import check_packages, compiled, export_onnx, export_program, onnx_network
    from nas.prices.whole import clocked
    from nas.runs.card import write_card
    from nas.runs.opened import large_network, open_folder
    from nas.stages.reported import reported_images
    from nas.training.evaluate import COLUMNS

    if not options.run.is_dir():
        raise UserError(
            f"{options.run} is no folder; give the folder of a retrain, with arch.json and compact.safetensors"
        )
    if min(*options.batches, options.rounds) < 1:
        raise UserError("--batches and --rounds: expected at least 1")
    if options.onnx:
        check_packages(", or --no-onnx")
    device = pick_device(RetrainConfig(device="cpu", threads=options.threads))
    opened = open_folder(options.run, device)
    arch, compact = opened.arch, opened.compact
    if compact is None:
        raise UserError(f"{options.run} holds no compact.safetensors; cut the network out by retrain.py first")
    size = arch.input_size
    data = {"dataset": options.dataset, "data_dir": options.data_dir, "batch_size": 8, "workers": 0}
    real = next(iter(reported_images(opened, device, data).images))[0]
    example = torch.randn(2, *size)
    # Speed does not depend on the weights: a large network without any is measured at timm's initial ones.
    supernet = opened.supernet or large_network(arch, "cpu")
    large, ratio = supernet.backbone.eval(), supernet.flops() / arch.flops

    program = export_program(compact, example)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    write_atomically(options.run / PROGRAM, lambda path: path.write_bytes(stored.getvalue()))
    others: dict[str, Callable[[Any], Any]] = {PROGRAM: torch.export.load(options.run / PROGRAM).module()}
    networks = {"large": large, "compact": compact}
    runners: dict[str, Callable[[Any], Any]] = {f"{which}, PyTorch": n for which, n in networks.items()}
    with tempfile.TemporaryDirectory() as scratch:
        if options.onnx:
            export_onnx(program, options.run / ONNX)
            export_onnx(export_program(large, example), Path(scratch) / "large.onnx")
            for which, path in (("large", Path(scratch) / "large.onnx"), ("compact", options.run / ONNX)):
                runners[f"{which}, ONNX"] = onnx_network(path, torch.get_num_threads())
            others[ONNX] = runners["compact, ONNX"]
        found = differences(compact, others, {"random": torch.randn(3, *size), "random_one": example[:1], "real": real})
        for file, seen in found.items():
            worst = max(seen.values())
            print(f"{file}: within {worst:.1e} of PyTorch's largest logit, on {len(real)} real images too")
            if not worst <= TOLERANCE:
                (options.run / file).unlink()
                batch = max(seen, key=lambda name: seen[name])
                raise UserError(
                    f"{file} differs from PyTorch by {worst:.1e} of the largest logit on {batch} images, allowed"
                    f" {TOLERANCE:g}; the file was not kept" + ("; leave ONNX out by --no-onnx" if file == ONNX else "")
                )
        rows = []
        for batch in options.batches:
            if options.compile:
                for which, network in networks.items():
                    run = compiled(network, torch.randn(batch, *size))
                    if run is not None:
                        runners[f"{which}, compiled"] = run
            rows += measure(runners, size, batch, options.rounds, options.seconds)
    print_speeds(rows, ratio)
    clocks = clocked(arch, compact, ["compact"], "large")
    for which, row in clocks.items():
        print(f"{which}: {', '.join(f'{COLUMNS[name]} {value:.4g}' for name, value in row.items())}")
    result = {
        "latency": clocks,
        "differences": found,
        "real_images": len(real),
        "flops_ratio": ratio,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "speed": rows,
    }
    write_json(options.run / REPORT, result)
    card = write_card(opened.folder, arch)
    print(f"{options.run}: {', '.join(others)}, {REPORT}, {card.name}")
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nas.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, help="a retrain's folder, or any with arch.json and compact.safetensors")
    add("--dataset", help="of the real images; default: the run's own")
    add("--data-dir", type=Path)
    add("--batches", type=int, nargs="+", default=[1, 32], help="batch sizes to measure")
    add("--rounds", type=int, default=50, help="calls of each network, at most")
    add("--seconds", type=float, default=30.0, help="per batch size, after five calls of each")
    add("--threads", type=int)
    add("--no-onnx", dest="onnx", action="store_false", help="only the torch.export program")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out, which takes minutes")
    add("--push-to-hub", metavar="USER/NAME", help="upload the folder's results to the Hugging Face Hub")
    add("--private", action="store_true", help="create the repository as a private one")
    add("--push-only", action="store_true", help="with --push-to-hub: no export, only the card and the upload")
    return parser


def main() -> None:
    from nas.failing import errors

    command = parser()
    options = command.parse_args()
    with errors(command.prog):
        if options.push_only and not options.push_to_hub:
            raise UserError("--push-only goes with --push-to-hub USER/NAME")
        if not options.push_only:
            run_export(options)
        if options.push_to_hub:
            from nas.runs.card import push_to_hub

            print(push_to_hub(options.run, options.push_to_hub, options.private))


if __name__ == "__main__":
    main()
