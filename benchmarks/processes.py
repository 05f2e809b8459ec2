"""DAN's search step by one process and by several: throughput per process, and the share that is communication.

    python benchmarks/processes.py --processes 2 --batch-size 4

Every process has one thread and the same batch. Three kinds of step: one process alone; all of them without
exchanging gradients (they still share memory bandwidth and caches); all of them exchanging. Swin-B's widths with
few blocks, 224 px, gloo.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.multiprocessing as mp

from benchmarks.search_step import objectives
from nas.machine import distributed
from nas.training.objective import Step
from nas.training.updates import synchronised


def seconds(module: Any, objective: Any, batch_size: int, rounds: int, exchange: bool) -> list[float]:
    """Seconds of search steps, the first left out."""
    optimizer = torch.optim.AdamW(objective.supernet.backbone.parameters(), lr=1e-5, fused=True)
    arch = torch.optim.Adam(objective.architecture_parameters(), lr=1e-3)
    images = torch.randn(batch_size, *objective.supernet.adapter.input_size)
    target = torch.randint(0, 10, (batch_size,))
    times = []
    for number in range(rounds + 1):
        distributed.barrier()
        start = time.perf_counter()
        with synchronised(module, last=exchange):
            terms = module(images, target, Step(0.5, number, 100))
            torch.stack([v.float() for v in terms.values()]).sum().backward()
        optimizer.step()
        arch.step()
        objective.zero_grad()
        times.append(time.perf_counter() - start)
    return times[1:]


def work(rank: int, processes: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """One process of `processes`."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    device = torch.device("cpu")
    objective = objectives(args.net, args.width, 224)[0]["search"].train()
    with distributed.joined(device):
        module = distributed.parallel(objective, device, unused_parameters=False)
        times = {}
        for exchange in (True, False) if processes > 1 else (True,):
            times[exchange] = seconds(module, objective, args.batch_size, args.rounds, exchange)
        everybody = distributed.gather(times)
    if rank == 0:
        results.put({e: statistics.median(t for one in everybody for t in one[e]) for e in times})


def run(processes: int, args: argparse.Namespace) -> dict[bool, float]:
    """Median seconds of a step, by whether gradients are exchanged."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (processes, port, args, results), nprocs=processes)  # type: ignore[attr-defined]
    found: dict[bool, float] = results.get()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="swin", choices=["swin", "vit", "nano"])
    parser.add_argument("--width", default="stream", choices=["stream", "inner"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="of each process")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    alone = run(1, args)[True]
    several = run(args.processes, args)
    print(f"{args.net}, {args.width}, batch {args.batch_size} a process, one thread each, float32, {torch.__version__}")
    print(f"one process alone: {args.batch_size / alone:.2f} images/s")
    for exchange, words in ((False, "not exchanging"), (True, "exchanging gradients")):
        speed = args.batch_size / several[exchange]
        share = alone / several[exchange]
        print(f"{args.processes} processes, {words}: {speed:.2f} images/s each, {share:.2f} of one alone")
    print(f"communication: {1 - several[False] / several[True]:.1%} of a step")


if __name__ == "__main__":
    main()
