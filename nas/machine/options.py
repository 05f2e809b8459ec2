"""The options of the machine."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MachineOptions:
    """Where a run computes, and how exactly."""

    device: str | None = None
    """cuda where there is one, otherwise cpu"""
    threads: int | None = None
    """CPU threads of torch; by default OMP_NUM_THREADS, or as many as a short timing at the start finds fastest"""
    amp: bool | None = None
    """train and measure under autocast (--amp-dtype)"""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """type of --amp; float16 needs CUDA"""
