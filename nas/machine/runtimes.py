"""Runtimes of a network: as it is, by torch.compile, as ONNX by onnxruntime."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nas.machine.files import write_atomically
from search_spaces.errors import UserError, reason

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[Any], Any]


def check_packages(instead: str = "") -> None:
    """UserError when the optional packages are not installed. instead: what would do without, in words."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install 'vit-nas[export]' (in a checkout: uv sync --extra export)"
            f"{instead}"
        )


def export_program(network: Any, images: Any) -> Any:
    """The torch.export program of a network in eval mode, with a dynamic batch. images: (B > 1, C, H, W)."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(network.eval(), (images,), dynamic_shapes=({0: batch},))


def export_onnx(program: Any, path: Path) -> None:
    """Write an exported program as ONNX, in one file, atomically. Input "images", output "logits"."""
    # optimize=True takes x + 1e-8 for x, which T2T-ViT's Performer divides by; onnxruntime optimises what it loads.
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False, optimize=False
    )
    assert onnx is not None
    write_atomically(path, lambda p: onnx.save(p, include_initializers=True))


def onnx_network(path: Path, threads: int) -> Callable[[Any], Any]:
    """onnxruntime's session on the CPU: images (B, C, H, W) -> logits (B, classes)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


def compiled(network: Any, images: Any) -> Any:
    """torch.compile's network, or None and a line when this machine cannot compile."""
    run = torch.compile(network, dynamic=False)
    try:
        with torch.no_grad():
            run(images)
    except Exception as error:  # no C++ compiler, no headers, ...: whatever inductor raises
        print(f"torch.compile does not work here: {reason(error)[:200]}")
        return None
    return run


@torch.no_grad()
def made_to_run(network: torch.nn.Module, example: Any, runtime: str, threads: int | None) -> Run:
    """A network in eval mode as a runtime runs it, at the example's shape. UserError where that runtime cannot.

    example: a batch, on the network's device and of its type.
    """
    if runtime == "eager":
        return network
    if runtime == "compiled":
        found = compiled(network, example)
        if found is None:
            raise UserError("--runtime compiled: torch.compile does not work here; take eager or onnxruntime")
        return found  # type: ignore[no-any-return]
    check_packages()
    program = torch.export.export(network.eval(), (example,))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(program, path)
        return onnx_network(path, threads or torch.get_num_threads())
