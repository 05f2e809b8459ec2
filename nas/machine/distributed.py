"""Several processes on one or several machines, under torchrun: who am I, and what all of us have to agree on.

Every process holds the whole supernet and its share of each batch (data parallel). Gumbel draws come from
(seed, step) and are the same everywhere; gradients, loss terms, counts and second moments are reduced, so every
process takes the same step. Process 0 alone writes and prints. Without torchrun every function here does nothing.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nas.machine.launch import launched
from search_spaces.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for a process that is alive but slow; torchrun itself notices one that died


def rank() -> int:
    """This process's number, 0 for the one that writes; known before the group is joined."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", "0")) if launched() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _joined() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """The accelerator of this process: a bare `cuda` becomes the one of its number on its machine."""
    if device.type == "cuda" and device.index is None and launched():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {device.index + 1} of this machine has no device of its own:"
                f" {torch.cuda.device_count()} there; lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group: NCCL for tensors on CUDA, gloo for others."""
    if not launched() or _joined():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if _joined():
        for t in tensors:
            dist.all_reduce(t)


def mean_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients that DistributedDataParallel does not see (torch.autograd.grad). None stays None."""
    if _joined():
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def share_of_batch(n: int, device: torch.device) -> Tensor | None:
    """n * processes / images of all processes: the weight with which a mean over processes of means over their n
    images becomes the mean over all images: one where every process has as many. None when alone.
    """
    if not _joined():
        return None
    total = torch.tensor(float(n), device=device)
    dist.all_reduce(total)
    return n * dist.get_world_size() / total


def mean_values(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Means over the processes, all of which hold the same names."""
    if not _joined():
        return dict(values)
    t = torch.tensor(list(values.values()), dtype=torch.float64 if device.type == "cpu" else torch.float32).to(device)
    dist.all_reduce(t)
    return dict(zip(values, (t / dist.get_world_size()).tolist(), strict=True))


def highest(value: int) -> int:
    """The largest of everybody's values, by way of the CPUs: no accelerator is waited for."""
    if not _joined():
        return value
    t = torch.tensor(value)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return int(t)


def gather(value: T) -> list[T]:
    """Everybody's value, by rank. Small things only: they are pickled between processes of one job."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """Let process 0 do something and give its result to all; its UserError is everybody's. Small results only."""
    if not _joined():
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def barrier() -> None:
    """Wait for everybody."""
    if _joined():
        dist.barrier()


def parallel(module: torch.nn.Module, device: torch.device, unused_parameters: bool) -> torch.nn.Module:
    """The module under DistributedDataParallel, which averages gradients once per step; itself when alone.

    unused_parameters: whether some weights may take no part in a step.
    """
    if not _joined():
        return module
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15's new name for broadcast_buffers is not in 2.11
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # multipliers and moments are computed alike everywhere
            find_unused_parameters=unused_parameters,
            gradient_as_bucket_view=True,
        )


@contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Standard output is process 0's alone."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere:
        kept, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = kept


def leave(code: int = 0) -> None:
    """End a process that torchrun started, what it has done written.

    Without the interpreter's own end: threads of the process group may outlive it there and abort the process, which
    torchrun would take for a failure of the job.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report(program: str, message: str) -> None:
    """An error on stderr, once: a process other than 0 speaks only if it outlives the moment in which 0 would have
    said the same and ended the job.
    """
    if is_main():
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        return
    time.sleep(3)
    print(f"{program}: error in process {rank()}: {message}", file=sys.stderr, flush=True)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone."""
    if not launched():
        return False
    words = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "nccl", "gloo", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
