"""The device of a run, its threads, and its precision."""

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from nas.machine.distributed import local_device
from nas.machine.options import MachineOptions
from search_spaces.errors import UserError


def pick_device(options: MachineOptions) -> torch.device:
    """The device, with torch's threads set when asked."""
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads {options.threads}; expected at least 1")
        torch.set_num_threads(options.threads)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}; expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    return local_device(device)


def device_name(device: torch.device) -> str:
    """What the processor or the card calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def amp_dtype(options: MachineOptions, device: torch.device) -> torch.dtype | None:
    """The autocast type; None for float32."""
    if not options.amp:
        return None
    if options.amp_dtype == "float16" and device.type != "cuda":
        raise UserError(f"--amp-dtype float16 needs CUDA (device is {device}); use bfloat16")
    return torch.bfloat16 if options.amp_dtype == "bfloat16" else torch.float16


def autocast(options: MachineOptions, device: torch.device) -> AbstractContextManager[Any]:
    """The run's precision, as a context."""
    dtype = amp_dtype(options, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
