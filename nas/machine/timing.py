"""How long networks take, measured in turn in one process so that drift hits all alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Network = Callable[[Tensor], Any]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long what is inside took, under a name."""
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)


@torch.no_grad()
def count_macs(network: nn.Module, input_size: tuple[int, int, int], device: torch.device) -> int:
    """MACs of any network on one image of input_size (C, H, W), by torch's counter (2 per MAC)."""
    trained = [p for p in network.parameters() if p.requires_grad]
    network.requires_grad_(False)  # the counter cannot follow a block that reads a parameter, as CaiT's class token is
    try:
        # The counter of torch 2.11 does not know the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *input_size, device=device))
    finally:
        for p in trained:
            p.requires_grad_()
    return int(counter.get_total_flops()) // 2


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """Seconds of a call, from so many in a row: by the clock, on a GPU between two of its own events."""

    def by_clock(call: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def by_events(call: Callable[[], Any], calls: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(calls):
            call()
        last.record()
        torch.cuda.synchronize(device)
        return float(first.elapsed_time(last)) / 1e3 / calls

    return by_events if device.type == "cuda" else by_clock


@torch.no_grad()
def in_turn(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, shortest: float = 0.005
) -> dict[str, list[float]]:
    """Seconds of each call, round by round (A B C A B C ...), after two rounds that warm up.

    A sample lasts `shortest` seconds or longer.
    """
    watch = stopwatch(device)
    once = {name: min(watch(call, 1), watch(call, 1)) for name, call in calls.items()}
    repeats = {name: max(1, round(shortest / max(seconds, 1e-9))) for name, seconds in once.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(watch(call, repeats[name]))
    return found


@torch.no_grad()
def sample_times(
    networks: Mapping[str, Network],
    images: Tensor,
    autocast: Any,
    rounds: int = 15,
    seconds: float = 6.0,
    shortest: float = 0.02,
) -> dict[str, list[float]]:
    """Seconds per call of each network, in turn (A B C A B C ...): at least 5 rounds, then until `seconds` are over.

    images (B, C, H, W) are passed as they are. A sample lasts at least `shortest` seconds; 0: one call each, as
    latency percentiles need.
    """
    cuda = images.is_cuda

    def run(network: Network, repeats: int = 1) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            with autocast():
                network(images)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    once = {name: min(run(network), run(network)) for name, network in networks.items()}  # also the warm-up
    repeats = {name: max(1, int(shortest / t)) for name, t in once.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        for name, network in networks.items():
            times[name].append(run(network, repeats[name]))
        if done >= 4 and time.perf_counter() > deadline:
            break
    return times


def images_per_second(
    networks: Mapping[str, Network],
    input_size: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    autocast: Any,
    rounds: int = 15,
    seconds: float = 6.0,
) -> dict[str, float]:
    """Median throughput of each network on noise of input_size (C, H, W)."""
    images = torch.randn(batch_size, *input_size, device=device)
    times = sample_times(networks, images, autocast, rounds, seconds)
    return {name: batch_size / float(torch.tensor(ts).median()) for name, ts in times.items()}
