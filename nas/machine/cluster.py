"""Ray: its own settings, made before anything imports it for it reads them then; starting it here, or joining it."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nas.machine.cores import usable_cores
from search_spaces.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` it would run workers in an uploaded copy of this folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
PATIENCE = 10.0  # seconds for a cluster to answer
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # as there, every process of Ray binds to 127.0.0.1 alone


def settle(address: str | None) -> None:
    """Make Ray's settings for --ray-address, this machine where there is none."""
    os.environ.update(QUIET)
    if address in (None, "local"):
        os.environ.update(LOOPBACK)


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray's cluster at an address, as long as the context is open. None: none is needed."""
    if address is None:
        yield
        return
    settle(address)
    import ray

    connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def connect(address: str | None, store: int | None = None) -> None:
    """Start Ray on this machine's loopback, or join the cluster asked for.

    store: bytes that objects may take of a machine's memory where Ray is started; by default a share that Ray takes.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address in (None, "local"):
        ray.init(
            address="local",
            num_cpus=usable_cores(),
            include_dashboard=False,
            object_store_memory=store,
            **quiet,
        )
        return
    try:
        if address != "auto":
            check_answers(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--ray-address {address}: no Ray cluster there ({reason}); start one by `ray start --head`,"
            " or leave the option out"
        ) from None


def check_answers(address: str) -> None:
    """OSError where nothing listens at HOST:PORT, for which Ray would wait without end; ValueError where it is none."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError("expected auto, local or HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
