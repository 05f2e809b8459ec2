"""The device of a run, its threads, and its precision."""

import torch

from nas.config import Common
from nas.machine.distributed import local_device
from search_spaces.errors import UserError


def pick_device(config: Common) -> torch.device:
    """The device, with torch's threads set when asked."""
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"--threads {config.threads}; expected at least 1")
        torch.set_num_threads(config.threads)
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}; expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    return local_device(device)


def amp_dtype(config: Common, device: torch.device) -> torch.dtype | None:
    """The autocast type; None for float32."""
    if not config.amp:
        return None
    if config.amp_dtype == "float16" and device.type != "cuda":
        raise UserError(f"--amp-dtype float16 needs CUDA (device is {device}); use bfloat16")
    return torch.bfloat16 if config.amp_dtype == "bfloat16" else torch.float16
